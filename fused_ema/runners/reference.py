"""The pure-PyTorch runner: runs where no kernel does, and is the oracle of the tests.

It keeps the one-step bound of the numeric contract, not the kernels' bits: arithmetic in float64, rounded once (in
float32 on MPS, which has no float64).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs import shards
from ..pairs.checks import Action
from ..pairs.memory import has_address, nth_average, place
from .base import Call, Job, Prepared, Tensors, Watch, one_at_a_time

CALLS_PER_AVERAGE = 7  # PyTorch operations, so launches on a device
CALLS_PER_COPY = 1
_BLOCK = 1 << 16  # elements


class Reference:
    """One pair after the other, by PyTorch's own operations."""

    name = "reference"

    def backend(self, device_type: str) -> str:
        return "torch"

    def why_not(self, device_type: str) -> str | None:
        return None

    def prepare(self, job: Job, watch: Watch | None) -> Prepared:
        return _Pairs(job, watch)


class _Row(NamedTuple):
    """What is known of a pair before any call."""

    pair: int
    average: bool  # False: copied
    stride: int
    number: int  # of its first element among all, for the random bits
    scratch: slice | None  # of its device's scratch memory, where the types differ


class _Pairs:
    """See `Prepared`."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        self._averages = job.averages
        self._rows: list[_Row] = []
        self._sizes: Counter[torch.device] = Counter()
        number = 0
        for pair, (ema, model, action, stride) in enumerate(
            zip(job.ema, job.model, job.actions, job.strides, strict=True)
        ):
            if action is not Action.NONE:
                scratch = None
                if ema.dtype != model.dtype:
                    begin = self._sizes[model.device]
                    scratch = slice(begin, begin + model.numel() * model.element_size())
                    self._sizes[model.device] = (scratch.stop + 15) // 16 * 16
                self._rows.append(_Row(pair, action is Action.AVERAGE, stride, number, scratch))
                number += 2 * ema.numel()  # as csrc/plan.cpp counts: a complex element has two
        tensors = [*job.ema, *job.model]
        self._records = list(map(_record, tensors))
        self._inference = [any(map(Tensor.is_inference, side)) for side in (job.ema, job.model)]
        self._watch = watch
        place = {id(shards.local(value)): i for i, value in enumerate((watch and watch.values()) or ())}
        self._places = [place.get(id(tensor), -1) for tensor in tensors]  # among the watched values
        self._exchanged = 0  # rows that a swap has done and no restore has undone

    def launches(self) -> int:
        averaged = sum(row.average for row in self._rows)
        return self._averages * (averaged * CALLS_PER_AVERAGE + (len(self._rows) - averaged) * CALLS_PER_COPY)

    def scratch(self) -> list[tuple[torch.device, int]]:
        return list(self._sizes.items())

    def current(self) -> bool:
        watched = self._watched()
        return watched is not None and self._fits(list(map(shards.local, watched)))

    def exchanged(self) -> bool:
        return self._exchanged > 0

    def mark_exchanged(self) -> None:
        self._exchanged = len(self._rows)

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        writes_model = call.op in ("swap", "restore")
        with one_at_a_time(), torch.no_grad():
            whole = self._watched() if ema is None or model is None else [*ema, *model]
            if whole is None:
                return False
            if not torch.is_inference_mode_enabled() and any(self._inference[: 2 if writes_model else 1]):
                return False  # a new plan raises the error
            tensors = list(map(shards.local, whole))
            if not self._fits(tensors):
                return False
            self._run(call, tensors)
            shards.written(whole if writes_model else whole[: len(whole) // 2])
        return True

    def _watched(self) -> Tensors | None:
        """The tensors that the watched sources hold. None where those have changed, or held others from the start,
        since another thread replaced some before they were paired."""
        values = self._watch.values() if self._watch and -1 not in self._places else None
        return None if values is None else [values[place] for place in self._places]

    def _fits(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._records) and list(map(_record, tensors)) == self._records

    def _run(self, call: Call, tensors: list[Tensor]) -> None:
        half = len(tensors) // 2
        if call.op == "restore":
            while self._exchanged:
                row = self._rows[self._exchanged - 1]
                ema, model = self._average(row, tensors, call.average), tensors[half + row.pair]
                self._exchange(row, ema, model, call, self._exchanged - 1)
            return
        averages = range(len(call.decays)) if call.average < 0 else [call.average]
        decays = call.decays if call.device_decays is None else call.device_decays.reshape(-1).unbind()
        for done, row in enumerate(self._rows):
            model = tensors[half + row.pair]
            for position, k in enumerate(averages):
                ema = self._average(row, tensors, k)
                if call.op == "swap":
                    self._exchange(row, ema, model, call, done + 1)
                elif call.op == "copy":
                    ema.copy_(model)
                else:
                    random = (call.keys[position], row.number) if call.op == "update_stochastic" else None
                    update_(ema, model, decays[position], average=row.average, random=random)

    def _average(self, row: _Row, tensors: list[Tensor], k: int) -> Tensor:
        first = tensors[row.pair]
        return first if k <= 0 else nth_average(first, row.stride, k)

    def _exchange(self, row: _Row, ema: Tensor, model: Tensor, call: Call, done: int) -> None:
        """Exchanges one pair, or undoes that, and counts it. An interrupt leaves both done or neither."""
        old_ema, old_model = ema.clone(), model.clone()
        before = self._exchanged
        try:
            if row.scratch is None:
                ema.copy_(old_model)
                model.copy_(old_ema)
            else:
                memory = {each.device: each for each in call.scratch}[model.device]
                waiting = memory[row.scratch].view(model.dtype).view(model.shape)
                if call.op == "swap":
                    waiting.copy_(model)
                model.copy_(ema if call.op == "swap" else waiting)
            self._exchanged = done
        except BaseException:
            ema.copy_(old_ema)
            model.copy_(old_model)
            self._exchanged = before
            raise


def _record(tensor: Tensor) -> tuple[object, ...]:
    """A record that stays equal as long as the tensor keeps its type and its memory."""
    size = tensor.untyped_storage().nbytes() if has_address(tensor) else 0
    return (type(tensor), *place(tensor), tensor.device, size, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())


@torch.no_grad()
def update_(
    ema: Tensor, model: Tensor, decay: float | Tensor, *, average: bool, random: tuple[int, int] | None = None
) -> None:
    """ema ← decay * ema + (1 - decay) * model, or the copy that goes with it, in place; decay in [0, 1].

    `random`: the key and the first number of the random bits, where 16-bit averages are rounded stochastically.
    """
    if isinstance(decay, Tensor):
        return _update_on_device_(ema, model, decay, average)  # rounds to nearest
    if decay == 1:
        return
    if decay == 0 or not average:
        ema.copy_(model)
        return
    weight = 1 - decay
    if random:  # the numbers follow the average's memory
        strides = ema.stride()
        order = sorted(range(ema.dim()), key=lambda d: -strides[d])
        ema, model = ema.permute(order), model.permute(order)
    # Written through .data, since autograd would count a change for each block.
    at = 0
    for e, p in _blocks(_reals(ema.data), _reals(model)):
        difference = p.to(_compute_type(e)).sub(e)
        moved = difference.mul(weight).add_(e) if weight < 0.5 else difference.mul(-decay).add_(p)
        moved = torch.where(e == p, e.to(moved.dtype), moved)
        if random and e.element_size() == 2:
            moved = round_stochastically(moved.float(), e.dtype, random[0], random[1] + at)
        e.copy_(moved)
        at += e.numel()
    if not ema.is_inference():
        torch.autograd.graph.increment_version(ema)


def _update_on_device_(ema: Tensor, model: Tensor, decay: Tensor, average: bool) -> None:
    """Does what `update_` does, with a decay that the host does not know."""
    if not average:
        ema.copy_(torch.where(decay == 1, ema, model.to(ema.dtype)))
        return
    ema, model = _reals(ema), _reals(model)
    decay = decay.to(_compute_type(ema))
    weight = 1 - decay
    old, new = ema.to(decay.dtype), model.to(decay.dtype)
    difference = new - old
    moved = torch.where(weight < 0.5, difference * weight + old, difference * -decay + new)
    moved = torch.where((old == new) | (decay == 1), old, moved)
    ema.copy_(torch.where(decay == 0, new, moved))


def round_stochastically(values: Tensor, dtype: torch.dtype, key: int, number: int) -> Tensor:
    """float32 → bfloat16 or float16, up or down at random: the formulas of csrc/lerp.h on its random bits."""
    numbers = torch.arange(number, number + values.numel(), device=values.device).view(values.shape)
    inner = _mix((numbers & _MASK) ^ (key & _MASK))
    random = _mix((inner + (key >> 32) + (numbers >> 32) * 0x9E3779B9) & _MASK)
    if dtype == torch.bfloat16:
        raised = (values.view(torch.int32).to(torch.int64) & _MASK) + (random >> 16)
        bits = (raised >> 16).to(torch.int32)
        cut = (bits << 16).view(torch.float32)
    else:
        share = random >> 19
        magnitude = values.abs().view(torch.int32).to(torch.int64)
        normal = ((magnitude + share) >> 13 << 13).to(torch.int32).view(torch.float32)
        units = values.abs().double() * 2.0**24 + share.double() * 2.0**-13
        cut = torch.where(values.abs() < 2.0**-14, (units.floor() * 2.0**-24).float(), normal)
        cut = torch.where(cut >= 2.0**16, torch.inf, cut).copysign(values)
    return torch.where(values.isfinite(), cut, values).to(dtype)


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ x >> 16) * 0x7FEB352D) & _MASK
    x = ((x ^ x >> 15) * 0x846CA68B) & _MASK
    return x ^ x >> 16


def _blocks(ema: Tensor, model: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The pair in pieces whose float64 temporaries stay in the CPU's caches."""
    if ema.device.type == "cpu" and ema.is_contiguous() and model.is_contiguous():
        return zip(torch.split(ema.view(-1), _BLOCK), torch.split(model.view(-1), _BLOCK), strict=True)
    return [(ema, model)]


def _reals(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _compute_type(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
