"""A measurement of updates that takes about a second, for `python -m fused_ema`; benchmarks/ measures thoroughly."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .functional import bind

MANY = (1000, 1000)  # tensors, and elements of each
LARGE = (1, 1 << 24)
ROUNDS, SECONDS = 7, 0.1  # the least for each measurement


class Cost(NamedTuple):
    """The best of a few calls, in seconds, for `MANY` and `LARGE`; other programs can only make a call slower."""

    fused: tuple[float, float]
    foreach: tuple[float, float]  # torch._foreach_lerp_ on the same lists
    stream: float  # average.add_(model) on tensors of LARGE, which reads and writes the same bytes as the update

    @property
    def share(self) -> float:
        """The update's speed, as a share of the stream's."""
        return self.stream / self.fused[1]


def _best(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """The shortest time of each call. They alternate, so that each meets the same states of the machine."""

    def timed(call: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for call in calls:
        call()
    rounds: list[list[float]] = []
    while len(rounds) < ROUNDS or sum(map(sum, rounds)) < SECONDS * len(calls):
        rounds.append([timed(call) for call in calls])
    return [min(times) for times in zip(*rounds, strict=True)]


def measure(device: torch.device) -> Cost:
    """Float32 averages of float32. Allocates 140 MB, and raises PyTorch's error where it can't."""
    best = []
    for tensors, elements in (MANY, LARGE):
        ema, model = ([torch.zeros(elements, device=device) for _ in range(tensors)] for _ in range(2))
        calls = [partial(bind(ema, model).update, 0.999), partial(torch._foreach_lerp_, ema, model, 0.001)]
        best.append(_best(device, *calls, *([partial(ema[0].add_, model[0])] if tensors == 1 else [])))
    (many, many_foreach), (large, large_foreach, stream) = best
    return Cost((many, large), (many_foreach, large_foreach), stream)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
