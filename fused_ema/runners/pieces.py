"""Cuts pairs of tensors that are too large for the scratch memory into pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..pairs.memory import extent

Part: TypeAlias = tuple[int | slice, ...]


class Piece(NamedTuple):
    """A pair, or a part of one. A complex tensor is seen as a real one with a last dimension of 2."""

    pair: int
    part: Part | None  # None: the whole pair
    flat: bool  # whether the part is a range of each side's memory, in one dimension
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of one side. Writing to a part does not raise the version counter: the writer has to."""
        if self.part is None:
            return reals(tensor)
        tensor = reals(tensor.data)
        return (tensor.as_strided((tensor.numel(),), (1,)) if self.flat else tensor)[self.part]

    def numel(self) -> int:
        return math.prod(self.shape)


def pieces(pair: int, ema: Tensor, model: Tensor, most: int) -> Iterator[Piece]:
    """Cuts a pair into pieces of at most `most` elements."""
    ema, model = reals(ema), reals(model)
    if ema.numel() <= most:
        yield Piece(pair, None, False, tuple(ema.shape))
        return
    contiguous = ema.is_contiguous() and model.is_contiguous()
    flat = contiguous or (ema.stride() == model.stride() and extent(ema) == ema.numel())
    for part, shape in _parts((ema.numel(),) if flat else tuple(ema.shape), most):
        yield Piece(pair, part, flat, shape)


def reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _parts(shape: tuple[int, ...], most: int) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """Indices that cut an array into parts of at most `most` elements, with the shape of each part."""
    if math.prod(shape) <= most:
        yield (), shape
        return
    size, inner = shape[0], math.prod(shape[1:])
    if inner > most:
        for i in range(size):
            for part, rest in _parts(shape[1:], most):
                yield (i, *part), rest
        return
    step = most // inner
    for begin in range(0, size, step):
        end = min(begin + step, size)
        yield (slice(begin, end),), (end - begin, *shape[1:])
