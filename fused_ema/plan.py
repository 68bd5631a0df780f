"""A plan: pairs that were checked, and what runs them."""

from __future__ import annotations

import copy
import os
import sys
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .pairs import shards
from .pairs.arguments import check_decay
from .pairs.checks import Action, Checked, check, dtype_name
from .pairs.pairing import Pairs, Source
from .runners import extension as _native
from .runners import reference

Buffers = Literal["copy", "average", "ignore"]
OpName = Literal["update", "copy", "swap", "restore", "update_stochastic"]


class Call(NamedTuple):
    """What a manager asks of a plan: one decay, and one key of the random bits, for each average that takes part."""

    decays: tuple[float, ...]
    on_device: Tensor | None = None  # the decays, where only the device knows them
    keys: tuple[int, ...] = ()
    average: int = -1  # the only one that takes part; negative: all do
    aside: Sequence[Tensor] = ()  # memory for an exchange between types


class Plan:
    """Checked pairs, and what runs them; `watched`: what their sources held (`watch`) before they were paired.

    A manager's plan has `averages` of them for each pair, `next_averages` elements apart, and `free_types`: its
    averages may be narrower than the model.
    """

    def __init__(
        self,
        pairs: Pairs,
        buffers: Buffers,
        watched: Any = None,
        *,
        averages: int = 1,
        next_averages: Sequence[int] = (),
        free_types: bool = False,
    ) -> None:
        checked = check(pairs, buffers, free_types=free_types)
        self.watches = watched is not None  # sees by itself when the sources hold something else
        self._about = _describe(checked, averages)
        self._devices: tuple[str, ...] = tuple(self._about["devices"])
        no_update, no_swap = checked.no_update, checked.no_swap
        self._refusals: dict[OpName, Exception | None] = {
            "update": no_update,
            "copy": None,
            "swap": no_swap,
            "restore": no_swap,
            "update_stochastic": no_update,
        }
        self._next_averages = list(next_averages) or [0] * len(pairs.ema)
        self._coarse = max((4 * torch.finfo(dtype).eps for dtype in _sixteen_bits(checked)), default=0.0)
        self._sharded = checked.sharded is not None
        self._once: Checked | None = None
        self._native: Any = None
        extension = _native.load()
        if extension and self._about["backend"] != "torch":
            self._ops = extension.Op.__members__
            self._native = extension.Prepared(
                *checked.pairs[:3], checked.actions, watched, averages, self._next_averages
            )
            self._about["launches_per_update"] = self._native.launches()
        else:
            self._once = checked
        self.reusable = self._native is not None

    def run(self, op: OpName, decay: float | Tensor, pairs: Pairs | None = None, *, fresh: bool = False) -> bool:
        """False, and nothing written, where the plan may not fit what there is now.

        With `pairs`, runs on those tensor objects. `fresh` says that the plan was made in this very call: its refusals
        hold, and so does a plan of the pure-PyTorch path, which can't be compared with the tensors as they are; where
        it does not fit all the same, RuntimeError.
        """
        value = check_decay(decay)
        if self._native is None and not fresh:
            return False
        if refusal := self._refusal(op, value):
            if not fresh:
                return False
            raise refusal
        if isinstance(value, Tensor):
            number, on_device = (float(check_decay(value.item())), None) if value.device.type == "cpu" else (1.0, value)
        else:
            number, on_device = value, None
        if self._too_coarse(op, number, fresh):
            return False
        if op == "swap":
            torch.clear_autocast_cache()  # of 16-bit copies of what the tensors held before
        if self._native is None:
            return self._run_once(op, Call((number,), None if on_device is None else on_device.view(1)))
        if pairs is None:
            return self._fits(self._native.run(self._ops[op], (number,), on_device), fresh)
        if self._sharded and any(map(shards.refusal, *pairs[:3])):
            return False
        here = shards.localized(pairs) if self._sharded else pairs
        ran = self._fits(self._native.run_with(here.ema, here.model, self._ops[op], (number,), on_device), fresh)
        if ran and self._sharded:
            shards.written((*pairs.ema, *(pairs.model if op == "swap" else ())))
        return ran

    def run_call(self, op: OpName, call: Call, *, fresh: bool = False) -> bool:
        """`run` for a manager, which has checked the decays."""
        if self._native is None and not fresh:
            return False
        if refusal := self._refusals[op]:
            if not fresh:
                return False
            raise refusal
        finest = max((decay for decay in call.decays if decay < 1.0), default=0.0) if self._coarse else 0.0
        if self._too_coarse(op, finest, fresh):
            return False
        if self._native is None:
            return self._run_once(op, call)
        if op in ("swap", "restore"):
            torch.clear_autocast_cache()  # of 16-bit copies of what the model held before
        ran = self._native.run(self._ops[op], call.decays, call.on_device, call.keys, call.average, call.aside)
        return self._fits(ran, fresh)

    @staticmethod
    def _fits(ran: bool, fresh: bool) -> bool:
        if fresh and not ran:
            raise RuntimeError("fused_ema: the tensors changed while they were paired; is another thread at work?")
        return ran

    def current(self) -> bool:
        """Whether it still fits what it was made from, as far as can be seen."""
        return bool(self.watches and self._native and self._native.current())

    def exchanged(self) -> bool:
        """Whether the model holds an average, by this plan's doing."""
        return bool(self._native and self._native.exchanged())

    def mark_exchanged(self) -> None:
        """Says so, where another plan did it on the same tensors."""
        self._native.mark_exchanged()

    def refuse(self, op: OpName) -> None:
        """Raises what speaks against an operation."""
        if refusal := self._refusals[op]:
            raise refusal

    def aside(self) -> list[Tensor]:
        """Memory for the values that an exchange between types sets aside, a tensor of bytes per device."""
        found = self._native.scratch_bytes() if self._native else []
        return [torch.empty(size, dtype=torch.uint8, device=device) for device, size in found]

    def describe(self) -> dict[str, Any]:
        return copy.deepcopy(self._about)

    def _too_coarse(self, op: OpName, decay: float, fresh: bool) -> bool:
        """Whether a new plan has to see to it, which warns: the averages may have been cast since."""
        if _warned or op != "update" or not 0.0 < 1.0 - decay < self._coarse:
            return False
        if fresh:
            _warn_coarse(decay)
        return not fresh

    def _refusal(self, op: OpName, decay: float | Tensor) -> Exception | None:
        if isinstance(decay, Tensor) and self._devices not in ((), (str(decay.device),)):
            return ValueError(
                f"decay: expected a number or a tensor on the averages' device, {' and '.join(self._devices)}, "
                f"found one on {decay.device}"
            )
        return self._refusals[op]

    def _run_once(self, op: OpName, call: Call) -> bool:
        checked, self._once = self._once, None
        assert checked is not None, "a fresh plan has not run yet"
        averages = range(len(call.decays)) if call.average < 0 else [call.average]
        decays = call.decays if call.on_device is None else call.on_device.unbind()
        number = 0  # of the first element among all, as in csrc/plan.cpp
        with _one_at_a_time:
            for first, model, action, apart in zip(
                checked.pairs.ema, checked.pairs.model, checked.actions, self._next_averages, strict=True
            ):
                if action is Action.NONE:
                    continue
                number, start = number + 2 * first.numel(), number
                for position, k in enumerate(averages):
                    ema = first if k == 0 else nth_average(first, apart, k)
                    if op in ("update", "update_stochastic"):
                        bits = (call.keys[position], start) if op == "update_stochastic" else None
                        reference.update_(ema, model, decays[position], average=action is Action.AVERAGE, random=bits)
                    elif op == "copy":
                        reference.copy_(ema, model)
                    else:
                        reference.swap_(ema, model)
        if whole := checked.sharded:
            shards.written((*whole.ema, *(whole.model if op in ("swap", "restore") else ())))
        return True


def nth_average(first: Tensor, apart: int, k: int) -> Tensor:
    """The k-th of several averages of one tensor, `apart` elements from one to the next."""
    return first.detach().as_strided(first.shape, first.stride(), first.storage_offset() + k * apart)


_one_at_a_time = threading.RLock()  # for managers and the pure-PyTorch path; the extension has its own


def one_at_a_time() -> AbstractContextManager[Any]:
    """The lock of this process: a forked child has another."""
    return _one_at_a_time


def _renew_lock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def watch(*sources: Source) -> Any:
    """What the sources hold now, for C++ to see by itself whether they still do; None where it can't."""
    extension = _native.load()
    if extension is None or not all(map(watchable, sources)):
        return None
    modules = [source for source in sources if isinstance(source, nn.Module)]
    return extension.Watch(modules, [source for source in sources if not isinstance(source, nn.Module)])


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def watchable(source: Source) -> bool:
    """Whether C++ can see by itself that a source holds something else than before."""
    if not isinstance(source, nn.Module):
        return type(source) in (dict, OrderedDict, list, tuple)  # a subclass may hand out other tensors than it holds
    modules = [source, *source.modules()]
    registries: list[Any] = [vars(module).get(name) for module in modules for name in _REGISTRIES]
    if not all(type(registry) in (dict, OrderedDict) for registry in registries):
        return False  # those of a ScriptModule are not
    children = {id(child) for registry in registries[2::3] for child in registry.values()}
    return {id(source), *children} - {id(None)} == set(map(id, modules))  # no more and no less than it names


def backend_on(device_type: str) -> str:
    if device_type == "cpu" and _native.load():
        return "cpu"
    if device_type == "cuda" and _native.load() and _native.cuda_enabled:
        return "cuda"
    return "torch"


def _describe(checked: Checked, averages: int) -> dict[str, Any]:
    elements = size = averaged = copied = 0
    devices: dict[str, str] = {}
    dtypes: Counter[str] = Counter()
    for ema, model, action in zip(checked.pairs.ema, checked.pairs.model, checked.actions, strict=True):
        if action is Action.NONE:
            continue
        devices[str(model.device)] = backend_on(model.device.type)
        elements += ema.numel()
        accesses = 2 * averages if action is Action.AVERAGE else averages
        size += ema.numel() * (accesses * ema.element_size() + model.element_size())
        averaged += action is Action.AVERAGE
        copied += action is Action.COPY
        if action is Action.AVERAGE:
            dtypes[f"{dtype_name(ema)}←{dtype_name(model)}"] += 1
    backends = set(devices.values()) or {backend_on("cpu")}
    return {
        "backend": "torch" if "torch" in backends else "+".join(sorted(backends)),
        "devices": list(devices),
        "tensors": averaged + copied,
        "averaged": averaged,
        "copied": copied,
        "elements": elements,
        "dtypes": dict(dtypes),
        "bytes_per_update": size,
        "launches_per_update": averages * (averaged * reference.CALLS_PER_AVERAGE + copied * reference.CALLS_PER_COPY),
    }


def _sixteen_bits(checked: Checked) -> set[torch.dtype]:
    """The 16-bit types among the averages."""
    pairs = zip(checked.pairs.ema, checked.actions, strict=True)
    return {ema.dtype for ema, action in pairs if action is Action.AVERAGE and ema.element_size() == 2}


_warned = False


def _warn_coarse(decay: float) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fused_ema: averages in 16 bits stand still at decay {decay}: most steps are smaller than half a unit in "
            "the last place and round away. Keep the averages in float32.",
            stacklevel=_outside(),
        )


def _outside() -> int:
    """The stacklevel, as seen from the caller, of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and os.path.dirname(frame.f_code.co_filename) == os.path.dirname(__file__):
        level, frame = level + 1, frame.f_back
    return level
