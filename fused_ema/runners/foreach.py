"""The runner on PyTorch's own multi-tensor operations: fast wherever PyTorch runs, with no compiler.

It keeps the one-step bound of docs/numerics.md, not the kernels' bits. Pairs of one type are averaged in place, by
`torch._foreach_lerp_`. Pairs of two types go through scratch memory of the wider type, a few megabytes at a time. What
is rare is computed in float64 by reference.py.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..pairs.checks import Action
from ..pairs.memory import extent, nth_average
from .base import Call, Job, Watch
from .in_python import PreparedInPython
from .reference import update_

Part: TypeAlias = tuple[int | slice, ...]

# Bytes of scratch memory of one update: what stays in the CPU's caches, and what hides a launch on a device.
SCRATCH_CPU, SCRATCH_DEVICE = 4 << 20, 64 << 20


class Foreach:
    """`torch._foreach_lerp_` and `torch._foreach_copy_` on lists of tensors."""

    name = "foreach"

    def backend(self, device_type: str) -> str:
        return "torch"

    def why_not(self, device_type: str) -> str | None:
        return None

    def prepare(self, job: Job, watch: Watch | None) -> PreparedForeach:
        return PreparedForeach(job, watch)


class Piece(NamedTuple):
    """A pair, or a part of one that is too large to be handled at once."""

    pair: int
    flat: bool  # both sides are first seen in one dimension
    part: Part | None  # None: the whole pair
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        if self.part is None:
            return torch.view_as_real(tensor) if tensor.is_complex() else tensor
        tensor = _reals(tensor.data)  # autograd would count a change for each part
        return (tensor.as_strided((tensor.numel(),), (1,)) if self.flat else tensor)[self.part]

    def numel(self) -> int:
        return math.prod(self.shape)


class _Same(NamedTuple):
    """Pairs of one type on one device, whose strides are equal (which PyTorch's fused kernels need), or are not."""

    pairs: list[int]
    complex: bool

    def update(self, ema: list[Tensor], model: list[Tensor], decay: float) -> None:
        e, p = ([side[i] for i in self.pairs] for side in (ema, model))
        if self.complex:
            e, p = list(map(torch.view_as_real, e)), list(map(torch.view_as_real, p))
        _lerp(e, p, decay)

    def operations(self) -> int:
        return len(self.pairs)


class _Mixed:
    """Pairs of two types on one device, in rounds that each fill the scratch memory."""

    def __init__(self, ema: Tensor, model: Tensor) -> None:
        types = [_reals(side).dtype for side in (ema, model)]
        self.type = torch.float64 if torch.float64 in types else torch.float32
        self.device = ema.device
        self._cast_ema = types[0] != self.type
        self._cast_model = types[1] != self.type or model.device != ema.device
        self.most = _scratch_bytes(self.device) // self.type.itemsize // (self._cast_ema + self._cast_model)
        self._rounds: list[list[Piece]] = []
        self._filled = self.most
        self._fullest = 0

    def add(self, piece: Piece) -> None:
        if self._filled + piece.numel() > self.most:
            self._rounds.append([])
            self._filled = 0
        self._rounds[-1].append(piece)
        self._filled += piece.numel()
        self._fullest = max(self._fullest, self._filled)

    def update(self, ema: list[Tensor], model: list[Tensor], decay: float, scratch: Tensor) -> None:
        memory = scratch.view(self.type)
        for pieces in self._rounds:
            e, p = ([piece.of(side[piece.pair]) for piece in pieces] for side in (ema, model))
            if self._cast_model:
                torch._foreach_copy_(y := _views(memory, pieces), p)
            if self._cast_ema:
                torch._foreach_copy_(x := _views(memory[-self._fullest :], pieces), e)
            _lerp(x if self._cast_ema else e, y if self._cast_model else p, decay)
            if self._cast_ema:
                torch._foreach_copy_(e, x)

    def scratch(self) -> int:
        """Bytes that an update needs."""
        return self._fullest * self.type.itemsize * (self._cast_ema + self._cast_model)

    def operations(self) -> int:
        return sum(map(len, self._rounds)) * (1 + self._cast_model + 2 * self._cast_ema)


def _views(memory: Tensor, pieces: list[Piece]) -> list[Tensor]:
    sizes = [piece.numel() for piece in pieces]
    views = torch.split(memory[: sum(sizes)], sizes)
    return [view.view(piece.shape) for view, piece in zip(views, pieces, strict=True)]


def _lerp(ema: list[Tensor], model: list[Tensor], decay: float) -> None:
    """Multiplies the difference by the smaller of the two weights, as csrc/lerp.h does, which the bound needs."""
    if 1 - decay < 0.5:
        torch._foreach_lerp_(ema, model, 1 - decay)
        return
    for e, p in zip(ema, model, strict=True):
        torch.lerp(p, e, decay, out=e)  # _foreach_lerp_ would subtract a rounded weight from 1


class _Exchange(NamedTuple):
    """What an exchange does at a time, and undoes at a time."""

    piece: Piece
    stride: int
    scratch: slice | None  # of its device's scratch memory, where the types differ


class PreparedForeach(PreparedInPython):
    """See `Prepared`."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        super().__init__(job, watch)
        self._averages, self._strides = job.averages, job.strides
        self._active = [i for i, action in enumerate(job.actions) if action is not Action.NONE]
        self._averaged = [i for i in self._active if job.actions[i] is Action.AVERAGE]
        self._copies = _by_device(job, [i for i in self._active if job.actions[i] is Action.COPY])
        self._copies_of_all = _by_device(job, self._active)
        self._same: dict[tuple[object, ...], _Same] = {}
        self._mixed: dict[tuple[object, ...], _Mixed] = {}
        self._in_parts: list[int] = []
        self._numbers: list[int] = []  # of the first elements, for the random bits, as csrc/plan.cpp counts them
        self._exchanges: list[_Exchange] = []
        self._sizes: Counter[torch.device] = Counter()
        number = 0
        for i in self._active:
            self._numbers.append(number)
            number += 2 * job.ema[i].numel()
            if job.actions[i] is Action.AVERAGE:
                self._group(i, job.ema[i], job.model[i])
            self._add_exchanges(i, job.ema[i], job.model[i])
        self._exact = all(_lerp_is_fused() or job.ema[i].device.type != "cpu" for i in self._averaged)

    def _group(self, i: int, ema: Tensor, model: Tensor) -> None:
        alike = ema.dtype == model.dtype and ema.device == model.device
        key = (ema.dtype, model.dtype, ema.device, model.device, alike and ema.stride() == model.stride())
        if alike:
            self._same.setdefault(key, _Same([], ema.is_complex())).pairs.append(i)
            return
        mixed = self._mixed.setdefault(key, _Mixed(ema, model))
        pieces = list(_pieces(i, ema, model, mixed.most))
        if len(pieces) > 1 and not ema.is_inference():
            self._in_parts.append(i)
        for piece in pieces:
            mixed.add(piece)

    def _add_exchanges(self, i: int, ema: Tensor, model: Tensor) -> None:
        size = max(ema.element_size(), model.element_size())
        for piece in _pieces(i, ema, model, _scratch_bytes(model.device) // size):
            scratch = None
            if ema.dtype != model.dtype:
                begin = self._sizes[model.device]
                scratch = slice(begin, begin + piece.numel() * _reals(model).element_size())
                self._sizes[model.device] = (scratch.stop + 15) // 16 * 16
            self._exchanges.append(_Exchange(piece, self._strides[i], scratch))

    def launches(self) -> int:
        operations = sum(map(_Same.operations, self._same.values())) + sum(map(_Mixed.operations, self._mixed.values()))
        return self._averages * (operations + sum(map(len, self._copies)))

    def scratch(self) -> list[tuple[torch.device, int]]:
        return list(self._sizes.items())

    def mark_exchanged(self) -> None:
        self._exchanged = len(self._exchanges)

    def _run(self, call: Call, tensors: list[Tensor]) -> None:
        half = len(tensors) // 2
        ema, model = tensors[:half], tensors[half:]
        if call.op in ("swap", "restore"):
            return self._exchange_all(call, ema, model)
        averages = range(len(call.decays)) if call.average < 0 else [call.average]
        for position, k in enumerate(averages):
            nth = ema if k <= 0 else self._nth(ema, k)
            if call.op == "copy":
                self._copy(self._copies_of_all, nth, model)
            elif call.device_decays is not None:
                self._slowly(nth, model, call.device_decays.reshape(-1)[position])
            elif call.op == "update_stochastic":
                self._slowly(nth, model, call.decays[position], call.keys[position])
            else:
                self._update(nth, model, call.decays[position])

    def _nth(self, ema: list[Tensor], k: int) -> list[Tensor]:
        nth = list(ema)
        for i in self._active:
            nth[i] = nth_average(ema[i], self._strides[i], k)
        return nth

    def _update(self, ema: list[Tensor], model: list[Tensor], decay: float) -> None:
        if decay == 1:
            return
        if decay == 0:
            return self._copy(self._copies_of_all, ema, model)
        if not self._exact:
            return self._slowly(ema, model, decay)
        scratch = self._update_scratch()  # before anything is written
        for same in self._same.values():
            same.update(ema, model, decay)
        for mixed in self._mixed.values():
            mixed.update(ema, model, decay, scratch[mixed.device])
        self._copy(self._copies, ema, model)
        if self._in_parts:
            torch.autograd.graph.increment_version([ema[i] for i in self._in_parts])

    def _update_scratch(self) -> dict[torch.device, Tensor]:
        sizes: dict[torch.device, int] = {}
        for mixed in self._mixed.values():
            sizes[mixed.device] = max(sizes.get(mixed.device, 0), mixed.scratch())
        return {
            device: _cpu_scratch()[:size]
            if device.type == "cpu"
            else torch.empty(size, dtype=torch.uint8, device=device)
            for device, size in sizes.items()
        }

    def _copy(self, groups: list[list[int]], ema: list[Tensor], model: list[Tensor]) -> None:
        for pairs in groups:
            torch._foreach_copy_([ema[i] for i in pairs], [model[i] for i in pairs])

    def _slowly(self, ema: list[Tensor], model: list[Tensor], decay: float | Tensor, key: int | None = None) -> None:
        averaged = set(self._averaged)
        for i, number in zip(self._active, self._numbers, strict=True):
            random = None if key is None else (key, number)
            update_(ema[i], model[i], decay, average=i in averaged, random=random)

    def _exchange_all(self, call: Call, ema: list[Tensor], model: list[Tensor]) -> None:
        if call.op == "swap":
            for done, each in enumerate(self._exchanges):
                self._exchange(each, call, ema, model, done + 1)
        while call.op == "restore" and self._exchanged:
            self._exchange(self._exchanges[self._exchanged - 1], call, ema, model, self._exchanged - 1)

    def _exchange(self, each: _Exchange, call: Call, ema: list[Tensor], model: list[Tensor], done: int) -> None:
        """Exchanges one piece, or undoes that, and counts it. An interrupt leaves both done or neither."""
        i = each.piece.pair
        average = ema[i] if call.average <= 0 else nth_average(ema[i], each.stride, call.average)
        e, p = each.piece.of(average), each.piece.of(model[i])
        old_e, old_p = e.clone(), p.clone()
        before = self._exchanged
        try:
            if each.scratch is None:
                e.copy_(old_p)
                p.copy_(old_e)
            else:
                memory = {memory.device: memory for memory in call.scratch}[p.device]
                waiting = memory[each.scratch].view(p.dtype).view(p.shape)
                if call.op == "swap":
                    waiting.copy_(p)
                p.copy_(e if call.op == "swap" else waiting)
            self._exchanged = done
        except BaseException:
            e.copy_(old_e)
            p.copy_(old_p)
            self._exchanged = before
            raise


def _pieces(i: int, ema: Tensor, model: Tensor, most: int) -> Iterator[Piece]:
    """Cuts a pair into pieces of at most `most` elements; an element of a complex tensor counts as two."""
    ema, model = _reals(ema), _reals(model)
    if ema.numel() <= most:
        yield Piece(i, False, None, tuple(ema.shape))
        return
    contiguous = ema.is_contiguous() and model.is_contiguous()
    dense = contiguous or (ema.stride() == model.stride() and extent(ema) == ema.numel())
    for part, shape in _parts((ema.numel(),) if dense else tuple(ema.shape), most):
        yield Piece(i, dense, part, shape)


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


def _by_device(job: Job, pairs: list[int]) -> list[list[int]]:
    """The pairs in lists that PyTorch copies in few launches: of one device and two types, equal in strides or not."""
    lists: dict[object, list[int]] = defaultdict(list)
    for i in pairs:
        ema, model = job.ema[i], job.model[i]
        lists[ema.device, model.device, ema.dtype, model.dtype, ema.stride() == model.stride()].append(i)
    return list(lists.values())


def _reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _scratch_bytes(device: torch.device) -> int:
    return SCRATCH_CPU if device.type == "cpu" else SCRATCH_DEVICE


def _scratch(device: torch.device, size: int) -> Tensor:
    """New at each call on a device: PyTorch's allocator then takes care of streams and of captured graphs."""
    return _cpu_scratch()[:size] if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)


@functools.cache
def _cpu_scratch() -> Tensor:
    """One for the process: only one update runs at a time."""
    return torch.empty(SCRATCH_CPU, dtype=torch.uint8)


@functools.cache
def _lerp_is_fused() -> bool:
    """Whether this CPU's lerp rounds once. Of 1 + 2**-11 + 2**-24 - 1, two roundings lose the last term."""
    x = 1 + 2.0**-12
    moved = torch.full((64,), -1.0).lerp_(torch.full((64,), 4 * x - 1), x / 4)
    return bool((moved == 2.0**-11 + 2.0**-24).all())
