"""Pairs the tensors of two modules, mappings or sequences, by name."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .._warning import warn_once
from .arguments import Buffers, Names, Use, use_of

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]

# What a tensor is to its module. A "fleeting" buffer is not persistent: the module makes it, and no checkpoint has it.
# A vector of spectral norm's "power iteration" has norm 1, and belongs to the latest weights.
Kind = Literal["parameter", "buffer", "fleeting", "power iteration"]

# Path segments that wrappers put into names: DDP, torch.compile, activation checkpointing, FSDP.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Pairs(NamedTuple):
    """Tensors that belong together, by position. Errors put a label behind `ema` or `model`: `ema['weight']`."""

    labels: list[str]
    ema: list[Tensor]
    model: list[Tensor]
    averaged: list[bool]  # False: copied. (Integers are always copied.)
    optional: Sequence[bool] = ()  # True: left out where it can't be used; empty: none is


def pair(ema: Source, model: Source, buffers: Buffers, names: Names = "equal") -> Pairs:
    """Pairs the tensors of two sources of one kind; see `fused_ema.update` for the rules and the errors."""
    if isinstance(ema, nn.Module) and isinstance(model, nn.Module):
        return _pair_modules(ema, model, buffers, names)
    if isinstance(ema, Mapping) and isinstance(model, Mapping):
        matched = _match(dict(ema), dict(model), names)
        return Pairs(
            [f"[{name!r}]" for name, _ in matched],
            [ema[name] for name, _ in matched],
            [model[name] for _, name in matched],
            [True] * len(matched),
        )
    if isinstance(ema, Sequence) and isinstance(model, Sequence) and not isinstance(ema, str):
        if names == "common":
            raise ValueError("names: expected 'equal' for sequences, which have no names, found 'common'")
        if len(ema) != len(model):
            raise ValueError(f"ema: expected {len(model)} tensors, as many as model, found {len(ema)}")
        return Pairs(_positions(len(ema)), list(ema), list(model), [True] * len(ema))
    raise TypeError(
        "expected ema and model to be two modules, two mappings of names to tensors or two sequences of tensors, "
        f"found {_kind(ema)} and {_kind(model)}"
    )


@functools.lru_cache(maxsize=64)
def _positions(count: int) -> list[str]:
    """The labels of a sequence. They are kept, since making them is half of an update of many small tensors."""
    return [f"[{i}]" for i in range(count)]


def _kind(source: object) -> str:
    hint = " (an iterator: wrap it in list())" if isinstance(source, Iterator) else ""
    return f"{type(source).__module__}.{type(source).__qualname__}{hint}"


def _pair_modules(ema: nn.Module, model: nn.Module, buffers: Buffers, names: Names) -> Pairs:
    uses: dict[str, Use] = {}  # of buffers, by plain name: a function is asked once for both sides
    theirs, ours = _used("model", model, buffers, uses), _used("ema", ema, buffers, uses)
    optional = {name for side in (ours, theirs) for name, (_, kind, _) in side.items() if kind == "fleeting"}
    our_tensors, their_tensors = ({x: entry[0] for x, entry in side.items()} for side in (ours, theirs))
    matched = _match(our_tensors, their_tensors, names, optional)
    return Pairs(
        [f"[{name!r}]" for name, _ in matched],
        [ours[name][0] for name, _ in matched],
        [theirs[name][0] for _, name in matched],
        [theirs[name][2] for _, name in matched],
        [name in optional or other in optional for name, other in matched] if optional else (),
    )


def _used(side: str, module: nn.Module, buffers: Buffers, uses: dict[str, Use]) -> dict[str, tuple[Tensor, Kind, bool]]:
    """The tensors that are not ignored, and whether they are averaged."""
    tensors = named_tensors(module)
    plain = {} if isinstance(buffers, str) else {name: plain for plain, name in by_plain_name(side, tensors).items()}
    used: dict[str, tuple[Tensor, Kind, bool]] = {}
    for name, (tensor, kind) in tensors.items():
        if kind in ("buffer", "fleeting"):
            asked = plain.get(name, name)
            if asked not in uses:
                uses[asked] = use_of(buffers, asked, tensor)
            if uses[asked] != "ignore":
                used[name] = (tensor, kind, kind == "buffer" and uses[asked] == "average")
        else:
            used[name] = (tensor, kind, kind == "parameter")
    return used


def named_tensors(module: nn.Module) -> dict[str, tuple[Tensor, Kind]]:
    """Every name, tied names too, with its tensor and what that is."""
    found: dict[str, tuple[Tensor, Kind]] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        kinds = _kinds_of_buffers(child) if child._buffers else {}
        registries: tuple[tuple[dict[str, Any], Kind], ...] = (
            (child._parameters, "parameter"),
            (child._buffers, "buffer"),
        )
        for registry, usual in registries:
            for name, tensor in registry.items():
                if tensor is not None:
                    found[start + name] = (tensor, kinds.get(name, usual))
    return found


def _kinds_of_buffers(module: nn.Module) -> dict[str, Kind]:
    """The kinds of those that are no ordinary buffers."""
    kinds: dict[str, Kind] = dict.fromkeys(getattr(module, "_non_persistent_buffers_set", ()), "fleeting")
    if isinstance(module, _SpectralNorm):
        kinds["_u"] = kinds["_v"] = "power iteration"
    for hook in getattr(module, "_forward_pre_hooks", {}).values():
        if isinstance(hook, SpectralNorm):
            kinds[f"{hook.name}_u"] = kinds[f"{hook.name}_v"] = "power iteration"
    return kinds


def plain_tensors(side: str, module: nn.Module) -> dict[str, tuple[Tensor, Kind]]:
    """Each tensor by its plain name, and what it is."""
    tensors = named_tensors(module)
    return {plain: tensors[name] for plain, name in by_plain_name(side, tensors).items()}


def difference(found: Iterable[str], wanted: Iterable[str], finder: str) -> str:
    """The names that `found` lacks or has in excess, in words; "" where both have the same names."""
    found, wanted = dict.fromkeys(found), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in found]
    return mismatch(missing, [name for name in found if name not in wanted], finder)


def mismatch(missing: list[str], unexpected: list[str], finder: str) -> str:
    named = ((f"missing from {finder}", missing), (f"unexpected in {finder}", unexpected))
    return "; ".join(f"{what}: {listed(names)}" for what, names in named if names)


def plain_name(name: str) -> str:
    """A name without the segments of wrappers."""
    if not isinstance(name, str):  # mappings may have other keys
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def _with_modules(names: Iterable[str]) -> dict[str, str]:
    """Each name without the segments of wrappers but "module", of which only those that all begin with are left out."""
    paths = {name: [each for each in str(name).split(".") if each not in WRAPPERS - {"module"}] for name in names}
    while all(path[:1] == ["module"] for path in paths.values()):
        paths = {name: path[1:] for name, path in paths.items()}
    return {name: ".".join(path) for name, path in paths.items()}


def unwrapped(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state of the model under the names it would have without DDP and torch.compile, of the model or of parts.

    Only their own segments are removed, since a module of the user's may be called "module" too.
    """
    wrapped = set()
    for path, child in model.named_modules(remove_duplicate=False):
        if isinstance(child, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped.add(f"{path}.module".lstrip("."))
        elif "_orig_mod" in child._modules:  # torch.compile
            wrapped.add(f"{path}._orig_mod".lstrip("."))
    return {_without(key, wrapped): value for key, value in state.items()} if wrapped else state


def _without(key: str, wrapped: set[str]) -> str:
    segments = key.split(".")
    kept = (segment for i, segment in enumerate(segments, 1) if ".".join(segments[:i]) not in wrapped)
    return ".".join(kept)


def _match(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Names, optional: Collection[str] = ()
) -> list[tuple[str, str]]:
    """(name in ema, name in model) for each tensor: equal names, or equal without the segments of wrappers.

    `optional`: names that may be on one side alone.
    """
    if ours.keys() == theirs.keys():
        matched = [(name, name) for name in ours]
        return matched if names == "equal" else in_common("ema and model", matched, ours, theirs, "", optional)
    plain_ours, plain_theirs = by_plain_name("ema", ours), by_plain_name("model", theirs)
    matched = [(name, plain_theirs[plain]) for plain, name in plain_ours.items() if plain in plain_theirs]
    free = {plain for side in (plain_ours, plain_theirs) for plain, name in side.items() if name in optional}
    differ = difference((x for x in plain_ours if x not in free), (x for x in plain_theirs if x not in free), "ema")
    if names == "common":
        return in_common("ema and model", matched, ours, theirs, differ, optional)
    if differ:
        raise ValueError(
            f"ema and model: expected the same names; {differ}; to pair only those that both have, pass names='common'"
        )
    return matched


def in_common(
    what: str,
    matched: list[tuple[str, str]],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    differ: str,
    optional: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Those of the matched names whose tensors have one shape. Says once what names="common" leaves out: these, and
    what differs in other ways."""
    apart = {
        name: f"{name!r}, {_shape(ours[name])} and {_shape(theirs[other])}"
        for name, other in matched
        if _shape(ours[name]) != _shape(theirs[other]) and name not in optional and other not in optional
    }
    if apart:
        differ = (differ + "; " if differ else "") + f"of two shapes: {first_few([*apart.values()], ', ')}"
    kept = [(name, other) for name, other in matched if name not in apart]
    if differ and not kept:
        raise ValueError(f"{what}: expected some tensors in common, of equal names and shapes; {differ}")
    if differ:
        warn_once(f"{what}: names='common' leaves out what only one side has; {differ}")
    return kept


def _shape(tensor: Any) -> tuple[int, ...]:
    lazy = isinstance(tensor, (UninitializedBuffer, UninitializedParameter))  # torch.compile can't trace is_lazy()
    return tuple(tensor.shape) if isinstance(tensor, Tensor) and not lazy else ()


def by_plain_name(side: str, names: Iterable[str]) -> dict[str, str]:
    """Each name under its plain name, without the segments of wrappers.

    Where two would get one name, they keep their segments "module", which a module of the user's may be called too,
    except those that every name begins with. Raises where they still collide.
    """
    plain_names: dict[str, str] = {}
    names = list(names)
    plains = list(map(plain_name, names))
    once: set[str] = set()
    twice: set[str] = set()
    for plain in plains:
        (twice if plain in once else once).add(plain)
    longer = _with_modules(names) if twice else {}
    for name, plain in zip(names, plains, strict=True):
        other = plain_names.setdefault(longer[name] if plain in twice else plain, name)
        if other != name:
            raise ValueError(
                f"{side}: expected names that differ without the segments of wrappers, found {other!r} and {name!r}"
            )
    return plain_names


def listed(names: list[str]) -> str:
    """The first five names, quoted, and how many more there are."""
    return first_few(list(map(repr, names)), ", ")


def first_few(items: list[str], between: str) -> str:
    """The first five, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return between.join(items[:5]) + more
