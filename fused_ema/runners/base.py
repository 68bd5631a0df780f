"""The interface between a plan and what runs it.

A plan (fused_ema/plan.py) pairs tensors, checks them, and asks a runner to prepare them: to work out whatever depends
on the pairs alone, such as addresses, tables on a device, or lists for `torch._foreach_*`. What the runner returns is
kept and run at every update, for as long as the tensors stay what they were.

To add a runner, implement `Runner` and `Prepared` in a file of this folder and put it into the list in __init__.py:
`choose` takes the first of them that can run on a device. It computes what docs/numerics.md promises. reference.py
shows the average in plain PyTorch, exchange.py the exchange, and tests/runners has one suite that all runners pass.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..pairs.checks import Action

Tensors: TypeAlias = Sequence[Tensor]
OpName = Literal["update", "copy", "swap", "restore", "update_stochastic", "update_finite", "update_stochastic_finite"]
"""What a call does with each pair:

- "update": averages, or copies where the pair's action is COPY; rounds to nearest.
- "update_stochastic": the same, but 16-bit averages are rounded stochastically.
- "update_finite", "update_stochastic_finite": like these two, but where an element of the model is NaN or infinite, its
  average stays as it is, whatever the decay. The two parts of a complex number are two elements. Pairs whose action is
  COPY are copied as they are.
- "copy": the average becomes the model's value.
- "swap": the two exchange values. Where their types differ, the model's values go to the call's scratch memory, the
  model gets the average, and the average stays as it is.
- "restore": undoes a swap: exchanges the values again, or takes the model's from the scratch memory.
"""


class Job(NamedTuple):
    """What a runner prepares: pairs that were checked. Lists have one entry per pair."""

    names: list[str]  # for errors
    ema: list[Tensor]  # plain dense tensors; of several averages the first
    model: list[Tensor]  # plain dense tensors, of the same shapes and devices
    actions: list[Action]  # NONE: leave the pair out
    averages: int  # of each tensor of the model, 1 to 8
    strides: list[int]  # elements from one average of a pair to the next


class Call(NamedTuple):
    """What one call asks for. `decays` and `keys` have one entry for each average that takes part."""

    op: OpName
    decays: tuple[float, ...] = (0.0,)  # in [0, 1]: 1 leaves the average alone, 0 copies
    device_decays: Tensor | None = None  # replaces `decays`: float32 or float64, on the device, never read on the host
    keys: tuple[int, ...] = ()  # 64 random bits each, for stochastic rounding
    average: int = -1  # the only average that takes part; -1: all of them
    scratch: Sequence[Tensor] = ()  # for "swap" and "restore": bytes for each device that `Prepared.scratch` lists


Slots: TypeAlias = Sequence[tuple[int, Any]]
"""Slots that hold other tensors than before, by their number in `Watch.values()`, with these tensors."""


class Changed(NamedTuple):
    """Pairs whose tensors were replaced, or moved, since they were prepared, by others of their types and shapes."""

    numbers: list[int]
    ema: list[Tensor]  # of these pairs, as they are now
    model: list[Tensor]
    slots: Slots
    others: bool  # whether some of the slots belong to no pair


def is_update(op: OpName) -> bool:
    return op.startswith("update")


def skips_nonfinite(op: OpName) -> bool:
    return op.endswith("_finite")


class Watch(Protocol):
    """Sees whether modules, dicts and lists still hold what they held when it was made; see runners/watch.py."""

    def current(self) -> bool: ...

    def values(self) -> list[Any] | None:
        """What the slots of the sources hold, in one fixed order; None where that has changed."""

    def changed(self) -> tuple[list[Any], Slots] | None:
        """What all slots hold now, and those that hold another tensor than before, of the same class. None where
        anything else has changed, or one of them is sharded."""

    def adopt(self, changed: Slots) -> None:
        """Expects from now on what `changed` found."""


class Prepared(Protocol):
    """Pairs that a runner has prepared. Holds no reference to a tensor, so that replaced parameters are freed."""

    def launches(self) -> int:
        """Kernel launches (on the CPU, parallel loops) of one update; in foreach.py, operations on single tensors."""

    def scratch(self) -> list[tuple[torch.device, int]]:
        """Bytes of scratch memory that a "swap" needs for each device, where types differ. The call has it in this
        order: on the device, or in pinned host memory."""

    def current(self) -> bool:
        """Whether the watched sources still hold the tensors that were prepared, unchanged in address, type, shape and
        strides."""

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        """Runs the call and raises the version counter of what it writes. False: something is no longer current, and
        nothing was written.

        Without `ema` and `model` it runs on the tensors that the watched sources hold; with them on those, which may be
        new objects for the memory that was prepared. An exception or Ctrl-C leaves each tensor either unchanged
        or done; `exchanged` then tells whether a "restore" is needed, and a "restore" undoes as much as was done.
        """

    def changed(self, ema: Tensors | None = None, model: Tensors | None = None) -> Changed | None:
        """What has changed, where `patch` may take it in; None where that needs new tables. Arguments as in `run`."""

    def patch(self, changed: Changed) -> bool:
        """Takes in what `changed` found and the caller has checked. False, with nothing changed, where that needs new
        tables."""

    def exchanged(self) -> bool:
        """Whether a "swap" wrote to the model and no "restore" has undone it."""

    def mark_exchanged(self) -> None:
        """Records that another `Prepared` did the swap on the same memory, so that this one may undo it."""


class Runner(Protocol):
    """Something that can run updates. One instance serves the process."""

    name: str  # that of its file

    def backend(self, device_type: str) -> str:
        """What `fused_ema.backend()` calls it on a device of this type, such as "cuda"."""

    def why_not(self, device_type: str) -> str | None:
        """Why it can't run on devices of this type here and now, and what to do about it; None where it can."""

    def prepare(self, job: Job, watch: Watch | None) -> Prepared:
        """Prepares the pairs. `watch` sees what their sources held before they were paired; None where nothing can be
        watched, so that every `run` is given its tensors."""


_lock = threading.RLock()


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """This process's lock, for managers and for the runners in Python. (The extension has its own, so that threads can
    wait for it without holding the interpreter's.)"""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # where no thread is left to release the inherited one
