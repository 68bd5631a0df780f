"""One pair averaged in float64: the oracle of the tests, and what runs where torch._foreach_lerp_ can't.

It keeps the one-step bound of the numeric contract, not the kernels' bits: arithmetic in float64, rounded once. Devices
that may have no float64, such as MPS and XPU, compute in float32 what has 32 bits or fewer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pairs.memory import extent
from .pieces import pieces, reals

# Elements computed at a time: few enough for the CPU's caches; on a device, enough to hide a launch.
_BLOCK_CPU, _BLOCK_DEVICE = 1 << 16, 1 << 22


def finish(run: Callable[[list[object]], None]) -> None:
    """Runs work that has several parts to its end even if it is interrupted, so that no tensor stays half done.

    `run` goes on after the parts that the list counts. It writes a part, and counts it, by `done.extend(map(...))`:
    Ctrl-C can't come between the two.
    """
    done: list[object] = []
    try:
        run(done)
    except KeyboardInterrupt:
        run(done)
        raise


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each has finite elements alone. It reads each once, and waits once for each device and type."""
    ends: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        values = reals(tensor)
        if extent(values) == values.numel():
            values = values.as_strided((values.numel(),), (1,))  # the order in memory, else it would be copied
        if values.numel():
            ends[values.device, values.dtype] += torch.aminmax(values)  # both are NaN where an element is
            places[values.device, values.dtype] += [place] * 2
    found = [True] * len(tensors)
    for kind, each in ends.items():
        for place, finite in zip(places[kind], torch.stack(each).isfinite().tolist(), strict=True):
            found[place] &= finite
    return found


@torch.no_grad()
def update_(
    ema: Tensor,
    model: Tensor,
    decay: float | Tensor,
    *,
    average: bool,
    random: tuple[int, int] | None = None,
    finite: bool = False,
) -> None:
    """ema ← decay * ema + (1 - decay) * model, or the copy that goes with it, in place; decay in [0, 1].

    `random`: the key and the first number of the random bits, where 16-bit averages are rounded stochastically.
    `finite`: an average stays as it is where the model is not finite.
    """
    if not isinstance(decay, Tensor):
        if decay == 1:
            return
        if (decay == 0 and not finite) or not average:
            ema.copy_(model)
            return
        if decay == 0:
            decay = torch.zeros((), device=ema.device)  # chosen element by element
    block = _BLOCK_CPU if ema.device.type == "cpu" else _BLOCK_DEVICE
    e, p = reals(ema.data), reals(model.data)  # autograd would count a change for each block
    if random:  # the numbers follow the average's memory
        strides = e.stride()
        order = sorted(range(e.dim()), key=lambda d: -strides[d])
        e, p = e.permute(order), p.permute(order)
    blocks = list(pieces(0, e, p, block))
    numbers = list(itertools.accumulate((piece.numel() for piece in blocks), initial=random[1] if random else 0))

    def run(done: list[object]) -> None:
        for position in range(len(done), len(blocks)):
            old, new = blocks[position].of(e), blocks[position].of(p)
            new = new.to(old.device, _compute_type(old, new))
            moved = (_moved if average else _copied)(old, new, decay)
            if random and average and old.element_size() == 2:
                rounded = round_stochastically(moved.float(), old.dtype, random[0], numbers[position])
                moved = rounded if not isinstance(decay, Tensor) else torch.where(decay == 0, moved, rounded)
            if finite and average:
                moved = torch.where(new.isfinite(), moved, old)
            done.extend(map(old.copy_, [moved]))

    finish(run)
    if not ema.is_inference():
        torch.autograd.graph.increment_version(ema)


def _moved(old: Tensor, new: Tensor, decay: float | Tensor) -> Tensor:
    """The average after one step, in the type of `new`, that of the computation."""
    difference = new - old
    if not isinstance(decay, Tensor):
        moved = difference.mul_(1 - decay).add_(old) if 1 - decay < 0.5 else difference.mul_(-decay).add_(new)
        return torch.where(old == new, old.to(new.dtype), moved)
    decay = decay.to(new.device, new.dtype)
    weight = 1 - decay
    moved = torch.where(weight < 0.5, difference * weight + old, difference * -decay + new)
    moved = torch.where((old == new) | (decay == 1), old.to(new.dtype), moved)
    return torch.where(decay == 0, new, moved)


def _copied(old: Tensor, new: Tensor, decay: float | Tensor) -> Tensor:
    """The copy of a pair that is not averaged, with a decay that the host does not know."""
    assert isinstance(decay, Tensor)
    return torch.where(decay.to(old.device) == 1, old, new.to(old.dtype))


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


def _compute_type(ema: Tensor, model: Tensor) -> torch.dtype:
    """float64, except on devices that may lack it, where 32 bits or fewer are averaged."""
    everywhere = ema.device.type in ("cpu", "cuda") or torch.float64 in (ema.dtype, model.dtype)
    return torch.float64 if everywhere else torch.float32
