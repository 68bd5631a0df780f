"""Decay schedules: schedule(n) is the decay of update n, a float in [0, 1]; n = 1 for the first update.

They are frozen dataclasses, so that they can be pickled, compared, hashed and printed. D, in [0, 1], is the decay that
a schedule keeps or approaches. Arguments that are out of range, and n < 1, raise ValueError; arguments that are not
numbers raise TypeError.

`per_step` says what a decay stands for. True: one optimizer step, so that a manager with `update_every=k` raises it to
the k-th power. False: one update, however many steps there are between two; see `power_function`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, TypeAlias

from .pairs.arguments import shown

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "exponential_ramp",
    "gamma_of",
    "growing_half_life",
    "half_life",
    "inverse_power",
    "power_function",
    "sigma_rel_of",
    "tf_warmup",
]


Schedule: TypeAlias = Callable[[int], float]
"""Any function from the number of an update, 1 for the first, to its decay."""


class _Checked:
    per_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))


@dataclass(frozen=True)
class constant(_Checked):
    """D at every update."""

    D: float

    def __call__(self, n: int) -> float:
        _update(n)
        return self.D


@dataclass(frozen=True)
class inverse_power(_Checked):
    """A warm-up during which the average covers about the last (n/gamma)^power updates.

    Args:
        D: the largest decay.
        gamma: in updates, > 0; the larger, the slower the warm-up.
        power: positive; with power 1 and gamma 1, the average is the plain mean until the decay reaches D.
        min: the smallest decay, in [0, D], after the first start + 1 updates, whose decay is 0.
        start: the number of updates before the one that the average starts from, an integer >= 0.

    Equivalent to::

        s = n - start - 1
        decay = 0 if s <= 0 else clamp(1 - (1 + s / gamma) ** -power, min, D)

    Source: timm's ModelEmaV3 and diffusers' EMAModel, both with warm-up, and ema-pytorch's EMA: n is timm's `step`,
    diffusers' `optimization_step`, ema-pytorch's calls of `update()`; start is their `update_after_step`.
    """

    D: float
    gamma: float = 1.0
    power: float = 2 / 3
    min: float = 0.0
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_min(self.min, self.D)

    def __call__(self, n: int) -> float:
        s = _update(n) - self.start - 1
        if s <= 0:
            return 0.0
        decay = -math.expm1(-self.power * math.log1p(s / self.gamma))  # 1 - (1 + x)**-power loses the digits of small x
        return max(self.min, min(decay, self.D))


@dataclass(frozen=True)
class tf_warmup(_Checked):
    """min(D, (1 + n)/(10 + n)): a short warm-up.

    Source: TensorFlow's ExponentialMovingAverage and torch_ema, whose `num_updates` is n. diffusers' EMAModel with
    `use_ema_warmup=False` has this decay at n = optimization_step - update_after_step - 1, and 0 where that is 0.
    """

    D: float

    def __call__(self, n: int) -> float:
        n = _update(n)
        return min(self.D, (1 + n) / (10 + n))


@dataclass(frozen=True)
class exponential_ramp(_Checked):
    """D·(1 - e^(-n/tau)), tau > 0 in updates.

    Source: ultralytics' ModelEMA, whose `updates` is n.
    """

    D: float
    tau: float = 2000.0

    def __call__(self, n: int) -> float:
        return self.D * -math.expm1(-_update(n) / self.tau)


@dataclass(frozen=True)
class half_life(_Checked):
    """2^(-interval/h): the weight of a model in the average halves every h steps, samples or tokens.

    Args:
        h: in steps, samples or tokens, > 0.
        interval: from one optimizer step to the next, in the unit of h, > 0: 1, or the samples or tokens of a batch.

    Source: Composer's EMA; EDM2's traditional EMA without its ramp-up (h in images, interval the batch size).
    """

    h: float
    interval: float = 1.0

    def __call__(self, n: int) -> float:
        _update(n)
        return math.pow(2.0, -self.interval / self.h)


@dataclass(frozen=True)
class power_function(_Checked):
    """(1 - 1/n)^(gamma + 1): the weights of the updates in the average are a power function of their numbers.

    After n updates, the share of update t's model is ∫ s^gamma from t - 1 to t over the same integral from 0 to n. This
    profile depends on t/n only, so updates on every k-th step give the same one with the same decays, sampled more
    coarsely. (EDM2's formula for them, 1 - k/step, is this one at n = step/k.)

    Args:
        sigma_rel: the standard deviation of t/n under this profile, in (0, 1/√12 = 0.2887]. At the upper end gamma is
            0 and the average is the plain mean. Above it, up to 0.3003, gamma < 0 would give the oldest models the most
            weight.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", appendix C.
    """

    sigma_rel: float
    per_step: ClassVar[bool] = False

    @cached_property
    def gamma(self) -> float:
        """The exponent of the profile; see `gamma_of`."""
        return gamma_of(self.sigma_rel)

    def __call__(self, n: int) -> float:
        n = _update(n)
        return math.exp((self.gamma + 1.0) * math.log1p(-1 / n)) if n > 1 else 0.0


@dataclass(frozen=True)
class growing_half_life(_Checked):
    """2^(-1/(fraction·n)): the half-life grows with training, as a fraction of the updates so far.

    The decay is for one update, however many steps there are between two, as that of `power_function`: the average
    covers the same share of the training, whatever `update_every` is.

    Args:
        fraction: the half-life, as a fraction of the n updates so far, > 0. 0.05 gives 2^(-20/n).

    Source: torchtitan's EMAOptimizersContainer, whose `half_life_fraction` is fraction and whose `num_updates` is n.
    Its `start_step` is `update_after_step` of `fused_ema.EMA`, which copies the model at that step.
    """

    fraction: float = 0.05
    per_step: ClassVar[bool] = False

    def __call__(self, n: int) -> float:
        return math.pow(2.0, -1.0 / (self.fraction * _update(n)))


@dataclass(frozen=True)
class cosine(_Checked):
    """Rises from min at the first step to D after `total` steps, along half a cosine wave: a teacher's momentum.

    Args:
        total: the training steps, an integer >= 1; from step total + 1 on the decay is D. Every step counts,
            including those that `update_every` skips; an update has the decay of its step to the power of
            `update_every`.
        min: the decay of the first step, in [0, D].
        D: the decay that it ends with. With 1, the default, the average comes to rest.

    Equivalent to::

        k = n - 1
        decay = D - (D - min) * (1 + cos(pi * k / total)) / 2 if k < total else D

    Source: BYOL (Grill et al. 2020), whose k and K are n - 1 and total; DINO's `cosine_scheduler(min, D, epochs,
    steps)`, whose element n - 1 is the decay, with total = epochs·steps.
    """

    total: int
    min: float = 0.996
    D: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_min(self.min, self.D)

    def __call__(self, n: int) -> float:
        k = _update(n) - 1
        if k >= self.total:
            return self.D
        rise = math.sin(math.pi / 2 * (k / self.total)) ** 2  # (1 - cos)/2, with all digits near 0
        return min(self.min + (self.D - self.min) * rise, self.D)


def gamma_of(sigma_rel: float) -> float:
    """The gamma for which the profile t^gamma has the width sigma_rel, correctly rounded; see `power_function`.

    Equivalent to ``numpy.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max()``.
    """
    sigma = _checked("sigma_rel", sigma_rel)
    variance, gamma = Fraction(sigma) ** 2, 1.0 / sigma
    while True:  # Newton's method, from the right of the largest root of the cubic, which is convex there
        x = Fraction(gamma)  # exact, because the terms of the cubic cancel
        excess = variance * (x + 2) ** 2 * (x + 3) - (x + 1)
        nearer = float(x - excess / (variance * (x + 2) * (3 * x + 8) - 1))
        if nearer >= gamma:
            return max(nearer, 0.0)  # rounding of 1/√12 may put the root just below 0
        gamma = nearer


def sigma_rel_of(gamma: float) -> float:
    """√((gamma + 1)/((gamma + 2)²·(gamma + 3))), gamma >= 0: the width of the profile t^gamma; see `power_function`."""
    value = _checked("gamma", gamma, (0.0, sys.float_info.max, "a finite value >= 0"))
    return math.sqrt((value + 1.0) / (value + 3.0)) / (value + 2.0)


def as_schedule(decay: float | Schedule) -> Schedule:
    """A number in [0, 1] as a constant schedule; a callable as it is.

    Raises:
        TypeError: it is neither a number nor a schedule; bools, tensors and classes are refused.
        ValueError: the number is out of range.
    """
    if isinstance(decay, type):
        raise TypeError(f"decay: expected a number or a schedule, found the class {decay.__name__}; call it first")
    return decay if callable(decay) else constant(_checked("decay", decay))


def to_state(schedule: Schedule) -> dict[str, float | int | str] | str:
    """For checkpoints: the name and the arguments of a schedule of this module; the repr of any other."""
    name = type(schedule).__name__
    if _BUILT_IN.get(name) is not type(schedule):
        return repr(schedule)
    return {"name": name, **asdict(schedule)}  # type: ignore[call-overload]


def from_state(state: Mapping[str, float | int | str]) -> Schedule:
    """The schedule from the dict that `to_state` made of it; ValueError if the name or an argument is wrong."""
    name = state.get("name") if isinstance(state, Mapping) else None
    if not isinstance(name, str) or name not in _BUILT_IN:
        raise ValueError(f"schedule: expected a dict with a name among {', '.join(_BUILT_IN)}, found {shown(state)}")
    arguments = {key: value for key, value in state.items() if key != "name"}
    expected = {field.name for field in fields(_BUILT_IN[name])}
    if arguments.keys() != expected:
        raise ValueError(f"schedule {name}: expected {sorted(expected)}, found {sorted(map(str, arguments))}")
    try:
        schedule: Schedule = _BUILT_IN[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"schedule {name}: {error}") from error
    return schedule


def _update(n: int) -> int:
    if (n := operator.index(n)) < 1:
        raise ValueError(f"n: expected 1 or more, 1 for the first update, found {n}")
    return n


def _check_min(least: float, D: float) -> None:
    if least > D:
        raise ValueError(f"min: expected a value in [0, D], where D is {D}, found {least}")


def _checked(name: str, value: object, among: tuple[float, float, str] | None = None) -> float | int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, found {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int
        number = math.inf
    low, high, expected = among or _RANGES[name]
    whole = name in _WHOLE
    if not low <= number <= high or (whole and not isinstance(value, Integral)):  # refuses NaN too
        raise ValueError(f"{name}: expected {expected}, found {number}")
    return int(value) if whole and isinstance(value, Integral) else number


_POSITIVE = (math.ulp(0.0), sys.float_info.max, "a finite value > 0")
_WIDEST = math.sqrt(1 / 12) * (1 + 2**-51)  # allows for each way to compute 1/√12
_WHOLE = ("start", "total")
_RANGES = {
    **dict.fromkeys(("decay", "D", "min"), (0.0, 1.0, "a value in [0, 1]")),
    **dict.fromkeys(("gamma", "power", "tau", "h", "interval", "fraction"), _POSITIVE),
    "start": (0.0, sys.float_info.max, "an integer >= 0"),
    "total": (1.0, sys.float_info.max, "an integer >= 1"),
    "sigma_rel": (sys.float_info.min, _WIDEST, "a value in (0, 1/sqrt(12) = 0.2887]"),  # 1/sigma_rel is finite
}
_BUILT_IN: dict[str, type[Any]] = {
    each.__name__: each
    for each in (
        constant,
        inverse_power,
        tf_warmup,
        exponential_ramp,
        half_life,
        power_function,
        growing_half_life,
        cosine,
    )
}
