"""The runner on PyTorch's own multi-tensor operations: fast wherever PyTorch runs, with no compiler.

It keeps the one-step bound of docs/numerics.md, not the kernels' bits. Pairs of one type are averaged in place, by
`torch._foreach_lerp_`. Pairs of two types go through scratch memory, a bounded amount at a time. Rare cases are
computed in float64, by reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pairs.checks import Action
from ..pairs.memory import nth_average
from .base import Call, Job, Tensors, Watch, skips_nonfinite
from .exchange import Exchange
from .groups import alike, borrow, give_back, groups, scratch_bytes
from .in_python import PreparedInPython, getter
from .reference import are_finite, update_


class Foreach:
    """`torch._foreach_lerp_` and `torch._foreach_copy_` on lists of tensors."""

    name = "foreach"

    def backend(self, device_type: str) -> str:
        return "torch"

    def why_not(self, device_type: str) -> str | None:
        return None

    def prepare(self, job: Job, watch: Watch | None) -> PreparedForeach:
        return PreparedForeach(job, watch)


class PreparedForeach(PreparedInPython):
    """See `Prepared`."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        super().__init__(job, watch)
        self._averages, self._strides = job.averages, job.strides
        self._active = [i for i, action in enumerate(job.actions) if action is not Action.NONE]
        self._copied = [i for i in self._active if job.actions[i] is Action.COPY]
        self._pick_copied, self._pick_all = (
            [getter(pairs) for pairs in alike(job, each)] for each in (self._copied, self._active)
        )
        self._groups = groups(job, [i for i in self._active if job.actions[i] is Action.AVERAGE])
        self._numbers: dict[int, int] = {}  # of each pair's first element, as csrc/plan.cpp counts them: random bits
        number = 0
        for i in self._active:
            self._numbers[i] = number
            number += 2 * job.ema[i].numel()
        self._scratch_bytes: dict[torch.device, int] = {}
        for group in self._groups:
            if size := group.scratch_bytes():
                self._scratch_bytes[group.device] = max(size, self._scratch_bytes.get(group.device, 0))
        devices = {tensor.device for tensor in job.model}
        self._exchange = Exchange(job, min(map(scratch_bytes, devices), default=0) // 2)

    def launches(self) -> int:
        return self._averages * (sum(group.operations() for group in self._groups) + len(self._copied))

    def scratch(self) -> list[tuple[torch.device, int]]:
        return self._exchange.scratch()

    def exchanged(self) -> bool:
        return self._exchange.done > 0

    def mark_exchanged(self) -> None:
        self._exchange.mark_done()

    def _run(self, call: Call, tensors: Tensors) -> None:
        half = len(tensors) // 2
        ema, model = tensors[:half], tensors[half:]
        if call.op in ("swap", "restore"):
            return self._exchange.run(call, ema, model)
        skips = skips_nonfinite(call.op) and not self._known_finite(model)
        averages = range(len(call.decays)) if call.average < 0 else [call.average]
        for position, k in enumerate(averages):
            nth = ema if k <= 0 else self._nth(ema, k)
            if call.op == "copy":
                _copy(self._pick_all, nth, model)
                continue
            key = call.keys[position] if call.keys else None
            if call.device_decays is None and not skips:
                self._update(nth, model, call.decays[position], key)
                continue
            on_device = call.device_decays
            decay = call.decays[position] if on_device is None else on_device.reshape(-1)[max(k, 0)]
            self._update_one_by_one(nth, model, decay, key, skips)

    def _known_finite(self, model: Tensors) -> bool:
        """Whether what is averaged is finite. A device is not looked at, since that would wait for it."""
        averaged = [model[i] for group in self._groups for i in group.pairs]
        return all(each.device.type == "cpu" for each in averaged) and all(are_finite(averaged))

    def _nth(self, ema: Tensors, k: int) -> Tensors:
        nth = [*ema]
        for i in self._active:
            nth[i] = nth_average(ema[i], self._strides[i], k)
        return nth

    def _update(self, ema: Tensors, model: Tensors, decay: float, key: int | None) -> None:
        if decay == 1:
            return
        if decay == 0:
            return _copy(self._pick_all, ema, model)
        scratch = {device: borrow(device, size) for device, size in self._scratch_bytes.items()}
        for group in self._groups:
            if group.exact and (key is None or not group.narrow):
                group.update(ema, model, decay, scratch)
                continue
            for i in group.pairs:
                random = None if key is None else (key, self._numbers[i])
                update_(ema[i], model[i], decay, average=True, random=random)
        _copy(self._pick_copied, ema, model)
        for memory in scratch.values():
            give_back(memory)

    def _update_one_by_one(
        self, ema: Tensors, model: Tensors, decay: float | Tensor, key: int | None, finite: bool
    ) -> None:
        for group in self._groups:
            for i in group.pairs:
                random = None if key is None else (key, self._numbers[i])
                update_(ema[i], model[i], decay, average=True, random=random, finite=finite)
        for i in self._copied:
            update_(ema[i], model[i], decay, average=False)


def _copy(picks: list[Callable[[Tensors], Any]], ema: Tensors, model: Tensors) -> None:
    for pick in picks:
        torch._foreach_copy_(pick(ema), pick(model))
