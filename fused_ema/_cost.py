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
CALLS, SECONDS = 7, 0.1  # the minimum for each measurement


class Cost(NamedTuple):
    """The best of a few calls, in seconds, for `MANY` and `LARGE`."""

    fused: tuple[float, float]
    foreach: tuple[float, float]  # torch._foreach_lerp_ on the same lists
    stream: float  # torch.add(a, b, out=c), which reads and writes as many bytes, on tensors of LARGE

    @property
    def share(self) -> float:
        """The update's speed, as a share of the speed at which memory can be read and written."""
        return self.stream / self.fused[1]


def _best(call: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    times: list[float] = []
    while len(times) < CALLS or sum(times) < SECONDS:
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)  # other programs can only make a call slower


def measure(device: torch.device) -> Cost:
    """Float32 averages of float32. Allocates 200 MB, and raises PyTorch's error where it can't."""
    fused, foreach = [], []
    for tensors, elements in (MANY, LARGE):
        ema, model = ([torch.zeros(elements, device=device) for _ in range(tensors)] for _ in range(2))
        fused.append(_best(partial(bind(ema, model).update, 0.999), device))
        foreach.append(_best(partial(torch._foreach_lerp_, ema, model, 0.001), device))
    out = torch.zeros_like(ema[0])
    stream = _best(partial(torch.add, ema[0], model[0], out=out), device)
    return Cost((fused[0], fused[1]), (foreach[0], foreach[1]), stream)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
