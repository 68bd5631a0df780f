"""Exchanges the averages with the model's values piece by piece, and undoes that, by PyTorch's own operations."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs.checks import Action
from ..pairs.memory import nth_average
from .base import Call, Job, Tensors
from .pieces import Piece, pieces, reals


class _Step(NamedTuple):
    """What is exchanged, and undone, at a time."""

    piece: Piece
    stride: int  # from one average to the next
    waiting: slice | None  # where the types differ: the model's values, in the scratch memory of the model's device


class Exchange:
    """Counts in `done` the steps that a swap has taken and no restore has undone.

    Args:
        job: the pairs.
        block: the bytes of each side that are exchanged at a time, and of which a copy is made.
    """

    def __init__(self, job: Job, block: int) -> None:
        self.done = 0
        self._sizes: Counter[torch.device] = Counter()
        self._steps: list[_Step] = []
        for i, (ema, model, action) in enumerate(zip(job.ema, job.model, job.actions, strict=True)):
            if action is not Action.NONE:
                for piece in pieces(i, ema, model, block // max(ema.element_size(), model.element_size())):
                    waiting = None if ema.dtype == model.dtype else self._reserve(model, piece)
                    self._steps.append(_Step(piece, job.strides[i], waiting))

    def _reserve(self, model: Tensor, piece: Piece) -> slice:
        begin = self._sizes[model.device]
        end = begin + piece.numel() * reals(model).element_size()
        self._sizes[model.device] = (end + 15) // 16 * 16
        return slice(begin, end)

    def scratch(self) -> list[tuple[torch.device, int]]:
        """See `Prepared`."""
        return list(self._sizes.items())

    def mark_done(self) -> None:
        self.done = len(self._steps)

    def run(self, call: Call, ema: Tensors, model: Tensors) -> None:
        """Runs a "swap", or a "restore" that undoes as much as was done."""
        sizes = [memory.numel() for memory in call.scratch]
        if len(sizes) != len(self._sizes) or any(map(int.__lt__, sizes, self._sizes.values())):
            raise ValueError(f"scratch: expected {self.scratch()}, found {sizes} bytes")
        try:
            if call.op == "swap":
                for done, step in enumerate(self._steps, 1):
                    self._take(step, call, ema, model, done)
            while call.op == "restore" and self.done:
                self._take(self._steps[self.done - 1], call, ema, model, self.done - 1)
        finally:  # autograd counts the changes of whole tensors by itself
            parts = {step.piece.pair: step.waiting is None for step in self._steps if step.piece.part is not None}
            written = [*(model[i] for i in parts), *(ema[i] for i, both in parts.items() if both)]
            torch.autograd.graph.increment_version([each for each in written if not each.is_inference()])

    def _take(self, step: _Step, call: Call, ema: Tensors, model: Tensors, done: int) -> None:
        """Exchanges one piece, or undoes that, and counts it. An interrupt leaves both done or neither."""
        i = step.piece.pair
        average = ema[i] if call.average <= 0 else nth_average(ema[i], step.stride, call.average)
        e, p = step.piece.of(average), step.piece.of(model[i])
        old_e, old_p = e.clone(), p.clone()
        before = self.done
        try:
            if step.waiting is None:
                e.copy_(old_p)
                p.copy_(old_e)
            else:
                memory = dict(zip(self._sizes, call.scratch, strict=True))[p.device]
                values = memory[step.waiting].view(p.dtype).view(p.shape)
                if call.op == "swap":
                    values.copy_(p)
                p.copy_(e if call.op == "swap" else values)
            self.done = done
        except BaseException:
            e.copy_(old_e)
            p.copy_(old_p)
            self.done = before
            raise
