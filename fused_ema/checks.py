"""What a pair of tensors must be. Everything here runs before the first byte is written, on every backend."""

from __future__ import annotations

import enum
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from .pairing import Pairs

# Width in bits orders the real types an average may have; each complex type counts as its real part.
WIDTH = {
    torch.bfloat16: 16,
    torch.float16: 16,
    torch.float32: 32,
    torch.float64: 64,
    torch.complex64: 32,
    torch.complex128: 64,
}
COPIED = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}
    | {dtype for name in ("uint16", "uint32", "uint64") if (dtype := getattr(torch, name, None))}
)
PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)


class Action(enum.IntEnum):
    """What becomes of a pair. The numbers are those of `Action` in csrc/plan.h."""

    NONE = 0
    COPY = 1
    AVERAGE = 2


class Checked(NamedTuple):
    """Pairs that may be written, and why an operation on them may not (None where it may)."""

    pairs: Pairs
    actions: list[Action]
    no_update: str | None
    no_swap: str | None


class _Span(NamedTuple):
    """The bytes a tensor touches, [begin, end)."""

    begin: int
    end: int
    name: str


def check(pairs: Pairs, buffers: str) -> Checked:
    """Raises ValueError, TypeError or RuntimeError, naming the tensor, where a pair can't be used."""
    floating_buffers = {"copy": Action.COPY, "average": Action.AVERAGE, "ignore": Action.NONE}
    if buffers not in floating_buffers:
        raise ValueError(f"buffers: expected 'copy', 'average' or 'ignore', found {buffers!r}")
    actions: list[Action] = []
    ema_spans: list[_Span] = []
    model_spans: list[_Span] = []
    fed_by: dict[tuple[object, ...], tuple[str, tuple[object, ...], str]] = {}
    swapped_with: dict[tuple[object, ...], str] = {}
    no_update = no_swap = None
    for label, ema, model, parameter in zip(*pairs, strict=True):
        ema_name, model_name = f"ema{label}", f"model{label}"
        _check_tensor(ema_name, ema)
        _check_tensor(model_name, model)
        _check_pair(ema_name, ema, model)
        if ema.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{ema_name}: Inplace update to inference tensor outside InferenceMode is not allowed")

        action = Action.COPY
        if ema.dtype in WIDTH:
            action = Action.AVERAGE if parameter else floating_buffers[buffers]
        ema_memory, model_memory = _memory(ema), _memory(model)
        if ema.numel() == 0:
            action = Action.NONE
        elif ema_memory in fed_by:
            other, other_memory, other_model = fed_by[ema_memory]
            if other_memory != model_memory:
                raise ValueError(
                    f"{ema_name}: expected one model tensor for each average, found {other_model} and {model_name} "
                    f"both feeding the average that is {other} and {ema_name}"
                )
            action = Action.NONE
        else:
            fed_by[ema_memory] = (ema_name, model_memory, model_name)
            ema_spans.append(_span(ema_name, ema))
            model_spans.append(_span(model_name, model))
            twice = swapped_with.setdefault(model_memory, model_name)
            if twice != model_name:
                no_swap = no_swap or f"{model_name}: expected one average for each model tensor, found two; the other is {twice}"
            no_swap = no_swap or _swap_refusal(ema_name, ema, model_name, model)
        if action is Action.AVERAGE and WIDTH[ema.dtype] < WIDTH[model.dtype]:
            no_update = no_update or (
                f"{ema_name}: expected an average at least as wide as the model's {dtype_name(model)}, found {dtype_name(ema)}"
            )
        actions.append(action)

    ema_spans.sort()
    model_spans.sort()
    _check_disjoint(ema_spans)
    _check_apart(ema_spans, model_spans)
    if no_swap is None:
        no_swap = _overlap(model_spans)
    return Checked(pairs, actions, no_update, no_swap)


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if isinstance(tensor, UninitializedTensorMixin):
        raise RuntimeError(f"{name}: expected an initialised parameter, found a lazy one; run a forward pass first")
    if type(tensor) not in PLAIN_TYPES:
        raise TypeError(f"{name}: expected a plain tensor, found {type(tensor).__name__}")
    if _is_functorch(tensor):
        raise RuntimeError(f"{name}: expected a plain tensor, found one inside a torch.func transform such as vmap")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found layout {tensor.layout}")
    if tensor.dtype not in WIDTH and tensor.dtype not in COPIED:
        raise TypeError(f"{name}: expected a real, complex, integer or bool type, found {dtype_name(tensor)}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, found one on the meta device")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name}: expected resolved values, found a lazy conjugate or negation; clone it first")
    if tensor.numel() and _has_addresses(tensor):
        needed = (tensor.storage_offset() + _extent(tensor)) * tensor.element_size()
        found = tensor.untyped_storage().nbytes()
        if found < needed:
            state = "freed" if found == 0 else f"of {found} bytes"
            raise RuntimeError(f"{name}: expected a storage of at least {needed} bytes; storage of {name!r} is {state}")
        if tensor.data_ptr() % (tensor.element_size() // (2 if tensor.is_complex() else 1)):
            raise ValueError(f"{name}: expected an address aligned to {dtype_name(tensor)}, found {tensor.data_ptr():#x}")


def _check_pair(name: str, ema: Tensor, model: Tensor) -> None:
    if ema.shape != model.shape:
        raise ValueError(f"{name}: expected shape {tuple(model.shape)}, as in model, found {tuple(ema.shape)}")
    if ema.device != model.device:
        raise ValueError(
            f"{name}: expected {dtype_name(ema)} on {model.device}, as in model, found {dtype_name(ema)} on {ema.device}"
        )
    both_real = ema.dtype.is_floating_point and model.dtype.is_floating_point
    both_complex = ema.dtype.is_complex and model.dtype.is_complex
    if ema.dtype != model.dtype and not both_real and not both_complex:
        raise TypeError(f"{name}: expected {dtype_name(model)} or a type it can be averaged in, found {dtype_name(ema)}")
    if ema.numel() and _overlaps_itself(ema):
        raise ValueError(
            f"{name}: expected an average whose elements have memory of their own, "
            f"found shape {tuple(ema.shape)} with strides {ema.stride()}"
        )


def _swap_refusal(ema_name: str, ema: Tensor, model_name: str, model: Tensor) -> str | None:
    if ema.dtype != model.dtype:
        return f"{ema_name}: expected {dtype_name(model)}, as in model, to exchange values, found {dtype_name(ema)}"
    if _overlaps_itself(model):
        return (
            f"{model_name}: expected elements with memory of their own, "
            f"found shape {tuple(model.shape)} with strides {model.stride()}"
        )
    if model.is_inference() and not torch.is_inference_mode_enabled():
        return f"{model_name}: Inplace update to inference tensor outside InferenceMode is not allowed"
    return None


def _check_disjoint(spans: list[_Span]) -> None:
    if found := _overlap(spans):
        raise ValueError(found)


def _overlap(spans: list[_Span]) -> str | None:
    """A sentence where two of the sorted spans share bytes."""
    for before, after in zip(spans, spans[1:], strict=False):
        if after.begin < before.end:
            return f"{after.name}: expected memory of its own, found bytes shared with {before.name}"
    return None


def _check_apart(ema_spans: list[_Span], model_spans: list[_Span]) -> None:
    # The averages are disjoint by now, so the only ones that can reach into a model's span are the last one that
    # begins before it ends.
    begins = [span.begin for span in ema_spans]
    for span in model_spans:
        at = bisect_right(begins, span.end - 1) - 1
        if at >= 0 and ema_spans[at].end > span.begin:
            raise ValueError(
                f"{ema_spans[at].name}: expected memory of its own, found bytes shared with {span.name}; "
                "make the average a copy of the model (copy.deepcopy, or clone each tensor)"
            )


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return (_address(tensor), tensor.dtype, tensor.shape, tensor.stride())


def _span(name: str, tensor: Tensor) -> _Span:
    begin = _address(tensor)
    return _Span(begin, begin + _extent(tensor) * tensor.element_size(), name)


def _address(tensor: Tensor) -> int:
    # Elsewhere data_ptr() is no address of bytes, and a tensor's identity has to do.
    return tensor.data_ptr() if _has_addresses(tensor) else id(tensor) << 64


def _has_addresses(tensor: Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda")


def _extent(tensor: Tensor) -> int:
    """Elements from the first to one past the last, of a tensor that has any."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _is_functorch(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
