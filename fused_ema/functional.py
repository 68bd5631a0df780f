"""update, copy_, swap_, bind: the operation itself."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _native, ops, reference
from .checks import PLAIN_TYPES, Action, Checked, check, dtype_name
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
            raise TypeError("decay: expected a number, found a tensor")
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
    """Checked pairs and what runs them.

    `run` is False, and has written nothing, once the pairs are not what they were. The pure-PyTorch path can't tell,
    and runs once.
    """

    def __init__(self, pairs: Pairs, buffers: Buffers, watched: Iterable[Source] = ()) -> None:
        checked = check(pairs, buffers)
        self._about = _describe(checked)
        self._refusals = {"update": checked.no_update, "copy": None, "swap": checked.no_swap}
        self._coarse = max((4 * torch.finfo(dtype).eps for dtype in _sixteen_bits(checked)), default=0.0)
        self._once: Checked | None = None
        self._native: Any = None
        extension = _native.load()
        if extension and self._about["backend"] != "torch":
            _refuse_capture(self._about["devices"])
            self._ops = extension.Op.__members__
            self._native = extension.Plan(
                *pairs[:3],
                checked.actions,
                [vars(child) for source in watched if isinstance(source, nn.Module) for child in source.modules()],
                [source for source in watched if not isinstance(source, nn.Module)],
            )
            self._about["launches_per_update"] = self._native.launches()
        else:
            self._once = checked

    @classmethod
    def of(cls, ema: Source, model: Source, buffers: Buffers) -> _Plan:
        """A plan that watches both sources, and is stale once either holds other tensors."""
        return cls(pair(ema, model, buffers), buffers, (ema, model))

    def run(self, op: OpName, decay: float | Tensor) -> bool:
        value, on_device = self._prepare(op, decay)
        if self._native:
            return bool(self._native.run(self._ops[op], value, on_device))
        return self._run_once(op, value, on_device)

    def run_with(self, op: OpName, decay: float | Tensor, pairs: Pairs) -> bool:
        """The same on other tensor objects, which must be in the state that this plan was made for."""
        value, on_device = self._prepare(op, decay)
        if self._native:
            return bool(self._native.run_with(pairs.ema, pairs.model, self._ops[op], value, on_device))
        return self._run_once(op, value, on_device)

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def _prepare(self, op: OpName, decay: float | Tensor) -> tuple[float, Tensor | None]:
        """Decay as a number, or as a tensor to be read on the device."""
        if refusal := self._refusals[op]:
            raise type(refusal)(*refusal.args)
        value = _decay(decay)
        if isinstance(value, float):
            if 0.0 < 1.0 - value < self._coarse and op == "update":
                _warn_coarse(value)
            return value, None
        devices = self._about["devices"]
        if devices not in ([], [str(value.device)]):
            raise ValueError(
                f"decay: expected a number or a tensor on the averages' device, {' and '.join(devices)}, "
                f"found one on {value.device}"
            )
        return (_decay(value.item()), None) if value.device.type == "cpu" else (1.0, value)  # type: ignore[return-value]

    def _run_once(self, op: OpName, value: float, on_device: Tensor | None) -> bool:
        checked, self._once = self._once, None
        if checked is None:
            return False
        decay = value if on_device is None else on_device
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


def _run(plan: _Plan, op: OpName, decay: float | Tensor, ema: Source, model: Source, buffers: Buffers) -> _Plan:
    """Runs `plan` if it still fits what the sources hold, else a new one; returns the one that ran."""
    if not (_watchable(ema) and _watchable(model)):
        pairs = pair(ema, model, buffers)
        if not plan.run_with(op, decay, pairs):
            plan = _Plan(pairs, buffers)
            plan.run_with(op, decay, pairs)
        return plan
    if not plan.run(op, decay):
        plan = _Plan.of(ema, model, buffers)
        if not plan.run(op, decay):
            raise RuntimeError("fused_ema: the tensors changed while they were paired; is another thread at work?")
    return plan


def _watchable(source: Source) -> bool:
    """Whether C++ can see by itself that a source holds something else than before."""
    return isinstance(source, (nn.Module, dict, list, tuple))


# Plans of `update` and its kin. Those of modules end with the modules; those of other sources hold no tensors.
_plans: OrderedDict[tuple[Any, ...], tuple[_Plan, tuple[Any, ...]]] = OrderedDict()


def _run_cached(op: OpName, ema: Source, model: Source, decay: float | Tensor, buffers: Buffers) -> None:
    if op == "update" and torch.compiler.is_compiling():
        return ops.trace_update(pair(ema, model, buffers), decay, buffers)
    if isinstance(ema, nn.Module) and isinstance(model, nn.Module):
        key: tuple[Any, ...] = (id(ema), id(model), buffers)
        cached = _plans.get(key)
        plan = cached[0] if cached else _Plan.of(ema, model, buffers)
        used = _run(plan, op, decay, ema, model, buffers)
        if not cached or used is not plan:
            _keep(key, used, tuple(weakref.ref(side, lambda _: _plans.pop(key, None)) for side in (ema, model)))
        return
    pairs = pair(ema, model, buffers)
    key = (len(pairs.ema), buffers, id(type(ema)), *(t.data_ptr() for t in pairs.ema[:1] if type(t) in PLAIN_TYPES))
    cached = _plans.get(key)
    if not cached or not cached[0].run_with(op, decay, pairs):
        plan = _Plan(pairs, buffers)
        plan.run_with(op, decay, pairs)
        _keep(key, plan, ())


def _keep(key: tuple[Any, ...], plan: _Plan, references: tuple[Any, ...]) -> None:
    _plans[key] = (plan, references)
    _plans.move_to_end(key)
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


def _refuse_capture(devices: list[str]) -> None:
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
    try:
        value = float(decay)
    except (TypeError, ValueError):
        raise TypeError(f"decay: expected a number or a 0-d tensor, found {type(decay).__name__}") from None
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ValueError(f"decay: expected a value in [0, 1], found {value}")
    return value


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
            stacklevel=6,
        )


def _update_lists(ema: list[Tensor], model: list[Tensor], decay: Tensor) -> None:
    _run_cached("update", ema, model, decay, "copy")


ops.implement(_update_lists)
