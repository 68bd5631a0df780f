"""Watches, which tell whether modules, dicts and lists still hold what they held when a plan was made.

Parameters get replaced, moved, cast, added, removed and tied between two updates. A watch is taken before the tensors
are paired, so that what another thread changes in between is seen too. It holds neither modules nor plain tensors: a
plan in a cache must not keep them alive.
"""

from __future__ import annotations

import operator
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from ..pairs.checks import PLAIN_TYPES
from ..pairs.pairing import Source
from ..pairs.shards import is_sharded
from . import extension
from .base import Slots, Watch

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_registries_of = operator.itemgetter(*_REGISTRIES)


def watch(*sources: Source) -> Watch | None:
    """Watches what the sources hold from now on; None where one of them can't be watched.

    It looks by C++ where the extension is loaded, whichever runner follows: that takes a fraction of the time.
    """
    if not all(map(watchable, sources)):
        return None
    modules = [source for source in sources if isinstance(source, nn.Module)]
    containers: list[Any] = [source for source in sources if not isinstance(source, nn.Module)]
    compiled = extension.load()
    return compiled.CompiledWatch(modules, containers) if compiled else SlotWatch(modules, containers)


def watchable(source: Source) -> bool:
    """Whether the slots of a source show everything that it holds."""
    if not isinstance(source, nn.Module):
        return type(source) in (dict, OrderedDict, list, tuple)  # a subclass may return other tensors than it holds
    modules = [source, *source.modules()]
    registries: list[Any] = [vars(module).get(name) for module in modules for name in _REGISTRIES]
    if not all(type(registry) in (dict, OrderedDict) for registry in registries):
        return False  # a ScriptModule's, for example
    children = {id(child) for registry in registries[2::3] for child in registry.values()}
    return {id(source), *children} - {id(None)} == set(map(id, modules))  # modules() may be overridden


class SlotWatch:
    """The watch in Python. It compares the identities of all values.

    A new object may have the address of one that was freed. A weak reference tells whether a module was; a plain tensor
    is compared by its memory, type and shape afterwards. A sharded one is kept alive, since those don't identify it.
    """

    def __init__(self, modules: Sequence[nn.Module], containers: Sequence[Any]) -> None:
        found = {id(each): each for module in modules for each in (module, *module.modules())}
        self._modules = [weakref.ref(each) for each in found.values()]
        self._dicts = [each for each in containers if isinstance(each, dict)]
        self._sequences = [each for each in containers if not isinstance(each, dict)]
        seen = self._look()
        self._expected = seen[0] if seen else None
        self._types = list(map(type, seen[1])) if seen else []
        self._sharded = [value for value in (seen[1] if seen else ()) if is_sharded(value)]

    def current(self) -> bool:
        return self.values() is not None

    def values(self) -> list[Any] | None:
        seen = self._look()
        return seen[1] if seen and seen[0] == self._expected else None

    def changed(self) -> tuple[list[Any], Slots] | None:
        seen = self._look()
        if seen is None or self._expected is None or seen[0][:-1] != self._expected[:-1]:
            return None
        values = seen[1]
        numbers = [
            i for i, (now, before) in enumerate(zip(seen[0][-1], self._expected[-1], strict=True)) if now != before
        ]
        if not all(type(values[i]) is self._types[i] and self._types[i] in PLAIN_TYPES for i in numbers):
            return None
        return values, [(i, values[i]) for i in numbers]

    def adopt(self, changed: Slots) -> None:
        assert self._expected
        for number, value in changed:
            self._expected[-1][number] = id(value)

    def _look(self) -> tuple[tuple[list[Any], ...], list[Any]] | None:
        """What identifies the contents of the slots, and the contents; None where a module or registry is gone."""
        try:
            attributes = map(vars, [reference() for reference in self._modules])
            dicts = list(chain.from_iterable(map(_registries_of, attributes)))
        except (TypeError, KeyError):  # vars(None), where the module is gone
            return None
        dicts += self._dicts
        filled = list(filter(None, dicts))
        keys = list(chain.from_iterable(filled))
        values = list(chain.from_iterable([*map(dict.values, filled), *self._sequences]))
        return (list(map(len, dicts)), list(map(len, self._sequences)), keys, list(map(id, values))), values
