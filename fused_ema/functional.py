"""update, copy_, swap_, bind: the operation itself."""

from __future__ import annotations

import copy
import math
import os
import sys
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor, nn

from . import _native, ops, reference
from .checks import PLAIN_TYPES, Action, Checked, check, dtype_name, has_address
from .pairing import Pairs, Source, pair

Buffers = Literal["copy", "average", "ignore"]
OpName = Literal["update", "copy", "swap"]

_CACHED = 16  # plans kept for `update` and its kin, beside those of live Bindings


def update(ema: Source, model: Source, decay: float | Tensor, *, buffers: Buffers = "copy") -> None:
    """Moves the averages towards the model, in place, in one kernel launch per device.

    Args:
        ema: the averages: a module, a mapping of names to tensors, or a sequence of tensors. float32, float64,
            bfloat16, float16, complex64 or complex128, each at least as wide as the tensor it averages.
        model: what is averaged: the same kind as `ema`, the same shapes and devices. Modules and mappings are paired
            by name, with the segments `module.`, `_orig_mod.`, `_checkpoint_wrapped_module.` and
            `_fsdp_wrapped_module.` ignored; sequences by position.
        decay: a float in [0, 1], or a 0-d float32 or float64 tensor on the averages' device, which is read there,
            without waiting for it. 1 writes nothing at all, 0 copies.
        buffers: what becomes of a module's floating buffers: "copy" (as torch's AveragedModel does), "average" or
            "ignore". Integer and bool tensors are copied, or ignored with the buffers. A mapping or a sequence does
            not tell buffers from parameters: all its floating tensors are averaged.

    Raises:
        ValueError, TypeError, RuntimeError: the tensor that can't be used, what was expected and what was found.
            Nothing is written then.

    Equivalent to::

        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, average in ema.named_parameters():
                average.lerp_(theirs[name].to(average.dtype), 1 - decay)
            theirs = dict(model.named_buffers())
            for name, buffer in ema.named_buffers():
                buffer.copy_(theirs[name])

    computed in float32 (float64 where either side is) and rounded once, with a fused multiply-add.
    """
    _run_cached("update", ema, model, decay, buffers)


def copy_(ema: Source, model: Source, *, buffers: Buffers = "copy") -> None:
    """ema ← model, in place, in one kernel launch per device, with the cast that the dtypes need.

    Takes what `update` takes, and averages narrower than the model too; raises what it raises.

    Equivalent to ``average.copy_(parameter)`` under ``torch.no_grad()`` for each pair.
    """
    _run_cached("copy", ema, model, 0.0, buffers)


def swap_(ema: Source, model: Source, *, buffers: Buffers = "copy") -> None:
    """Exchanges the values of ema and model, in place; every tensor keeps its address.

    Takes what `update` takes, with equal dtypes on both sides; raises what it raises. With ``buffers="ignore"``
    buffers stay where they are.

    Equivalent to ``old = average.clone(); average.copy_(parameter); parameter.copy_(old)`` for each pair.
    """
    _run_cached("swap", ema, model, 0.0, buffers)


class Binding:
    """The cached handle behind `update`, `copy_` and `swap_`: see `bind`."""

    def __init__(self, ema: Source, model: Source, *, buffers: Buffers = "copy") -> None:
        self._sources = (ema, model, buffers)
        self._plan = _Plan.of(ema, model, buffers)

    def update(self, decay: float | Tensor) -> None:
        """`fused_ema.update` of what is bound."""
        self._plan = _run(self._plan, "update", decay, *self._sources)

    def copy_(self) -> None:
        """`fused_ema.copy_` of what is bound."""
        self._plan = _run(self._plan, "copy", 0.0, *self._sources)

    def swap_(self) -> None:
        """`fused_ema.swap_` of what is bound."""
        self._plan = _run(self._plan, "swap", 0.0, *self._sources)

    def describe(self) -> dict[str, Any]:
        """What an update does: `backend` ("cuda", "cpu", "torch", or two of them joined by "+"), `devices`, `tensors`
        (empty and repeated ones left out), `averaged` and `copied` of them, `elements`, `bytes_per_update` (read and
        written), `launches_per_update` (of kernels; on the CPU, of parallel loops) and `dtypes` (pairs of tensors per
        "average←model")."""
        return self._plan.describe()

    def __repr__(self) -> str:
        about = self.describe()
        return (
            f"Binding({about['tensors']} tensors, {about['elements']:,} elements, "
            f"{about['bytes_per_update']:,} bytes per update, backend {about['backend']!r})"
        )

    def __reduce__(self) -> tuple[Callable[..., Binding], tuple[Any, ...]]:
        return _rebind, self._sources


def _rebind(ema: Source, model: Source, buffers: Buffers) -> Binding:
    return Binding(ema, model, buffers=buffers)


def bind(ema: Source, model: Source, *, buffers: Buffers = "copy") -> Binding:
    """A handle that pairs `ema` and `model` once and then updates at the cost of one call into C++.

    Takes and raises what `update` does. Each call still re-reads what the modules, dicts or lists hold: parameters
    that were replaced, moved, cast, added, removed or tied since are seen, and paired anew.
    """
    return Binding(ema, model, buffers=buffers)


def backend(device: torch.device | str | int | None = None) -> str:
    """What would run, now, for tensors on `device`: "cuda", "cpu" or "torch" (the pure-PyTorch path).

    `device` defaults to CUDA where it is available, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _backend(torch.device(device).type)


class EMAMultiAvgFn:
    """See `get_ema_multi_avg_fn`. A class, so that models that hold it can be pickled and deep-copied."""

    def __init__(self, decay: float) -> None:
        value = _decay(decay)
        if not isinstance(value, float):
            raise TypeError("decay: expected a number, found Tensor")
        self.decay = value

    def __call__(self, averages: list[Tensor], parameters: list[Tensor], _: Any = None) -> None:
        update(averages, parameters, self.decay)

    def __repr__(self) -> str:
        return f"get_ema_multi_avg_fn({self.decay})"


def get_ema_multi_avg_fn(decay: float = 0.999) -> EMAMultiAvgFn:
    """Drop-in for the function of that name in `torch.optim.swa_utils`: `AveragedModel(model, multi_avg_fn=...)`.

    Args:
        decay: a float in [0, 1].

    Raises:
        ValueError: decay is NaN or outside [0, 1].
    """
    return EMAMultiAvgFn(decay)


class _Plan:
    """Checked pairs, and what runs them."""

    def __init__(self, pairs: Pairs, buffers: Buffers, watched: Sequence[Source] = ()) -> None:
        checked = check(pairs, buffers)
        self.watches = bool(watched)  # sees by itself when the sources hold something else
        self._about = _describe(checked)
        self._devices: tuple[str, ...] = tuple(self._about["devices"])
        self._refusals = {"update": checked.no_update, "copy": None, "swap": checked.no_swap}
        self._coarse = max((4 * torch.finfo(dtype).eps for dtype in _sixteen_bits(checked)), default=0.0)
        self._once: Checked | None = None
        self._native: Any = None
        extension = _native.load()
        if extension and self._about["backend"] != "torch":
            _refuse_capture(self._devices)
            self._ops = extension.Op.__members__
            self._native = extension.Plan(
                *pairs[:3],
                checked.actions,
                [child for source in watched if isinstance(source, nn.Module) for child in source.modules()],
                [source for source in watched if not isinstance(source, nn.Module)],
            )
            self._about["launches_per_update"] = self._native.launches()
        else:
            self._once = checked

    @classmethod
    def of(cls, ema: Source, model: Source, buffers: Buffers) -> _Plan:
        watched = (ema, model) if _watchable(ema) and _watchable(model) else ()
        return cls(pair(ema, model, buffers), buffers, watched)

    def run(self, op: OpName, decay: float | Tensor, pairs: Pairs | None = None, *, fresh: bool = False) -> bool:
        """False, and nothing written, where the plan may not fit what there is now.

        With `pairs`, runs on those tensor objects. `fresh` says that the plan was made in this very call: its refusals
        hold, and so does a plan of the pure-PyTorch path, which can't be compared with the tensors as they are.
        """
        value = _decay(decay)
        if self._native is None and not fresh:
            return False
        if refusal := self._refusal(op, value):
            if not fresh:
                return False
            raise refusal
        if isinstance(value, Tensor):
            number, on_device = (float(_decay(value.item())), None) if value.device.type == "cpu" else (1.0, value)
        else:
            number, on_device = value, None
        if 0.0 < 1.0 - number < self._coarse and op == "update" and not _warned:
            if not fresh:
                return False  # the averages may have been cast since
            _warn_coarse(number)
        if self._native is None:
            return self._run_once(op, number if on_device is None else on_device)
        if pairs is None:
            return bool(self._native.run(self._ops[op], number, on_device))
        return bool(self._native.run_with(pairs.ema, pairs.model, self._ops[op], number, on_device))

    def describe(self) -> dict[str, Any]:
        return copy.deepcopy(self._about)

    def _refusal(self, op: OpName, decay: float | Tensor) -> Exception | None:
        if isinstance(decay, Tensor) and self._devices not in ((), (str(decay.device),)):
            return ValueError(
                f"decay: expected a number or a tensor on the averages' device, {' and '.join(self._devices)}, "
                f"found one on {decay.device}"
            )
        return self._refusals[op]

    def _run_once(self, op: OpName, decay: float | Tensor) -> bool:
        checked, self._once = self._once, None
        assert checked is not None, "a fresh plan has not run yet"
        with _one_at_a_time:
            for ema, model, action in zip(checked.pairs.ema, checked.pairs.model, checked.actions, strict=True):
                if action is Action.NONE:
                    continue
                if op == "update":
                    reference.update_(ema, model, decay, average=action is Action.AVERAGE)
                elif op == "copy":
                    reference.copy_(ema, model)
                else:
                    reference.swap_(ema, model)
        return True


_one_at_a_time = threading.Lock()  # for the pure-PyTorch path; the extension has its own


def _renew_lock() -> None:
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _run(plan: _Plan | None, op: OpName, decay: float | Tensor, ema: Source, model: Source, buffers: Buffers) -> _Plan:
    """Runs `plan` if it still fits what the sources hold, else a new one; returns the one that ran."""
    if plan and plan.run(op, decay, None if plan.watches else pair(ema, model, buffers)):
        return plan
    plan = _Plan.of(ema, model, buffers)
    if not plan.run(op, decay, None if plan.watches else pair(ema, model, buffers), fresh=True):
        raise RuntimeError("fused_ema: the tensors changed while they were paired; is another thread at work?")
    return plan


def _watchable(source: Source) -> bool:
    """Whether C++ can see by itself that a source holds something else than before."""
    if isinstance(source, nn.Module):  # the registries of a ScriptModule are no dicts
        return not any(isinstance(child, torch.jit.ScriptModule) for child in source.modules())
    return isinstance(source, (dict, list, tuple))


# Plans of `update` and its kin. Those of modules end with the modules; those of other sources hold no tensors.
_plans: OrderedDict[tuple[Any, ...], tuple[_Plan, tuple[Any, ...]]] = OrderedDict()


def _run_cached(op: OpName, ema: Source, model: Source, decay: float | Tensor, buffers: Buffers) -> None:
    if op == "update" and torch.compiler.is_compiling():
        return ops.trace_update(pair(ema, model, buffers), decay, buffers)
    if isinstance(ema, nn.Module) and isinstance(model, nn.Module):
        key: tuple[Any, ...] = (id(ema), id(model), buffers)
        plan = _plans.get(key, (None, ()))[0]
        used = _run(plan, op, decay, ema, model, buffers)
        if used is not plan:
            _keep(key, used, tuple(weakref.ref(side, lambda _: _plans.pop(key, None)) for side in (ema, model)))
        return
    pairs = pair(ema, model, buffers)
    kinds = frozenset(map(type, pairs.ema)) | frozenset(map(type, pairs.model))
    first = pairs.ema[0].data_ptr() if pairs.ema and kinds <= PLAIN_TYPES and has_address(pairs.ema[0]) else None
    key = (len(pairs.ema), buffers, type(ema), kinds, first)
    plan = _plans.get(key, (None, ()))[0]
    if not plan or not plan.run(op, decay, pairs):
        plan = _Plan(pairs, buffers)
        if not plan.run(op, decay, pairs, fresh=True):
            raise RuntimeError("fused_ema: the tensors changed while they were checked; is another thread at work?")
        _keep(key, plan, ())


def _keep(key: tuple[Any, ...], plan: _Plan, references: tuple[Any, ...]) -> None:
    _plans.pop(key, None)
    _plans[key] = (plan, references)
    while len(_plans) > _CACHED:
        _plans.popitem(last=False)


def _backend(device_type: str) -> str:
    if device_type == "cpu" and _native.load():
        return "cpu"
    if device_type == "cuda" and _native.load() and _native.cuda_enabled:
        return "cuda"
    return "torch"


def _describe(checked: Checked) -> dict[str, Any]:
    elements = size = averaged = copied = 0
    devices: dict[str, str] = {}
    dtypes: Counter[str] = Counter()
    for ema, model, action in zip(checked.pairs.ema, checked.pairs.model, checked.actions, strict=True):
        if action is Action.NONE:
            continue
        devices[str(ema.device)] = _backend(ema.device.type)
        elements += ema.numel()
        accesses = 2 if action is Action.AVERAGE else 1
        size += ema.numel() * (accesses * ema.element_size() + model.element_size())
        averaged += action is Action.AVERAGE
        copied += action is Action.COPY
        if action is Action.AVERAGE:
            dtypes[f"{dtype_name(ema)}←{dtype_name(model)}"] += 1
    backends = set(devices.values()) or {_backend("cpu")}
    return {
        "backend": "torch" if "torch" in backends else "+".join(sorted(backends)),
        "devices": list(devices),
        "tensors": averaged + copied,
        "averaged": averaged,
        "copied": copied,
        "elements": elements,
        "dtypes": dict(dtypes),
        "bytes_per_update": size,
        "launches_per_update": averaged * reference.CALLS_PER_AVERAGE + copied * reference.CALLS_PER_COPY,
    }


def _refuse_capture(devices: Sequence[str]) -> None:
    if any(device.startswith("cuda") for device in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "fused_ema: expected the tensors that were bound or updated before this CUDA graph capture began, "
            "found new or moved ones, whose addresses can't be uploaded during a capture"
        )


def _decay(decay: float | Tensor) -> float | Tensor:
    if isinstance(decay, Tensor):
        if decay.dim() != 0 or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"decay: expected a number or a 0-d float32 or float64 tensor, "
                f"found shape {tuple(decay.shape)} and {dtype_name(decay)}"
            )
        return decay
    value = decay if type(decay) is float else _number(decay)
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ValueError(f"decay: expected a value in [0, 1], found {value}")
    return value


def _number(decay: object) -> float:
    try:
        if isinstance(decay, SupportsFloat):  # which a string is not, though float() takes one
            return float(decay)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    raise TypeError(f"decay: expected a number or a 0-d tensor, found {type(decay).__name__}")


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


def _update_lists(ema: list[Tensor], model: list[Tensor], decay: Tensor) -> None:
    _run_cached("update", ema, model, decay, "copy")


ops.implement(_update_lists)
