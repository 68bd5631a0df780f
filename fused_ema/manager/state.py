"""What `EMA.state_dict` holds, and how it is checked before anything is taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import schedules
from ..pairs import shards
from ..pairs.arguments import shown, whole_number
from ..pairs.checks import PLAIN_TYPES, WIDTH, dtype_name, equal_values, storage_refusal
from ..pairs.pairing import difference

if TYPE_CHECKING:
    from .ema import EMA

from .timetable import Timetable

VERSION = 1
_LISTED = 5  # problems in one message


def to_dict(ema: EMA) -> dict[str, Any]:
    return {
        "version": VERSION,
        "step": ema.step,
        "updates": ema.updates,
        "update_every": ema.update_every,
        "update_after_step": ema.update_after_step,
        "rounding": ema.rounding,
        "seed": ema.seed,
        "decays": list(ema._decays),
        "schedules": [schedules.to_state(schedule) for schedule in ema.schedules],
        "averages": [{name: ema._average(name, k) for name in ema._averages} for k in range(len(ema.schedules))],
    }


def checked(ema: EMA, saved: Any) -> Callable[[], None]:
    """Raises where it does not fit; returns what takes it over."""
    ours = to_dict(ema)
    if not isinstance(saved, Mapping):
        raise ValueError(f"state: expected the keys {list(ours)}, found {type(saved).__name__}")
    version = saved.get("version", VERSION)
    if not isinstance(version, int) or version != VERSION:  # a tensor would compare its elements
        raise ValueError(f"state: expected version {VERSION}, found {shown(version)}")
    if saved.keys() != ours.keys():
        raise ValueError(f"state: expected the keys {list(ours)}, found {list(saved)}")
    rounding = saved["rounding"]
    if not isinstance(rounding, str) or rounding != ours["rounding"]:
        raise ValueError(f"state: expected rounding {ours['rounding']!r}, found {shown(rounding)}")
    least = {"step": 0, "updates": 0, "update_after_step": 0, "seed": 0, "update_every": 1}
    numbers = {key: whole_number(f"state[{key!r}]", saved[key], at_least) for key, at_least in least.items()}
    count = len(ema.schedules)
    for key in ("averages", "schedules", "decays"):
        found = saved[key]
        if not isinstance(found, list) or len(found) not in ({0, count} if key == "decays" else {count}):
            what = f"{len(found)} of them" if isinstance(found, list) else type(found).__name__
            raise ValueError(f"state: expected a list of {key} for {count} averages, found {what}")
    for decay in saved["decays"]:
        if not isinstance(decay, float) or not 0.0 <= decay <= 1.0:
            raise ValueError(f"state: expected decays in [0, 1], found {shown(decay)}")
    taken = tuple(map(_schedule, saved["schedules"], ema.schedules))
    pairs = [pair for k in range(count) for pair in _fitting(k, ours["averages"][k], saved["averages"][k])]
    own = {_storage(average) for average, _ in pairs}  # of which a state_dict() holds no copies
    pairs = [(average, theirs.clone() if _storage(theirs) in own else theirs) for average, theirs in pairs]
    step, decays = numbers.pop("step"), tuple(saved["decays"])
    del numbers["updates"]  # which follow from the others

    @torch.no_grad()
    def take() -> None:
        ema._check_unswapped("load_state_dict")  # another thread may have swapped since
        for average, theirs in pairs:
            average.copy_(theirs)
        ema._timetable = Timetable(taken, **numbers, rounding=ema.rounding)
        ema._step, ema._decays = step, decays

    return take


def _storage(tensor: Tensor) -> int:
    return shards.local(tensor).untyped_storage().data_ptr()


def _schedule(saved: Any, own: schedules.Schedule) -> schedules.Schedule:
    if isinstance(saved, Mapping):
        return schedules.from_state(saved)
    if not isinstance(saved, str):
        raise ValueError(f"state: expected each schedule by name, found {shown(saved)}")
    if not isinstance(ours := schedules.to_state(own), str):
        raise ValueError(f"state: expected a manager with the schedule it was saved with, {saved}, found {ours}")
    return own


def _fitting(k: int, ours: dict[str, Tensor], theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Average k of each name, and what it is to become."""
    if not isinstance(theirs, Mapping):
        raise ValueError(f"state: expected average {k} by name, found {type(theirs).__name__}")
    if differ := difference(theirs, ours, "the state", "the manager"):
        raise ValueError(f"state: expected the same names in average {k}, found {differ}")
    problems = []
    for name, average in ours.items():
        found = theirs[name]
        if not isinstance(found, Tensor):
            problems.append(f"{name!r}: expected a tensor, found {type(found).__name__}")
        elif is_lazy(found) or found.is_nested:
            problems.append(
                f"{name!r}: expected a dense tensor, found {'a lazy' if is_lazy(found) else 'a nested'} one"
            )
        elif type(shards.local(found)) not in PLAIN_TYPES:
            problems.append(f"{name!r}: expected a plain tensor, found {type(found).__name__}")
        elif found.shape != average.shape:
            problems.append(f"{name!r}: expected shape {tuple(average.shape)}, found {tuple(found.shape)}")
        elif refusal := shards.refusal(repr(name), found, average):
            problems.append(str(refusal))
        elif found.layout is not torch.strided or found.is_meta:
            kind = "one on the meta device" if found.is_meta else f"layout {found.layout}"
            problems.append(f"{name!r}: expected a dense tensor, found {kind}")
        elif found.dtype not in WIDTH or torch.promote_types(found.dtype, average.dtype) != average.dtype:
            problems.append(f"{name!r}: expected {dtype_name(average)}, found {dtype_name(found)}")
        elif refusal := storage_refusal(repr(name), shards.local(found)) or storage_refusal(
            f"the manager's {name!r}", shards.local(average)
        ):
            problems.append(str(refusal))
    if not problems:
        first: dict[int, str] = {}
        for name, average in ours.items():
            mine = shards.local(average)
            tied = first.setdefault(mine.data_ptr(), name) if mine.numel() else name  # no memory to share
            if not equal_values(shards.local(theirs[tied]), shards.local(theirs[name])):
                problems.append(f"{name!r}: expected what {tied!r} has, which it is tied to, found other values")
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"state: in average {k}, " + "; ".join(problems[:_LISTED]) + more)
    return [(average, theirs[name]) for name, average in ours.items()]
