"""What an update does at each step: which decays and random bits it uses, or that it does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import schedules
from ..pairs.arguments import decay_number, whole_number
from ..runners.base import OpName
from ..schedules import Schedule

Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]
MAX_AVERAGES = 8


@dataclass(frozen=True)
class Timetable:
    """The options of a manager that decide what happens at which step; see `fused_ema.EMA` for each.

    Steps count the calls of `EMA.update` from 1; updates count those that moved the averages. `seed` and `rounding` are
    here because the random bits of an update follow from the seed and the step.
    """

    schedules: tuple[Schedule, ...]
    update_every: int = 1
    update_after_step: int = 0
    rounding: Rounding = "nearest"
    seed: int = 0
    nonfinite: Nonfinite = "propagate"

    def __post_init__(self) -> None:
        for name, least in (("update_every", 1), ("update_after_step", 0), ("seed", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding: expected 'nearest' or 'stochastic', found {self.rounding!r}")
        if self.nonfinite not in ("propagate", "skip"):
            raise ValueError(f"nonfinite: expected 'propagate' or 'skip', found {self.nonfinite!r}")

    @property
    def op(self) -> OpName:
        """What an update does, in the words of the runners."""
        if self.rounding == "nearest":
            return "update" if self.nonfinite == "propagate" else "update_finite"
        return "update_stochastic" if self.nonfinite == "propagate" else "update_stochastic_finite"

    def moves_at(self, step: int) -> bool:
        """Whether the averages move at this step."""
        after = step - self.update_after_step
        return after <= 0 or after % self.update_every == 0

    def updates_at(self, step: int) -> int:
        """How many updates there were after so many steps, not counting the copies up to `update_after_step`."""
        return max(0, step - self.update_after_step) // self.update_every

    def step_of(self, update: int) -> int:
        """The step at which update number `update` happens."""
        return self.update_after_step + update * self.update_every

    def decays_at(self, step: int) -> tuple[float, ...]:
        """The decay of each average at this step; 0, which copies, up to `update_after_step`."""
        after = step - self.update_after_step
        return tuple([self._decay(schedule, after) for schedule in self.schedules])

    def _decay(self, schedule: Schedule, after: int) -> float:
        if after <= 0:
            return 0.0
        per_step = getattr(schedule, "per_step", True)
        decay = decay_number(schedule(after if per_step else after // self.update_every))
        return decay**self.update_every if per_step and self.update_every > 1 else decay

    def keys_at(self, step: int) -> tuple[int, ...]:
        """The key of the random bits for each average at this step; none where rounding is to nearest."""
        if self.rounding == "nearest":
            return ()
        return tuple(_mix(_mix(self.seed) + step * MAX_AVERAGES + k) for k in range(len(self.schedules)))


def schedules_of(decay: Any) -> tuple[Schedule, ...]:
    """The schedule of each average, from what `fused_ema.EMA` takes as its `decay`."""
    several = decay if isinstance(decay, Sequence) and not isinstance(decay, str) else [decay]
    if not 1 <= len(several) <= MAX_AVERAGES:
        raise ValueError(f"decay: expected 1 to {MAX_AVERAGES} decays or schedules, found {len(several)}")
    return tuple(schedules.as_schedule(each) for each in several)


def _mix(x: int) -> int:
    """SplitMix64: 64 bits that look independent for neighbouring numbers (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return x ^ x >> 31
