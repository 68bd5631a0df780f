"""The weight of each checkpoint in the average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import SupportsFloat

from ..pairs.arguments import decay_number, shown
from ..posthoc.profiles import shares
from ..schedules import gamma_of

DECAYS: dict[str, Callable[[float], float]] = {  # of the learning rate, from 1 at 0 to 0 at 1
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}
FORMS = "mean, linear, ema:DECAY, wsm:linear, wsm:cosine, wsm:1-sqrt, pma:sma, pma:wma, pma:ema:ALPHA, power:SIGMA_REL"
TIMED = ("ema", "power")  # whose weights depend on the times


def weights_of(weights: str | Sequence[float], count: int, times: Sequence[float] | None = None) -> list[float]:
    """The weights of `count` checkpoints, from the oldest to the newest; they sum to 1.

    Args:
        weights: numbers, one for each checkpoint, which are divided by their sum; negative ones are allowed as long as
            the sum is positive. Or the name of a rule:

            - ``"mean"``: 1/K each. Model soups (arXiv 2203.05482), LAWA (2209.14981).
            - ``"linear"``: in proportion to 1, 2, ..., K.
            - ``"ema:0.9"``: the average ← 0.9 of it + 0.1 of the next checkpoint, which begins as the oldest one. With
              `times` the decay is per unit of time: 0.9 to the power of the time since the checkpoint before.
            - ``"wsm:linear"``, ``"wsm:cosine"``, ``"wsm:1-sqrt"``: what stands in for a learning rate that decays by D
              from the first checkpoint on, D(j/K) - D((j+1)/K) for j = 0, ..., K-1, so that the steps between the
              checkpoints j-1 and j have weight D(j/K) (arXiv 2507.17634). wsm:linear is the mean.
            - ``"pma:sma"``, ``"pma:wma"``, ``"pma:ema:0.2"``: the simple, weighted and exponential moving averages of
              arXiv 2505.12082, which are mean, linear and ema:0.8: its alpha is the weight of the newest.
            - ``"power:0.15"``: the power profile of that sigma_rel (arXiv 2312.02696) over the training so far, where
              each checkpoint stands for the time since the one before it; see `posthoc.profiles.shares`.
        count: how many checkpoints.
        times: when each was saved, such as its step, rising and above 0; the training began at 0. For ema and power.
            None: 1, 2, ..., K.

    Raises:
        ValueError: the rule is unknown, or a number is out of range; or `times` do not rise, or are given for a rule
            that does not use them.
    """
    if isinstance(weights, str):
        weights = parsed(weights)
    if isinstance(weights, str):
        rule, _, number = weights.partition(":")
        if times is not None and rule not in TIMED:
            raise ValueError(f"times: expected them with ema or power weights, found weights {weights!r}")
        return _of_rule(weights, rule, number, _rising(times, count))
    if times is not None:
        raise ValueError("times: expected them with ema or power weights, found numbers as weights")
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected a rule or a list of numbers, found {shown(weights)}")
    numbers = [_finite("weights", each) for each in weights]
    if len(numbers) != count:
        raise ValueError(f"weights: expected {count}, as many as checkpoints, found {len(numbers)}")
    total = math.fsum(numbers)
    if not total > 0:
        raise ValueError(f"weights: expected a sum above 0, found {total}")
    return [each / total for each in numbers]


def _of_rule(weights: str, rule: str, number: str, times: list[float]) -> list[float]:
    count = len(times)
    if weights in ("mean", "pma:sma"):
        return [1 / count] * count
    if weights in ("linear", "pma:wma"):
        return [2 * (j + 1) / (count * (count + 1)) for j in range(count)]
    if rule == "ema" and number:
        decay = decay_number(_number(weights, number))
        decays = [decay ** (after - before) for before, after in pairwise(times)]
        return [w * math.prod(decays[j:]) for j, w in enumerate([1.0, *(1 - each for each in decays)])]
    if weights.startswith("pma:ema:"):
        return _of_rule(weights, "ema", repr(1 - decay_number(_number(weights, weights[8:]))), times)
    if rule == "wsm" and number in DECAYS:
        decay_at = DECAYS[number]
        return [decay_at(j / count) - decay_at((j + 1) / count) for j in range(count)]
    if rule == "power" and number:
        return shares(times, gamma_of(_number(weights, number))).tolist()
    raise ValueError(f"weights: expected numbers or one of {FORMS}; found {weights!r}")


def parameter(weights: str, rule: str) -> float | None:
    """0.15 of "power:0.15", for that rule; None for another."""
    name, _, number = weights.partition(":")
    return _number(weights, number) if name == rule else None


def parsed(text: str) -> str | list[float]:
    """What a user types: the name of a rule, or numbers with commas between them."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        return text


def _number(weights: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"weights: expected a number, found {text!r} in {weights!r}") from None


def _finite(name: str, number: object) -> float:
    if isinstance(number, SupportsFloat) and math.isfinite(number):
        return float(number)
    raise ValueError(f"{name}: expected finite numbers, found {shown(number)}")


def _rising(times: Sequence[float] | None, count: int) -> list[float]:
    if times is None:
        return [float(j + 1) for j in range(count)]
    found = [_finite("times", each) for each in times]
    if len(found) != count:
        raise ValueError(f"times: expected {count}, as many as checkpoints, found {len(found)}")
    if not all(before < after for before, after in pairwise([0.0, *found])):
        raise ValueError(f"times: expected numbers that rise from above 0, found {found}; sort the checkpoints")
    return found
