"""The runner on PyTorch's own multi-tensor operations: fast wherever PyTorch runs, with no compiler.

It keeps the one-step bound of docs/numerics.md, not the kernels' bits. Pairs of one type are averaged in place, by
`torch._foreach_lerp_`. Pairs of two types go through scratch memory of the wider type, a few megabytes at a time. What
is rare is computed in float64, by reference.py.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..pairs.checks import Action
from ..pairs.memory import nth_average
from .base import Call, Job, Tensors, Watch
from .exchange import Exchange
from .in_python import PreparedInPython, getter
from .pieces import Piece, pieces, reals
from .reference import finish, update_

# Bytes of scratch memory of an update: what stays in the CPU's caches, and what hides a launch on a device.
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


class PreparedForeach(PreparedInPython):
    """See `Prepared`."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        super().__init__(job, watch)
        self._averages, self._strides = job.averages, job.strides
        self._active = [i for i, action in enumerate(job.actions) if action is not Action.NONE]
        self._copied = [i for i in self._active if job.actions[i] is Action.COPY]
        self._pick_copied, self._pick_all = (
            [getter(pairs) for pairs in _alike(job, each)] for each in (self._copied, self._active)
        )
        self._groups = _groups(job, [i for i in self._active if job.actions[i] is Action.AVERAGE])
        self._numbers: dict[int, int] = {}  # of the first elements, for the random bits, as csrc/plan.cpp counts them
        number = 0
        for i in self._active:
            self._numbers[i] = number
            number += 2 * job.ema[i].numel()
        self._scratch_bytes: dict[torch.device, int] = {}
        for group in self._groups:
            if size := group.scratch_bytes():
                self._scratch_bytes[group.device] = max(size, self._scratch_bytes.get(group.device, 0))
        devices = {tensor.device for tensor in job.model}
        self._exchange = Exchange(job, min(map(_scratch_bytes, devices), default=0) // 2)

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
        averages = range(len(call.decays)) if call.average < 0 else [call.average]
        for position, k in enumerate(averages):
            nth = ema if k <= 0 else self._nth(ema, k)
            if call.op == "copy":
                _copy(self._pick_all, nth, model)
            elif call.device_decays is None:
                self._update(nth, model, call.decays[position], call.keys[position] if call.keys else None)
            else:
                self._update_on_device(nth, model, call.device_decays.reshape(-1)[position])

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
        scratch = {device: _scratch(device, size) for device, size in self._scratch_bytes.items()}
        for group in self._groups:
            if group.exact and (key is None or not group.narrow):
                group.update(ema, model, decay, scratch)
                continue
            for i in group.pairs:
                random = None if key is None else (key, self._numbers[i])
                update_(ema[i], model[i], decay, average=True, random=random)
        _copy(self._pick_copied, ema, model)

    def _update_on_device(self, ema: Tensors, model: Tensors, decay: Tensor) -> None:
        for group in self._groups:
            for i in group.pairs:
                update_(ema[i], model[i], decay, average=True)
        for i in self._copied:
            update_(ema[i], model[i], decay, average=False)


class _Group:
    """Pairs that are averaged together: of the same types, on the same devices."""

    def __init__(self, job: Job, pairs: list[int]) -> None:
        first = job.ema[pairs[0]]
        self.pairs = pairs
        self.device = first.device
        self.narrow = first.element_size() == 2
        self.exact = first.device.type != "cpu" or _lerp_is_fused()
        self._complex = first.is_complex()
        self._pick = getter(pairs)

    def scratch_bytes(self) -> int:
        """What an update needs."""
        return 0

    def operations(self) -> int:
        """Operations on single tensors in an update."""
        return len(self.pairs)

    def update(self, ema: Tensors, model: Tensors, decay: float, scratch: dict[torch.device, Tensor]) -> None:
        e, p = self._pick(ema), self._pick(model)
        if self._complex:
            e, p = list(map(torch.view_as_real, e)), list(map(torch.view_as_real, p))
        _lerp(e, p, decay)


class _CastGroup(_Group):
    """Two types, or two devices: goes through scratch memory, in rounds that fill it."""

    def __init__(self, job: Job, pairs: list[int]) -> None:
        super().__init__(job, pairs)
        ema, model = job.ema[pairs[0]], job.model[pairs[0]]
        types = reals(ema).dtype, reals(model).dtype
        self._type = torch.float64 if torch.float64 in types else torch.float32
        self._cast_ema = types[0] != self._type
        self._cast_model = types[1] != self._type or model.device != ema.device
        most = _scratch_bytes(self.device) // self._type.itemsize // (self._cast_ema + self._cast_model)
        self._rounds: list[list[Piece]] = []
        self._fullest, filled = 0, most
        for i in pairs:
            for piece in pieces(i, job.ema[i], job.model[i], most):
                if filled + piece.numel() > most:
                    self._rounds.append([])
                    filled = 0
                self._rounds[-1].append(piece)
                filled += piece.numel()
                self._fullest = max(self._fullest, filled)
        in_parts = {piece.pair for each in self._rounds for piece in each if piece.part is not None}
        self._in_parts = [i for i in in_parts if not job.ema[i].is_inference()]

    def scratch_bytes(self) -> int:
        return self._fullest * self._type.itemsize * (self._cast_ema + self._cast_model)

    def operations(self) -> int:
        return sum(map(len, self._rounds)) * (1 + self._cast_model + 2 * self._cast_ema)

    def update(self, ema: Tensors, model: Tensors, decay: float, scratch: dict[torch.device, Tensor]) -> None:
        memory = scratch[self.device][: self.scratch_bytes()].view(self._type)

        def run(done: list[object]) -> None:
            for each in self._rounds[len(done) :]:
                e, p = ([piece.of(side[piece.pair]) for piece in each] for side in (ema, model))
                x = _views(memory[-self._fullest :], each) if self._cast_ema else e
                y = _views(memory, each) if self._cast_model else p
                if self._cast_model:
                    torch._foreach_copy_(y, p)
                if self._cast_ema:
                    torch._foreach_copy_(x, e)
                    _lerp(x, y, decay)
                    done.extend(map(torch._foreach_copy_, [e], [x]))
                elif decay >= 0.5:
                    done.extend(map(torch._foreach_lerp_, [e], [y], [1 - decay]))
                else:
                    for average, parameter in zip(e, y, strict=True):
                        torch.lerp(parameter, average, decay, out=parameter)
                    done.extend(map(torch._foreach_copy_, [e], [y]))

        finish(run)
        if self._in_parts:
            torch.autograd.graph.increment_version([ema[i] for i in self._in_parts])


def _groups(job: Job, averaged: list[int]) -> list[_Group]:
    groups = []
    for pairs in _alike(job, averaged):
        ema, model = job.ema[pairs[0]], job.model[pairs[0]]
        kind = _Group if (ema.dtype, ema.device) == (model.dtype, model.device) else _CastGroup
        groups.append(kind(job, pairs))
    return groups


def _alike(job: Job, pairs: Iterable[int]) -> list[list[int]]:
    """The pairs in lists that PyTorch handles in few launches: of one device and two types, equal in strides or not."""
    lists: dict[object, list[int]] = defaultdict(list)
    for i in pairs:
        ema, model = job.ema[i], job.model[i]
        lists[ema.device, model.device, ema.dtype, model.dtype, ema.stride() == model.stride()].append(i)
    return list(lists.values())


def _lerp(ema: Any, model: Any, decay: float) -> None:
    """Multiplies the difference by the smaller of the two weights, as csrc/lerp.h does, which the bound needs."""
    if decay >= 0.5:
        torch._foreach_lerp_(ema, model, 1 - decay)
        return
    for e, p in zip(ema, model, strict=True):
        torch.lerp(p, e, decay, out=e)  # _foreach_lerp_ would subtract a rounded weight from 1


def _copy(picks: list[Callable[[Tensors], Any]], ema: Tensors, model: Tensors) -> None:
    for pick in picks:
        torch._foreach_copy_(pick(ema), pick(model))


def _views(memory: Tensor, each: list[Piece]) -> list[Tensor]:
    sizes = [piece.numel() for piece in each]
    return [view.view(piece.shape) for view, piece in zip(memory[: sum(sizes)].split(sizes), each, strict=True)]  # type: ignore[no-untyped-call]


def _scratch_bytes(device: torch.device) -> int:
    return SCRATCH_CPU if device.type == "cpu" else SCRATCH_DEVICE


def _scratch(device: torch.device, size: int) -> Tensor:
    """New at each call on a device: PyTorch's allocator then takes care of streams and of captured graphs."""
    return _cpu_scratch()[:size] if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)


@functools.cache
def _cpu_scratch() -> Tensor:
    """One for the process: only one update runs at a time."""
    with torch.inference_mode(False):
        return torch.empty(SCRATCH_CPU, dtype=torch.uint8, device="cpu")


@functools.cache
def _lerp_is_fused() -> bool:
    """Whether this CPU's lerp rounds once. Of 1 + 2**-11 + 2**-24 - 1, two roundings lose the last term."""
    x = 1 + 2.0**-12
    e, p = (torch.full((64,), value, dtype=torch.float32, device="cpu") for value in (-1.0, 4 * x - 1))
    moved = e.lerp_(p, x / 4)
    return bool((moved == 2.0**-11 + 2.0**-24).all())
