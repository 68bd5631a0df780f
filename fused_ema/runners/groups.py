"""Pairs that are averaged by the same few calls of `torch._foreach_lerp_` and its kin."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..pairs.memory import extent
from .base import Job, Tensors
from .in_python import getter
from .pieces import Piece, pieces, reals
from .reference import finish

# Bytes of scratch memory per update: few enough for the CPU's caches; on a device, enough to hide a launch.
SCRATCH_CPU, SCRATCH_DEVICE = 4 << 20, 64 << 20


class Group:
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


class CastGroup(Group):
    """Pairs of two types, or on two devices: they go through scratch memory, in rounds that fill it."""

    def __init__(self, job: Job, pairs: list[int]) -> None:
        super().__init__(job, pairs)
        ema, model = job.ema[pairs[0]], job.model[pairs[0]]
        types = reals(ema).dtype, reals(model).dtype
        self._type = torch.float64 if torch.float64 in types else torch.float32
        self._cast_ema = types[0] != self._type
        self._cast_model = types[1] != self._type or model.device != ema.device
        most = scratch_bytes(self.device) // self._type.itemsize // (self._cast_ema + self._cast_model)
        rounds: list[list[Piece]] = []
        self._fullest, filled = 0, most
        for i in pairs:
            for piece in pieces(i, job.ema[i], job.model[i], most):
                if filled + piece.numel() > most:
                    rounds.append([])
                    filled = 0
                rounds[-1].append(piece)
                filled += piece.numel()
                self._fullest = max(self._fullest, filled)
        self._rounds = [_Round(each, self._complex) for each in rounds]
        self._kept_views: tuple[Tensor, list[tuple[list[Tensor], list[Tensor]]]] | None = None
        in_parts = {piece.pair for each in rounds for piece in each if piece.part is not None}
        self._in_parts = [i for i in in_parts if not job.ema[i].is_inference()]

    def scratch_bytes(self) -> int:
        return self._fullest * self._type.itemsize * (self._cast_ema + self._cast_model)

    def operations(self) -> int:
        return sum(len(each.pieces) for each in self._rounds) * (1 + self._cast_model + 2 * self._cast_ema)

    def update(self, ema: Tensors, model: Tensors, decay: float, scratch: dict[torch.device, Tensor]) -> None:
        views = self._views_of(scratch[self.device])

        def run(done: list[object]) -> None:
            for each, (x, y) in zip(self._rounds[len(done) :], views[len(done) :], strict=True):
                e, p = each.of(ema), each.of(model)
                if self._cast_model:
                    torch._foreach_copy_(y, p)
                if self._cast_ema:
                    torch._foreach_copy_(x, e)
                    _lerp(x, y if self._cast_model else p, decay)
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

    def _views_of(self, scratch: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The scratch memory of each round, in the shapes of the averages and of the model's tensors. They are kept
        on the CPU, where it is the same memory at each call."""
        if self._kept_views is None or self._kept_views[0] is not scratch:
            # A view that is made in inference mode could not be written outside it.
            with torch.inference_mode(scratch.is_inference()):
                memory = scratch[: self.scratch_bytes()].view(self._type)
                views = [(each.views(memory[-self._fullest :]), each.views(memory)) for each in self._rounds]
            if self.device.type != "cpu":
                return views
            self._kept_views = scratch, views
        return self._kept_views[1]


class _Round:
    """As many pieces as fit the scratch memory."""

    def __init__(self, pieces: list[Piece], complex: bool) -> None:
        self.pieces = pieces
        self._sizes = [piece.numel() for piece in pieces]
        whole = not complex and all(piece.part is None for piece in pieces)
        self._pick = getter([piece.pair for piece in pieces]) if whole else None

    def of(self, side: Tensors) -> Any:
        return self._pick(side) if self._pick else [piece.of(side[piece.pair]) for piece in self.pieces]

    def views(self, memory: Tensor) -> list[Tensor]:
        parts = memory[: sum(self._sizes)].split(self._sizes)  # type: ignore[no-untyped-call]
        return [part.view(piece.shape) for part, piece in zip(parts, self.pieces, strict=True)]


def groups(job: Job, averaged: list[int]) -> list[Group]:
    found: list[Group] = []
    for pairs in alike(job, averaged):
        ema, model = job.ema[pairs[0]], job.model[pairs[0]]
        kind = Group if (ema.dtype, ema.device) == (model.dtype, model.device) else CastGroup
        found.append(kind(job, pairs))
    return found


def alike(job: Job, pairs: Iterable[int]) -> list[list[int]]:
    """The pairs in lists that PyTorch handles in few launches: of one device and two types, equal in strides or not."""
    lists: dict[object, list[int]] = defaultdict(list)
    for i in pairs:
        ema, model = job.ema[i], job.model[i]
        fast = ema.stride() == model.stride() and extent(ema) == ema.numel()
        lists[ema.device, model.device, ema.dtype, model.dtype, fast].append(i)
    return list(lists.values())


def _lerp(ema: Any, model: Any, decay: float) -> None:
    """Multiplies the difference by the smaller of decay and 1 - decay, as csrc/lerp.h does: the bound needs that."""
    if decay >= 0.5:
        torch._foreach_lerp_(ema, model, 1 - decay)
        return
    for e, p in zip(ema, model, strict=True):
        torch.lerp(p, e, decay, out=e)  # _foreach_lerp_ would subtract a rounded weight from 1


def scratch_bytes(device: torch.device) -> int:
    return SCRATCH_CPU if device.type == "cpu" else SCRATCH_DEVICE


_kept: list[Tensor] = []  # the CPU's scratch memory of this process, while no update uses it


def borrow(device: torch.device, size: int) -> Tensor:
    """Scratch memory. On a device it is new at each call: PyTorch's allocator takes care of streams and of graphs."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    try:
        return _kept.pop()  # an update in a signal handler, which has interrupted another one, finds none
    except IndexError:
        with torch.inference_mode(False):
            return torch.empty(SCRATCH_CPU, dtype=torch.uint8, device="cpu")


def give_back(memory: Tensor) -> None:
    """Keeps the CPU's scratch memory for the next update, unless a mode has made something else of it."""
    if memory.device.type == "cpu" and type(memory) is Tensor and not _kept:
        _kept.append(memory)


@functools.cache
def _lerp_is_fused() -> bool:
    """Whether this CPU's lerp rounds once. Two roundings lose the last term of 1 + 2**-11 + 2**-24 - 1."""
    x = 1 + 2.0**-12
    e, p = (torch.full((64,), value, dtype=torch.float32, device="cpu") for value in (-1.0, 4 * x - 1))
    moved = e.lerp_(p, x / 4)
    return bool((moved == 2.0**-11 + 2.0**-24).all())
