"""Restores an average from averaged weights, or from the state of another package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..manager.ema import EMA
from ..manager.selection import tensors_of
from ..pairs.arguments import average_index, whole_number
from ..pairs.checks import check_tensor, equal_values
from ..pairs.pairing import by_plain_name, first_few, mismatch
from .layouts import Layout, Positional, layout_of


def restore(
    ema: EMA,
    state: Mapping[str, Any],
    layout: str | None = None,
    index: int = 0,
    *,
    parameters: Iterable[Tensor] | None = None,
    step: int | None = None,
) -> None:
    """Takes the average, and the step if there is one, from averaged weights by name or from the state of another
    package; the schedules stay as they are.

    Names are compared without the segments of wrappers; one of several tied names is enough. Values for what is not
    averaged are ignored. The step stays as it is where the state has no count, as in averaged weights, in checkpoints
    of timm and DINO, and where torch_ema or LitEma had `use_num_updates=False`. If the model is sharded, each rank
    passes the whole tensors, and takes its own part of them.

    Args:
        state: averaged weights (from `EMA.averaged_state_dict`, `save_safetensors` or `posthoc.reconstruct`), or the
            `state_dict()` of another package, or a checkpoint that has one: of timm, DINO, mmengine's EMAHook, or a
            LightningModule with a LitEma.
        layout: one of `LAYOUTS`; None: the one that the state's keys show.
        index: which average. (All averages of a manager have one step.)
        parameters: for `shadow_params`, the parameters that the other package had, if not `model.parameters()`.
        step: the manager's step from now on; None: the state's.

    Raises:
        ValueError, TypeError: the layout is unknown; the count is no whole number, or there is none and the next update
            would copy the model; names, shapes or the number of tensors differ, or types are wider than the averages'.
            Nothing is changed.
        IndexError: there is no average of that index.
        RuntimeError: the manager is swapped. Nothing is changed.
    """
    index = average_index(index, len(ema.schedules))
    kind = layout_of(state, layout)
    if step is not None:
        step = whole_number("step", step, 0)
    elif (step := kind.step(state, ema.timetable)) is None:
        _check_next_update(ema, kind.name)
    with warnings.catch_warnings():  # what state_dict() says of averages that are replaced here
        warnings.filterwarnings("ignore", "EMA: averages hold NaN|EMA: the model's parameters have changed")
        new = ema.state_dict()
    new["averages"][index] = _matched(ema, new["averages"][index], kind, state, parameters)
    if step is not None:
        timetable = ema.timetable
        count = timetable.updates_at(step)
        decays = timetable.decays_at(timetable.step_of(count)) if count else ()
        new.update(step=step, updates=count, decays=list(decays))
    ema.load_state_dict(new)


def _check_next_update(ema: EMA, layout: str) -> None:
    timetable = ema.timetable
    warming = ema.step < ema.update_after_step
    if 0.0 in timetable.decays_at(ema.step + 1 if warming else timetable.step_of(ema.updates + 1)):
        raise ValueError(
            f"state: the layout {layout!r} has no count of steps, and the next update would copy the model over the "
            "average; pass step=, the updates that the average has had"
        )


def _matched(
    ema: EMA,
    averages: dict[str, Tensor],
    kind: Layout,
    state: Mapping[str, Any],
    parameters: Iterable[Tensor] | None,
) -> dict[str, Tensor]:
    """The values in the state for these averages, by the manager's names; load_state_dict checks their types."""
    given, places = kind.tensors(state, ema.model), kind.places(ema.model, parameters)
    positional = isinstance(kind, Positional)
    if positional and len(given) != len(places):
        raise ValueError(
            f"shadow_params: expected {len(places)} tensors, one for each parameter, found {len(given)}; if the other "
            "package was given only some of the model's parameters, pass those as parameters="
        )
    current = tensors_of(ema.model)
    if differ := mismatch([name for name in averages if name not in current], [], "it"):
        raise ValueError(
            f"model: expected the names it had when the manager was made; {differ}; call ema.reselect() first"
        )
    wanted = {name: id(current[name]) for name in averages}
    averaged = set(wanted.values())
    plain_places = {plain: places[key] for plain, key in by_plain_name("model", places).items()}
    plain_given = by_plain_name("state", given)
    found: dict[int, Tensor] = {}  # for each tensor of the model, the first of its names that the state has
    problems = []
    for plain, place in plain_places.items():
        # Positions are compared even where nothing is averaged, since the order may differ.
        if plain not in plain_given or not (positional or id(place) in averaged):
            continue
        key = plain_given[plain]
        value = given[key]
        check_tensor(f"state[{key!r}]", value)
        tied = found.setdefault(id(place), value)
        if value.shape != place.shape:
            problems.append(f"{key!r}: expected shape {tuple(place.shape)}, found {tuple(value.shape)}")
        elif not equal_values(tied, value):
            problems.append(f"{key!r}: expected the values of the name it is tied to in the model, found others")
    for name in averages:
        if kind.trained_only and not current[name].requires_grad:
            found.setdefault(id(current[name]), current[name].detach())  # it has not moved
    missing = [name for name, tensor in wanted.items() if tensor not in found]
    unexpected = [key for plain, key in plain_given.items() if plain not in plain_places]
    if differ := mismatch(missing, unexpected, "the state"):
        raise ValueError(f"state: expected the names that the manager averages; {differ}")
    if problems:
        raise ValueError(f"state: {first_few(problems, '; ')}")
    return {name: found[tensor] for name, tensor in wanted.items()}
