"""Pairs the tensors of two modules, mappings or sequences, by name."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]

# Path segments that wrappers put into names: DDP, torch.compile, activation checkpointing, FSDP.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Pairs(NamedTuple):
    """Tensors that belong together, by position. Errors put a label behind `ema` or `model`: `ema['weight']`."""

    labels: list[str]
    ema: list[Tensor]
    model: list[Tensor]
    parameter: list[bool]  # False: a buffer


def pair(ema: Source, model: Source, buffers: str) -> Pairs:
    """Pairs the tensors of two sources of one kind; see `fused_ema.update` for the rules and the errors."""
    if isinstance(ema, nn.Module) and isinstance(model, nn.Module):
        return _pair_modules(ema, model, buffers)
    if isinstance(ema, Mapping) and isinstance(model, Mapping):
        names = _match(dict(ema), dict(model))
        return Pairs(
            [f"[{name!r}]" for name, _ in names],
            [ema[name] for name, _ in names],
            [model[name] for _, name in names],
            [True] * len(names),
        )
    if isinstance(ema, Sequence) and isinstance(model, Sequence) and not isinstance(ema, str):
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


def _pair_modules(ema: nn.Module, model: nn.Module, buffers: str) -> Pairs:
    ours, theirs = named_tensors(ema), named_tensors(model)
    if buffers == "ignore":
        ours = {name: entry for name, entry in ours.items() if entry[1]}
        theirs = {name: entry for name, entry in theirs.items() if entry[1]}
    names = _match(ours, theirs)
    return Pairs(
        [f"[{name!r}]" for name, _ in names],
        [ours[name][0] for name, _ in names],
        [theirs[name][0] for _, name in names],
        [theirs[name][1] for _, name in names],
    )


def named_tensors(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Every name, tied names too, with its tensor and whether that is a parameter."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for registry, parameter in ((child._parameters, True), (child._buffers, False)):
            for name, tensor in registry.items():
                if tensor is not None:
                    found[start + name] = (tensor, parameter)
    return found


def plain_tensors(side: str, module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Each tensor by its plain name, and whether it is a parameter."""
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
    """A state of the model under the names of the innermost model: without the prefixes of DDP and torch.compile.

    Only prefixes are removed, since a module of the user's may be called "module" too.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            prefix = "module"
        elif "_orig_mod" in model._modules:  # torch.compile
            prefix = "_orig_mod"
        else:
            return state
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
        model = model.get_submodule(prefix)


def _match(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name in ema, name in model) for each tensor: equal names, or equal without the segments of wrappers."""
    if ours.keys() == theirs.keys():
        return [(name, name) for name in ours]
    plain_ours, plain_theirs = by_plain_name("ema", ours), by_plain_name("model", theirs)
    if differ := difference(plain_ours, plain_theirs, "ema"):
        raise ValueError(f"ema and model: expected the same names; {differ}")
    return [(name, plain_theirs[plain]) for plain, name in plain_ours.items()]


def by_plain_name(side: str, names: Iterable[str]) -> dict[str, str]:
    """Each name under its plain name, without the segments of wrappers.

    Where two would get one name, they keep their segments "module", which a module of the user's may be called too,
    except those that every name begins with. Raises where they still collide.
    """
    plain_names: dict[str, str] = {}
    names = list(names)
    plains = list(map(plain_name, names))
    times = Counter(plains)
    longer = _with_modules(names) if len(times) < len(names) else {}
    for name, plain in zip(names, plains, strict=True):
        other = plain_names.setdefault(longer[name] if times[plain] > 1 else plain, name)
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
