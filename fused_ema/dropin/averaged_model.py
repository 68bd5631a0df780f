"""A drop-in for torch.optim.swa_utils.AveragedModel: `fused_ema.AveragedModel`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from .._warning import warn_once
from ..functional import EMAMultiAvgFn, copy_, update
from ..pairs.arguments import Buffers
from ..pairs.pairing import pair


class AveragedModel(swa_utils.AveragedModel):
    """torch's AveragedModel, with an `update_parameters` of one kernel launch per device.

    It is a subclass, so that `isinstance` holds, and constructor, attributes, `forward` and states are those of the
    PyTorch that is installed, whose documentation has the arguments. `torch.optim.swa_utils.update_bn` takes it.

    `avg_fn` and `multi_avg_fn` say what an update does:

    - neither, or what `get_swa_avg_fn` and `get_swa_multi_avg_fn` of torch return: the mean of all models so far;
    - what `get_ema_avg_fn` and `get_ema_multi_avg_fn` of torch, or the latter of fused_ema, return: the exponential
      moving average with that decay;
    - a function of your own: PyTorch's own code calls it as before, and a warning says so once.

    Source: `torch.optim.swa_utils.AveragedModel`.
    """

    _counted: tuple[Tensor, float, int] | None = None  # see _count

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a number on the host, the count, breaks the graph
    def update_parameters(self, model: nn.Module) -> None:
        """Moves the averages towards the model, and counts the update in `n_averaged`. The first one copies the model.

        Args:
            model: the module that this object was made from, or one with tensors of the same names and shapes, in types
                that are not wider. The segments that DDP, torch.compile and FSDP put into names are ignored.

        The buffers are copied, or averaged with `use_buffers`, as by `fused_ema.update` with `buffers="copy"` or
        "average". If averages and model are on different devices, PyTorch's own code moves each tensor at each update,
        and a warning says so once.

        Raises:
            ValueError, TypeError, RuntimeError: a tensor can't be used. The text calls a tensor of `self.module`
                `ema['name']`, and one of the model `model['name']`. Nothing is written or counted.

        Equivalent to::

            weight = 1 - decay  # of the mean: 1 / (n_averaged + 1)
            theirs = dict(model.named_parameters())
            with torch.no_grad():
                for name, average in averaged.module.named_parameters():
                    average.lerp_(theirs[name].to(average.dtype), weight if averaged.n_averaged else 1)
                theirs = dict(model.named_buffers())
                for name, buffer in averaged.module.named_buffers():
                    buffer.copy_(theirs[name])
                averaged.n_averaged += 1

        computed in float32 (float64 where either side is) and rounded once, with a fused multiply-add.
        """
        function = self.avg_fn if self.multi_avg_fn is None else self.multi_avg_fn
        count = self._count()
        decay = _decay(function, count)
        if decay is None:
            warn_once(
                f"fused_ema.AveragedModel: {_name(function)} is a function of your own, so PyTorch's own code calls "
                "it, at the old speed; for one launch, pass multi_avg_fn=fused_ema.get_ema_multi_avg_fn(decay), or "
                "no function for the mean"
            )
            return super().update_parameters(model)
        buffers: Buffers = "average" if self.use_buffers else "copy"
        try:
            if count:  # update keeps its plan as a bound handle does, but it does not keep the model alive
                update(self.module, model, decay, buffers=buffers)
            else:
                copy_(self.module, model, buffers=buffers)
        except ValueError as refusal:
            if apart := _apart(self.module, model, buffers):
                warn_once(
                    f"fused_ema.AveragedModel: the averages are on {apart[0]} and the model is on {apart[1]}, so that "
                    "PyTorch's code moves each tensor at each update; pass device= to keep both on one, or use "
                    "fused_ema.EMA, which updates averages in the host's memory without a copy on the GPU"
                )
                return super().update_parameters(model)
            raise ValueError(_WAYS_ON.sub(_WAY_ON, str(refusal))) from None
        counter = self.n_averaged.add_(1)
        if _waits(counter):
            self._counted = (counter, _version(counter), count + 1)

    def _count(self) -> int:
        """`n_averaged` as a number. Reading it from a GPU waits for the device, so it is read only if something other
        than the last update has written it."""
        counter = self.n_averaged
        if not _waits(counter):
            return int(counter)
        if self._counted and self._counted[0] is counter and self._counted[1] == _version(counter):
            return self._counted[2]
        return int(counter)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_counted"}


AveragedModel.__module__ = "fused_ema"  # so that pickles and errors name what users import

_WAYS_ON = re.compile(r"; to [^;]*, pass names='common'")
_WAY_ON = "; pass the model that AveragedModel was made from, or make a new AveragedModel of this one"


def _waits(counter: Tensor) -> bool:
    return not counter.is_cpu


def _version(counter: Tensor) -> float:
    """Rises with each write; NaN, which equals nothing, where PyTorch does not count writes."""
    return math.nan if counter.is_inference() else counter._version


def _inner(function: Any) -> Any:
    """The function itself, without torch.no_grad() around it."""
    return getattr(function, "__wrapped__", function)


def _codes(*makers: Callable[..., Any]) -> list[Any]:
    """What all functions that a maker returns have in common, by which they are recognized."""
    codes = (getattr(_inner(make()), "__code__", None) for make in makers)
    return [code for code in codes if code]  # if a later PyTorch has none, its own code runs


_MEANS = _codes(swa_utils.get_swa_avg_fn, swa_utils.get_swa_multi_avg_fn)
_EMAS = _codes(swa_utils.get_ema_avg_fn, swa_utils.get_ema_multi_avg_fn)


def _decay(function: Any, count: int) -> Any:
    """The decay that the function stands for after `count` models; None for one that is not known here."""
    if type(function) is EMAMultiAvgFn:
        return function.decay
    inner = _inner(function)
    code: Any = getattr(inner, "__code__", None)
    if function is None or code in _MEANS:
        return count / (count + 1)
    if code in _EMAS and "decay" in code.co_freevars:
        return inner.__closure__[code.co_freevars.index("decay")].cell_contents
    return None


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _apart(ema: nn.Module, model: nn.Module, buffers: Buffers) -> tuple[str, str] | None:
    """The devices of the first average that is on another device than its model; None where there is none, or where
    names or shapes differ."""
    try:
        pairs = pair(ema, model, buffers)
    except ValueError:
        return None
    both = list(zip(pairs.ema, pairs.model, strict=True))
    if any(average.shape != tensor.shape for average, tensor in both):
        return None
    return next(((str(a.device), str(tensor.device)) for a, tensor in both if a.device != tensor.device), None)
