"""What a manager saves: a frozen value, which is parsed and checked as a whole before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import schedules
from .._warning import warn
from ..pairs import shards
from ..pairs.arguments import Names, shown, whole_number
from ..pairs.checks import WIDTH, check_tensor, dtype_name, equal_values, storage_refusal
from ..pairs.memory import storage
from ..pairs.pairing import difference, first_few, in_common
from .timetable import Timetable

VERSION = 1
Whose = Literal["saved", "mine"]
MINE = 'schedules="mine", an argument of load_state_dict, attach and the callbacks'
WAYS_ON = (
    "where the model has changed since the manager was made, call ema.reselect() first; to load only what both have, "
    "ema.load_state_dict(state, names='common')"
)


@dataclass(frozen=True)
class State:
    """The step, the decays of the latest update, the options, and for each average a tensor by name."""

    step: int
    decays: tuple[float, ...]
    timetable: Timetable
    averages: tuple[dict[str, Tensor], ...]

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone."""
        table = self.timetable
        return {
            "version": VERSION,
            "step": self.step,
            "updates": table.updates_at(self.step),
            "update_every": table.update_every,
            "update_after_step": table.update_after_step,
            "rounding": table.rounding,
            "seed": table.seed,
            "nonfinite": table.nonfinite,
            "decays": list(self.decays),
            "schedules": [schedules.to_state(schedule) for schedule in table.schedules],
            "averages": [dict(each) for each in self.averages],
        }


def parse(saved: Any, own: State, whose: Whose, names: Names = "equal") -> State:
    """The state that a dict describes, with the manager's own timetable if `whose` is "mine". Raises where it doesn't
    fit a manager whose state is `own` now.

    The averages are the dict's tensors, or copies of those that lie in the manager's own memory. With names="common"
    they are only those whose names and shapes the manager has too; a warning says once what that leaves out.
    """
    check_whose(whose)
    expected = own.to_dict()
    if not isinstance(saved, Mapping):
        raise ValueError(f"state: expected the keys {list(expected)}, found {type(saved).__name__}")
    version = saved.get("version", VERSION)
    if not isinstance(version, int) or version != VERSION:  # a tensor would compare its elements
        raise ValueError(f"state: expected version {VERSION}, found {shown(version)}")
    saved = {"nonfinite": "propagate", **saved}  # earlier versions had no other way
    if saved.keys() != expected.keys():
        kinds = (expected.keys(), expected.keys() - {"nonfinite"})
        inside = [key for key, value in saved.items() if isinstance(value, Mapping) and value.keys() in kinds]
        hint = f"; such a state is in it under {inside[0]!r}" if inside else ""
        if not inside and "averages" not in saved:
            hint = (
                "; the states of other packages, and averaged weights by name, are read by "
                "fused_ema.checkpoints.restore(ema, state)"
            )
        differ = difference(map(str, saved), expected, "the state")
        raise ValueError(f"state: expected the keys {list(expected)}; {differ}{hint}")
    rounding = saved["rounding"]
    if not isinstance(rounding, str) or (whose == "saved" and rounding != own.timetable.rounding):
        raise ValueError(
            f"state: expected rounding {own.timetable.rounding!r}, as the manager's, found {shown(rounding)}; make the "
            f"manager with the saved rounding, or load with {MINE}"
        )
    least = {"step": 0, "updates": 0, "update_after_step": 0, "seed": 0, "update_every": 1}
    numbers = {key: whole_number(f"state[{key!r}]", saved[key], at_least) for key, at_least in least.items()}
    count = len(own.averages)
    for key in ("averages", "schedules", "decays"):
        found = saved[key]
        if not isinstance(found, list) or len(found) not in ({0, count} if key == "decays" else {count}):
            what = f"{len(found)} of them" if isinstance(found, list) else type(found).__name__
            raise ValueError(f"state: expected a list of {key} for {count} averages, found {what}")
    for decay in saved["decays"]:
        if not isinstance(decay, float) or not 0.0 <= decay <= 1.0:
            raise ValueError(f"state: expected decays in [0, 1], found {shown(decay)}")
    timetable = own.timetable
    if whose == "saved":
        timetable = Timetable(
            tuple(map(_schedule, saved["schedules"], own.timetable.schedules)),
            numbers["update_every"],
            numbers["update_after_step"],
            own.timetable.rounding,
            numbers["seed"],
            saved["nonfinite"],
        )
    averages = [
        _fitting(k, ours, theirs, names)
        for k, (ours, theirs) in enumerate(zip(own.averages, saved["averages"], strict=True))
    ]
    ours = {storage(shards.local(average)) for each in own.averages for average in each.values()}
    copied = (
        {name: each.clone() if storage(shards.local(each)) in ours else each for name, each in average.items()}
        for average in averages
    )
    state = State(numbers["step"], tuple(saved["decays"]), timetable, tuple(copied))
    _warn_of_other_options(own.timetable, timetable)
    return state


def check_whose(schedules: str) -> None:
    if schedules not in ("saved", "mine"):
        raise ValueError(f"schedules: expected 'saved' or 'mine', found {shown(schedules)}")


def _warn_of_other_options(own: Timetable, saved: Timetable) -> None:
    options = ["decay", "update_every", "update_after_step", "nonfinite"] + ["seed"] * (own.rounding == "stochastic")
    theirs, ours = ({name: _option(each, name) for name in options} for each in (saved, own))
    if differ := [name for name in options if theirs[name] != ours[name]]:
        was, has = (", ".join(f"{name}={each[name]}" for name in differ) for each in (theirs, ours))
        warn(
            f"EMA: the state was saved with {was}, and the manager that loads it has {has}; the saved options are used "
            f"from now on. To go on with the manager's own, load with {MINE}"
        )


def _option(table: Timetable, name: str) -> str:
    """The value of an argument of `fused_ema.EMA`, as one would write it."""
    if name != "decay":
        return str(getattr(table, name))
    each = [str(one.D) if isinstance(one, schedules.constant) else repr(one) for one in table.schedules]
    return each[0] if len(each) == 1 else f"[{', '.join(each)}]"


def _schedule(saved: Any, own: schedules.Schedule) -> schedules.Schedule:
    if isinstance(saved, Mapping):
        return schedules.from_state(saved)
    if not isinstance(saved, str):
        raise ValueError(f"state: expected each schedule by name, found {shown(saved)}")
    if not isinstance(ours := schedules.to_state(own), str):
        raise ValueError(
            f"state: expected a manager with the schedule it was saved with, {saved}, found {ours}; make the manager "
            f"with that schedule, or load with {MINE}"
        )
    return own


def _fitting(k: int, ours: dict[str, Tensor], theirs: Any, names: Names) -> dict[str, Tensor]:
    """What average `k` of each name is to become."""
    if not isinstance(theirs, Mapping):
        raise ValueError(f"state: expected average {k} by name, found {type(theirs).__name__}")
    differ = difference(theirs, ours, "the state")
    if names == "common":
        here = {shards.local(ours[name]).data_ptr() for name in ours if name in theirs}  # under one of tied names
        wanted = (x for x in ours if x in theirs or shards.local(ours[x]).data_ptr() not in here)
        differ = difference(theirs, wanted, "the state")
        kept = in_common("EMA.load_state_dict", [(x, x) for x in ours if x in theirs], ours, theirs, differ)
        ours = {name: ours[name] for name, _ in kept}
    elif differ:
        raise ValueError(f"state: expected the manager's names in average {k}; {differ}; {WAYS_ON}")
    problems = [problem for name, average in ours.items() if (problem := _problem(name, average, theirs[name]))]
    first: dict[int, str] = {}
    for name, average in ours.items() if not problems else ():
        mine = shards.local(average)
        tied = first.setdefault(mine.data_ptr(), name) if mine.numel() else name  # empty tensors share no memory
        if not equal_values(shards.local(theirs[tied]), shards.local(theirs[name])):
            problems.append(f"{name!r}: expected the values of {tied!r}, which it is tied to, found others")
    if problems:
        ways_on = f"; {WAYS_ON}" if any("expected shape" in problem for problem in problems) else ""
        raise ValueError(f"state: in average {k}, {first_few(problems, '; ')}{ways_on}")
    return {name: shards.like(theirs[name], average) for name, average in ours.items()}


def _problem(name: str, average: Tensor, found: Any) -> str:
    """Why a value can't become this average; "" where it can."""
    try:
        check_tensor(repr(name), found)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    if found.shape != average.shape:
        return f"{name!r}: expected shape {tuple(average.shape)}, found {tuple(found.shape)}"
    gather = "; call its full_tensor() on every rank, or load it with torch.distributed.checkpoint"
    if not shards.fits(found, average) and (refusal := shards.refusal(repr(name), found, average, gather=gather)):
        return str(refusal)
    if found.dtype not in WIDTH or torch.promote_types(found.dtype, average.dtype) != average.dtype:
        return f"{name!r}: expected {dtype_name(average)}, found {dtype_name(found)}"
    refusal = storage_refusal(f"the manager's {name!r}", shards.local(average))
    return str(refusal) if refusal else ""
