"""The weighted sum of one piece of a tensor, in float64, rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._build.library import load

PIECE = 1 << 16  # elements; the buffers of a thread fit its core's cache
_BLOCK = (1 << 15) - 2048  # what PyTorch is given at a time: from 1 << 15 on it spreads some work over threads


class Sum:
    """Buffers for the sum of pieces; each thread has its own."""

    def __init__(self) -> None:
        self._total = torch.empty(PIECE, dtype=torch.float64)
        self._term = torch.empty(_BLOCK, dtype=torch.float64)
        self._narrow = torch.empty(_BLOCK, dtype=torch.float32)

    def write(self, parts: Iterable[Tensor], weights: Sequence[float], out: Tensor) -> bool:
        """out ← the sum of weights[k] * parts[k], rounded once. Returns whether all of `out` is finite.

        Equivalent to ``out.copy_(sum(w * x.double() for w, x in zip(weights, parts)))`` with a copy that rounds once:
        products and sums are rounded to float64, in this order, on any machine.

        Args:
            parts: of one floating type and one dimension, at most PIECE elements. Each is used before the next is asked
                for, so that all may be in one buffer.
            out: of their type and size.
        """
        compiled: Any = load()
        total = self._total[: out.numel()]
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            if compiled:
                compiled.add_weighted(total, part, weight, k == 0)
            else:
                self._add(total, part, weight, k == 0)
        if compiled:
            return compiled.round_sum(total, out)  # type: ignore[no-any-return]
        for block, to in zip(torch.split(total, _BLOCK), torch.split(out, _BLOCK), strict=True):
            round_once(block, to, self._term[: len(to)], self._narrow[: len(to)])
        return bool(out.isfinite().all())

    def _add(self, total: Tensor, part: Tensor, weight: float, first: bool) -> None:
        for to, values in zip(torch.split(total, _BLOCK), torch.split(part, _BLOCK), strict=True):
            term = self._term[: len(to)].copy_(values)
            if first:
                torch.mul(term, weight, out=to)
            else:
                to.add_(term.mul_(weight))  # not add_(alpha=...), which may fuse the two


_CUT = (1 << 29) - 1  # what a float64 has beyond the 23 bits of a float32's fraction


def round_once(total: Tensor, out: Tensor, scratch: Tensor, narrow: Tensor) -> None:
    """out ← total, rounded to nearest even.

    PyTorch rounds float64 to float32 before it rounds to 16 bits, which differs from one rounding where the float32 is
    halfway between two 16-bit numbers and the float64 is not. So the bits that do not fit a float32 are cut off first,
    and the last one that fits is set if any of them was ("rounding to odd"), which never gives such a halfway point.

    Args:
        scratch, narrow: memory of total's size, in float64 and float32.
    """
    if out.element_size() != 2:
        out.copy_(total)
        return
    bits, odd = total.view(torch.int64), scratch.view(torch.int64)
    torch.bitwise_and(bits, _CUT, out=odd)
    odd.add_(_CUT).bitwise_or_(bits).bitwise_and_(~_CUT)
    out.copy_(narrow.copy_(scratch))  # in two steps, which PyTorch vectorizes
    if out.dtype == torch.bfloat16:  # as small as float32's subnormals, which have fewer bits
        magnitudes = out.view(torch.int16) & 0x7FFF
        if magnitudes.amin() <= 0x80 and (small := (magnitudes <= 0x80) & (total != 0)).any():
            values = total[small]
            units = values.abs() * 2.0**149  # in float32's smallest number
            floor = units.floor()
            last = (units != floor) & (floor % 2 == 0)
            out[small] = ((floor + last) * 2.0**-149).copysign(values).to(out.dtype)
