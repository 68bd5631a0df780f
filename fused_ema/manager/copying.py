"""The averages into a model: what `EMA.copy_to` checks and writes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import plan as plans
from ..pairs import shards
from ..pairs.checks import check_tensor, dtype_name, equal_values, write_refusal
from ..pairs.memory import overlaps, place, span, storage
from ..pairs.pairing import by_plain_name, difference
from .averages import Averages

ExtraStates = Iterable[tuple[nn.Module, Any]]


def extra_states(source: nn.Module, target: nn.Module) -> ExtraStates:
    """What modules of `source` save besides tensors (`get_extra_state`), and the modules of `target` that take it."""
    ours, theirs = _with_extra_state(source), _with_extra_state(target)
    if differ := difference(theirs, ours, "the model"):
        raise ValueError(f"EMA.copy_to: expected the extra states of the model that is averaged; {differ}")
    return [(theirs[name], copy.deepcopy(module.get_extra_state())) for name, module in ours.items()]


def _with_extra_state(model: nn.Module) -> dict[str, nn.Module]:
    found = {
        f"{path}._extra_state" if path else "_extra_state": module
        for path, module in model.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    return {plain: found[name] for plain, name in by_plain_name("model", found).items()}


def copy_into(
    values: Mapping[str, Tensor], into: Mapping[str, Tensor], averages: Averages, extra: ExtraStates = ()
) -> None:
    """Writes each value into the tensor of its name, with the cast that its dtype needs, and sets extra states. If a
    value can't be written, nothing is."""
    for name, value in values.items():
        _check_pair(name, value, into[name])
    _check_memory(values, into, averages)
    for module, state in extra:
        module.set_extra_state(state)
    plans.forget_values()
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)


def _check_pair(name: str, value: Tensor, target: Tensor) -> None:
    check_tensor(f"the average or averaged model[{name!r}]", value)
    check_tensor(f"model[{name!r}]", target)
    if refusal := write_refusal(f"model[{name!r}]", target):
        raise refusal
    if not torch.can_cast(value.dtype, target.dtype):
        ours, found = dtype_name(value), dtype_name(target)
        raise TypeError(f"model[{name!r}]: expected a type that {ours} casts to, found {found}")
    if refusal := shards.refusal(f"model[{name!r}]", target, value):
        raise refusal
    if target.shape != value.shape:
        wanted, shape = tuple(value.shape), tuple(target.shape)
        raise ValueError(f"model[{name!r}]: expected shape {wanted}, as the average's, found {shape}")


def _check_memory(values: Mapping[str, Tensor], into: Mapping[str, Tensor], averages: Averages) -> None:
    """Raises where writing to one tensor would write to another, or to the averages. Tied tensors, which are
    the same elements, must get the same values. Those that are not averaged may overlap, since they already do in the
    model that they come from."""
    targets = {name: tensor for name in values if (tensor := shards.local(into[name])).numel()}
    first: dict[tuple[object, ...], str] = {}
    for name, target in targets.items():
        before = first.setdefault(place(target), name)
        one, other = (shards.local(values[each]) for each in (before, name))
        if place(one) != place(other) and not equal_values(one, other):
            raise ValueError(
                f"model[{name!r}]: expected memory of its own, found that of {before!r}, which has another average"
            )
    pairs = overlaps(span(name, targets[name]) for name in first.values())
    if shared := {each.name for pair in pairs for each in pair}:
        both = [name for name in targets if first[place(targets[name])] in shared]
        if any(name in averages for name in both):
            raise ValueError(f"model: expected tensors with memory of their own, found bytes shared by {both[:5]}")
    ours = averages.storages()
    for name, target in targets.items():
        if storage(target) in ours and place(target) != place(shards.local(values[name])):
            raise ValueError(
                f"model[{name!r}]: expected memory of its own, found memory of the averages; clone it first"
            )
