"""update, copy_, swap_, bind: the operation itself."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from . import plan as plans
from .pairs import shards
from .pairs.arguments import Buffers, Names, check_buffers, check_decay, check_names, decay_number
from .pairs.checks import PLAIN_TYPES, without_unfit
from .pairs.memory import has_address
from .pairs.pairing import Pairs, Source, pair
from .plan import Plan
from .runners import choose
from .runners.base import Call, OpName
from .runners.watch import watch


def update(
    ema: Source, model: Source, decay: float | Tensor, *, buffers: Buffers = "copy", names: Names = "equal"
) -> None:
    """Moves the averages towards the model, in place, in one kernel launch per device.

    Args:
        ema: the averages: a module, a mapping of names to tensors, or a sequence of tensors. float32, float64,
            bfloat16, float16, complex64 or complex128, each at least as wide as the tensor it averages.
        model: what is averaged: the same kind as `ema`, the same shapes and devices. Modules and mappings are paired
            by name, with the segments `module.`, `_orig_mod.`, `_checkpoint_wrapped_module.` and
            `_fsdp_wrapped_module.` ignored; sequences by position. Of sharded tensors (DTensor: FSDP2, tensor
            parallelism) each rank averages what lies on it; both sides have one mesh and the same placements.
        decay: a float in [0, 1], or a 0-d float32 or float64 tensor on the averages' device, which is read there,
            without waiting for it: on a GPU its value is not checked. 1 writes nothing at all, 0 copies.
        buffers: what to do with a module's buffers: "copy" (as torch's AveragedModel does), "average", "ignore", or a
            function of a name (without the segments of wrappers) and the model's buffer that returns one of these. It
            is called when the tensors are paired, not at each update; define it once, since a new function at each call
            may cause a new pairing. Even where "average" is asked for, these are copied: integers and bools; buffers
            that are not persistent; and the vectors of spectral norm's power iteration, which are copied whatever is
            asked, since they belong to the latest weights. Buffers that are not persistent never stop an
            update: one that has another shape on the other side, or is missing there, is left out. A mapping or
            a sequence does not distinguish buffers from parameters: all its floating tensors are averaged.
        names: "equal": each name must be on both sides. "common": tensors whose name or shape only one side has are
            left out, and a warning names them once. Not for sequences.

    Raises:
        ValueError, TypeError, RuntimeError: a tensor can't be used, or the two sides have none in common. The text
            names it, and says what was expected and what was found. Nothing is written.

    Equivalent to::

        theirs = dict(model.named_parameters())
        with torch.no_grad():
            for name, average in ema.named_parameters():
                average.lerp_(theirs[name].to(average.dtype), 1 - decay)
            theirs = dict(model.named_buffers())
            for name, buffer in ema.named_buffers():
                buffer.copy_(theirs[name])

    computed in float32 (float64 where either side is) and rounded once, with a fused multiply-add.

    Example::

        ema = copy.deepcopy(model)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            fused_ema.update(ema, model, 0.999)

    `bind` does the same with less overhead per call; `EMA` also keeps the averages for you.
    """
    _run_cached("update", ema, model, decay, buffers, names)


def copy_(ema: Source, model: Source, *, buffers: Buffers = "copy", names: Names = "equal") -> None:
    """ema ← model, in place, in one kernel launch per device, with the cast that the dtypes need.

    Takes the arguments of `update`, and allows averages narrower than the model; raises the same errors.

    Equivalent to ``average.copy_(parameter)`` under ``torch.no_grad()`` for each pair.
    """
    _run_cached("copy", ema, model, 0.0, buffers, names)


def swap_(ema: Source, model: Source, *, buffers: Buffers = "copy", names: Names = "equal") -> None:
    """Exchanges the values of ema and model, in place; every tensor keeps its address.

    Takes the arguments of `update`, with equal dtypes on both sides; raises the same errors. With
    ``buffers="ignore"`` buffers stay where they are, except the vectors of spectral norm, which belong to the weights.

    Equivalent to ``old = average.clone(); average.copy_(parameter); parameter.copy_(old)`` for each pair.
    """
    _run_cached("swap", ema, model, 0.0, buffers, names)


class Binding:
    """The cached handle behind `update`, `copy_` and `swap_`: see `bind`."""

    def __init__(self, ema: Source, model: Source, *, buffers: Buffers = "copy", names: Names = "equal") -> None:
        check_buffers(buffers)
        check_names(names)
        self._sources = (ema, model, buffers, names)
        self._plan: Plan | None = None
        self._current_plan()

    def update(self, decay: float | Tensor) -> None:
        """`fused_ema.update` for the bound sources."""
        if _recorded():
            _reshard(*self._sources[:2])
            return ops.trace_update(pair(*self._sources), decay)
        self._run(_call("update", decay))

    def copy_(self) -> None:
        """`fused_ema.copy_` for the bound sources."""
        self._run(Call("copy"))

    def swap_(self) -> None:
        """`fused_ema.swap_` for the bound sources."""
        self._run(Call("swap"))

    def _run(self, call: Call) -> None:
        plan = plans.run(self._plan, call, _new_plan, *self._sources)
        if plan is not self._plan:
            self._keep(plan)

    def prepare(self) -> None:
        """Prepares for a CUDA graph capture: pairs tensors that were replaced since the last call, and uploads their
        addresses. Call it right before the capture; during one, a plan that no longer fits raises RuntimeError."""
        self._current_plan()

    def _current_plan(self) -> Plan:
        if self._plan is None or not self._plan.fits():
            return self._keep(_new_plan(*self._sources))
        return self._plan

    def _keep(self, plan: Plan) -> Plan:
        self._plan = plan if plan.lasts else None
        return plan

    def describe(self) -> dict[str, Any]:
        """What an update does: `backend` (see `fused_ema.backend`; two are joined by "+"), `runner` ("extension",
        "nvrtc" or "foreach"), `devices`, `tensors` (without empty and repeated ones), `averaged` and `copied` of them,
        `elements`, `bytes_per_update` (read and written), `launches_per_update` (of kernels; on the CPU, of parallel
        loops; by PyTorch's own operations, of operations on single tensors, which a GPU does many of at a time) and
        `dtypes` (pairs of tensors per "average←model")."""
        return self._current_plan().describe()

    def __repr__(self) -> str:
        about = self.describe()
        return (
            f"Binding({about['tensors']} tensors, {about['elements']:,} elements, "
            f"{about['bytes_per_update']:,} bytes per update, backend {about['backend']!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"sources": self._sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._sources = state["sources"]
        self._plan = None  # the first call makes it: a module that holds its binding may not be complete yet


def bind(ema: Source, model: Source, *, buffers: Buffers = "copy", names: Names = "equal") -> Binding:
    """Returns a handle that pairs `ema` and `model` once and then updates at the cost of one call into C++.

    Takes the arguments of `update` and raises the same errors. Each call still re-reads what the modules, dicts or
    lists hold, and follows where parameters were replaced, moved, cast, added, removed or tied.
    """
    return Binding(ema, model, buffers=buffers, names=names)


def backend(device: torch.device | str | int | None = None) -> str:
    """Returns what would run, now, for tensors on `device`: "cuda" or "cpu" (compiled), "nvrtc" (compiled when first
    needed) or "torch" (PyTorch's own operations).

    `device` defaults to CUDA where it is available, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "cuda" if isinstance(device, int) else torch.device(device).type
    return choose(kind).backend(kind)


class EMAMultiAvgFn:
    """See `get_ema_multi_avg_fn`. It is a class, so that models that hold it can be pickled and deep-copied."""

    def __init__(self, decay: float) -> None:
        self.decay = decay_number(decay)

    def __call__(self, averages: Sequence[Tensor], parameters: Sequence[Tensor], _: Any = None) -> None:
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


def _call(op: OpName, decay: float | Tensor) -> Call:
    if type(decay) is float:
        return _call_of_number(op, decay)
    value = check_decay(decay)
    return Call(op, (1.0,), value) if isinstance(value, Tensor) else _call_of_number(op, value)


@functools.lru_cache(maxsize=256)
def _call_of_number(op: OpName, decay: float) -> Call:
    """Cached, since the check and a tuple of many fields are a fifth of an update of two small tensors."""
    return Call(op, (decay_number(decay),))


def _reshard(*sides: Source) -> None:
    """Reshards FSDP2's modules, which would throw an update of their full parameters away."""
    for side in sides:
        if isinstance(side, nn.Module):
            shards.reshard(side)


def _new_plan(ema: Source, model: Source, buffers: Buffers, names: Names = "equal") -> Plan:
    """Watches the sources, then pairs them, so that the plan sees what another thread changes in between."""
    _reshard(ema, model)
    watched = watch(ema, model)
    pairs = without_unfit(pair(ema, model, buffers, names))
    return Plan(pairs, watched or watch(pairs.ema, pairs.model), lasts=watched is not None)


# The plans of `update`, `copy_` and `swap_`. That of two modules goes when either of them is freed, or the function
# that was asked about their buffers. The others hold no tensors, and go when the memory of their first average is
# freed; the least recently used one goes when all of them together have too many pairs.
_module_plans: dict[tuple[Any, ...], tuple[Plan, tuple[Any, ...]]] = {}
_list_plans: OrderedDict[tuple[Any, ...], tuple[Plan, Any]] = OrderedDict()
_MOST_PAIRS = 1 << 18


def _recorded() -> bool:
    """Whether a tracer or a dispatch mode has to see the call, which must then be a PyTorch operation."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._get_tracing_state():
        raise RuntimeError("fused_ema.update was called under torch.jit.trace, which would leave the update out")
    return False


def _run_cached(op: OpName, ema: Source, model: Source, decay: float | Tensor, buffers: Buffers, names: Names) -> None:
    if buffers != "copy" or names != "equal":  # spares most calls the checks
        check_buffers(buffers)
        check_names(names)
    if op == "update" and _recorded():
        ops.trace_update(pair(ema, model, buffers, names), decay)
    elif isinstance(ema, nn.Module) and isinstance(model, nn.Module):
        asked, owners = (buffers, ()) if isinstance(buffers, str) else _identity(buffers)
        key = (id(ema), id(model), asked, names)
        kept = _module_plans.get(key, (None, ()))[0]
        plan = plans.run(kept, _call(op, decay), _new_plan, ema, model, buffers, names)
        if plan is not kept and plan.lasts:
            with contextlib.suppress(TypeError):  # a function without weak references is asked at each call
                ends = tuple(weakref.ref(x, lambda _: _module_plans.pop(key, None)) for x in (ema, model, *owners))
                _module_plans[key] = (plan, ends)
    else:
        _run_lists(op, pair(ema, model, buffers, names), decay)


def _identity(function: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    """What stands for a function in the key of a plan, and whose ends end the plan; a key keeps neither of them alive.

    A function that refers to nothing but its module's globals is known by its code, since a lambda in a loop is a new
    object at each call.
    """
    if isinstance(function, MethodType):  # a new object each time that it is looked up
        owners: tuple[Any, ...] = (function.__self__, function.__func__)
    elif isinstance(function, FunctionType) and not (
        function.__closure__ or function.__defaults__ or function.__kwdefaults__
    ):
        return (function.__code__, id(function.__globals__)), ()
    else:
        owners = (function,)
    return tuple(map(id, owners)), owners


def _run_lists(op: OpName, pairs: Pairs, decay: float | Tensor) -> None:
    kinds = frozenset([*map(type, pairs.ema), *map(type, pairs.model)])
    begin = _begin(pairs) if pairs.ema and kinds <= PLAIN_TYPES else None
    key = (len(pairs.ema), begin, kinds, tuple(pairs.averaged), pairs.labels[:1] == ["[0]"])
    kept, end = _list_plans.pop(key, (None, None))
    plan = plans.run(kept, _call(op, decay), Plan, pairs, pairs=pairs)
    if plan is kept:
        _list_plans[key] = plan, end
        return
    if begin and has_address(pairs.ema[0]):
        end = weakref.ref(pairs.ema[0].untyped_storage(), lambda _: _list_plans.pop(key, None))
    _list_plans[key] = plan, end
    while sum(count for count, *_ in list(_list_plans)) > _MOST_PAIRS and len(_list_plans) > 1:
        _list_plans.popitem(last=False)


def _begin(pairs: Pairs) -> tuple[int, int] | None:
    """Where the memory of both lists begins; None where the first tensors have none."""
    try:
        return pairs.ema[0].data_ptr(), pairs.model[0].data_ptr()
    except RuntimeError:
        return None


ops.implement(lambda pairs, decay: _run_lists("update", without_unfit(pairs), decay))
