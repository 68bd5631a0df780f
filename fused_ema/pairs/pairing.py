"""Modules, mappings, sequences → pairs of tensors, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | Sequence[Tensor]

# Path segments that wrappers put into names: DDP, torch.compile, activation checkpointing, FSDP.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Pairs(NamedTuple):
    """Tensors that belong together, by position. A label is what stands behind `ema` or `model` in an error."""

    labels: list[str]
    ema: list[Tensor]
    model: list[Tensor]
    parameter: list[bool]  # else a buffer


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
        return Pairs([f"[{i}]" for i in range(len(ema))], list(ema), list(model), [True] * len(ema))
    raise TypeError(
        "expected ema and model to be two modules, two mappings of names to tensors or two sequences of tensors, "
        f"found {_kind(ema)} and {_kind(model)}"
    )


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
    """Every name, tied ones too, with its tensor and whether that is a parameter."""
    found: dict[str, tuple[Tensor, bool]] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for registry, parameter in ((child._parameters, True), (child._buffers, False)):
            for name, tensor in registry.items():
                if tensor is not None:
                    found[start + name] = (tensor, parameter)
    return found


def plain_tensors(side: str, module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """By name without the segments of wrappers: the tensor, and whether it is a parameter."""
    tensors = named_tensors(module)
    return {plain: tensors[name] for plain, name in by_plain_name(side, tensors).items()}


def difference(found: Iterable[str], wanted: Iterable[str], finder: str, wanter: str) -> str:
    """The names that only one of two sides has, in words; "" where they have the same."""
    found, wanted = dict.fromkeys(found), dict.fromkeys(wanted)
    extra = listed([name for name in found if name not in wanted])
    missing = listed([name for name in wanted if name not in found])
    return "" if extra == missing == "none" else f"{extra} only in {finder} and {missing} only in {wanter}"


def plain_name(name: str) -> str:
    if not isinstance(name, str):  # the key of a mapping
        return name
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPERS)


def _match(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name in ema, name in model) for each tensor: the same name, or the same once wrappers' segments are dropped."""
    if ours.keys() == theirs.keys():
        return [(name, name) for name in ours]
    unequal = ", and the names of the other side differ from both; expected equal names on both sides"
    plain_ours, plain_theirs = by_plain_name("ema", ours, unequal), by_plain_name("model", theirs, unequal)
    if differ := difference(plain_theirs, plain_ours, "model", "ema"):
        raise ValueError(f"ema and model: expected the same names, found {differ}")
    return [(name, plain_theirs[plain]) for plain, name in plain_ours.items()]


def by_plain_name(
    side: str, names: Iterable[str], hint: str = "; expected names that differ by more"
) -> dict[str, str]:
    """`hint`: what more there is to say where two names are one."""
    plain_names: dict[str, str] = {}
    for name in names:
        other = plain_names.setdefault(plain_name(name), name)
        if other != name:
            raise ValueError(
                f"{side}: {other!r} and {name!r} are one name once the segments of wrappers are dropped{hint}"
            )
    return plain_names


def listed(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more
