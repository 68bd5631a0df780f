"""What a pair of tensors must be. Everything here runs before the first byte is written, on every backend."""

from __future__ import annotations

import enum
import itertools
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import shards
from .arguments import check_buffers
from .pairing import Pairs

if TYPE_CHECKING:
    from ..manager.averages import Averages

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
PLAIN_TYPES = frozenset({Tensor, nn.Parameter, nn.Buffer})


class Action(enum.IntEnum):
    """What becomes of a pair. The numbers are those of `Action` in csrc/plan.h."""

    NONE = 0
    COPY = 1
    AVERAGE = 2


class Checked(NamedTuple):
    """Pairs that may be written, and why an operation on them may not (None where it may)."""

    pairs: Pairs  # of what lies on this rank, where they are sharded
    sharded: Pairs | None  # those that were asked for, where some of them are
    actions: list[Action]
    no_update: Exception | None
    no_swap: Exception | None


class _Span(NamedTuple):
    """The bytes a tensor touches, [begin, end)."""

    begin: int
    end: int
    name: str


def check(pairs: Pairs, buffers: str, *, free_types: bool = False) -> Checked:
    """Raises ValueError, TypeError or RuntimeError, naming the tensor, where a pair can't be used.

    `free_types`: averages may be narrower than the model, exchanged with it though the types differ, and kept in pinned
    memory of the host.
    """
    check_buffers(buffers)
    whole = pairs
    if sharded := any(map(shards.is_sharded, (*pairs.ema, *pairs.model))):
        for label, ema, model in zip(*pairs[:3], strict=True):
            if refusal := shards.refusal(f"ema{label}", ema, model):
                raise refusal
        pairs = shards.localized(pairs)
    floating_buffers = {"copy": Action.COPY, "average": Action.AVERAGE, "ignore": Action.NONE}
    actions = []
    for label, ema, model, parameter in zip(*pairs, strict=True):
        check_tensor(f"ema{label}", ema)
        check_tensor(f"model{label}", model)
        _check_pair(f"ema{label}", ema, model, free_types)
        floating = Action.AVERAGE if parameter else floating_buffers[buffers]
        actions.append(Action.NONE if ema.numel() == 0 else floating if ema.dtype in WIDTH else Action.COPY)
    _drop_repeated(pairs, actions)

    active = [
        (f"ema{label}", ema, f"model{label}", model, action)
        for label, ema, model, action in zip(*pairs[:3], actions, strict=True)
        if action is not Action.NONE
    ]
    ema_spans = sorted(_span(name, ema) for name, ema, _, _, _ in active)
    model_spans = sorted(_span(name, model) for _, _, name, model, _ in active)
    if shared := _overlap(ema_spans):
        raise shared
    _check_apart(ema_spans, model_spans)
    refusals = (_update_refusal(name, ema, model) for name, ema, _, model, act in active if act is Action.AVERAGE)
    no_update = next((refusal for refusal in refusals if refusal and not free_types), None)
    refusals = (_swap_refusal(name, ema, other, model, free_types) for name, ema, other, model, _ in active)
    no_swap = next((refusal for refusal in refusals if refusal), None) or _overlap(model_spans)
    return Checked(pairs, whole if sharded else None, actions, no_update, no_swap)


def _drop_repeated(pairs: Pairs, actions: list[Action]) -> None:
    """Tied tensors: a pair that comes again runs once; one average for two different tensors is an error."""
    first: dict[tuple[object, ...], int] = {}
    for i, (ema, model) in enumerate(zip(pairs.ema, pairs.model, strict=True)):
        if actions[i] is Action.NONE:
            continue
        before = first.setdefault(memory(ema), i)
        if before == i:
            continue
        if memory(pairs.model[before]) != memory(model):
            one, other = pairs.labels[before], pairs.labels[i]
            raise ValueError(
                f"ema{other}: expected one model tensor for each average, "
                f"found model{one} and model{other} both feeding the average ema{one}"
            )
        actions[i] = Action.NONE


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if why := _elsewhere(tensor):
        raise RuntimeError(f"{name}: {why}")
    tensor = shards.local(tensor)
    if is_lazy(tensor):
        raise RuntimeError(f"{name}: expected an initialised parameter, found a lazy one; run a forward pass first")
    if type(tensor) not in PLAIN_TYPES:
        raise TypeError(f"{name}: expected a plain tensor, found {type(tensor).__name__}")
    if tensor._is_zerotensor() or torch._is_functional_tensor(tensor):
        raise RuntimeError(
            f"{name}: expected a tensor with memory of its own, found one that stands for zeros or a trace"
        )
    if _is_functorch(tensor):
        raise RuntimeError(f"{name}: expected a plain tensor, found one inside a torch.func transform such as vmap")
    if tensor.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, found a nested one")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, found layout {tensor.layout}")
    if tensor.dtype not in WIDTH and tensor.dtype not in COPIED:
        raise TypeError(f"{name}: expected a real, complex, integer or bool type, found {dtype_name(tensor)}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, found one on the meta device")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name}: expected resolved values, found a lazy conjugate or negation; clone it first")
    if refusal := storage_refusal(name, tensor):
        raise refusal
    alignment = tensor.element_size() // (2 if tensor.is_complex() else 1)
    if tensor.numel() and has_address(tensor) and tensor.data_ptr() % alignment:
        raise ValueError(f"{name}: expected an address aligned to {dtype_name(tensor)}, found {tensor.data_ptr():#x}")


def storage_refusal(name: str, tensor: Tensor) -> Exception | None:
    """Where a dense tensor has less memory than it says; to read it would end the process."""
    if not tensor.numel() or not has_address(tensor):
        return None
    needed = (tensor.storage_offset() + _extent(tensor)) * tensor.element_size()
    found = tensor.untyped_storage().nbytes()
    if found >= needed:
        return None
    state = "freed" if found == 0 else f"of {found} bytes"
    return RuntimeError(f"{name}: expected a storage of at least {needed} bytes; storage of {name!r} is {state}")


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Of whatever types; NaN equals NaN."""
    return a is b or (a.shape == b.shape and torch.allclose(a, b.to(a), rtol=0, atol=0, equal_nan=True))


def _elsewhere(tensor: Tensor) -> str:
    """What to do about a parameter whose values lie somewhere else, as some trainers have it; "" where they don't."""
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return (
            "expected a parameter of its own, found one of FullyShardedDataParallel (FSDP1), which keeps its values in "
            "a flat one and moves them at each forward pass: shard by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if getattr(tensor, "ds_numel", 0) and tensor.numel() == 0:
        return (
            "expected a parameter with values, found an empty one, which DeepSpeed's ZeRO-3 has spread: update within "
            "deepspeed.zero.GatheredParameters(model.parameters()), or train with stage 2"
        )
    return ""


def _check_pair(name: str, ema: Tensor, model: Tensor, free_types: bool) -> None:
    if ema.shape != model.shape:
        raise ValueError(f"{name}: expected shape {tuple(model.shape)}, as in model, found {tuple(ema.shape)}")
    pinned = free_types and model.is_cuda and ema.device.type == "cpu" and (ema.numel() == 0 or ema.is_pinned())
    if ema.device != model.device and not pinned:
        dtype = dtype_name(ema)
        raise ValueError(f"{name}: expected {dtype} on {model.device}, as in model, found {dtype} on {ema.device}")
    both_real = ema.dtype.is_floating_point and model.dtype.is_floating_point
    both_complex = ema.dtype.is_complex and model.dtype.is_complex
    if ema.dtype != model.dtype and not both_real and not both_complex:
        raise TypeError(
            f"{name}: expected {dtype_name(model)} or a type it can be averaged in, found {dtype_name(ema)}"
        )
    if refusal := write_refusal(name, ema):
        raise refusal


def check_targets(values: Mapping[str, Tensor], into: Mapping[str, Tensor], averages: Averages) -> None:
    """Raises where to write `values` into the tensors of their names would write to some other of them, or to the
    averages: of tensors that share memory, as tied ones do, all have to get the same. (Others than the averaged ones
    may lie on one another, as in the model that they come from.)"""
    targets = {name: tensor for name in values if (tensor := shards.local(into[name])).numel()}
    first: dict[tuple[object, ...], str] = {}
    for name, target in targets.items():
        before = first.setdefault(memory(target), name)
        one, other = (shards.local(values[each]) for each in (before, name))
        if memory(one) != memory(other) and not equal_values(one, other):
            raise ValueError(
                f"model[{name!r}]: expected memory of its own, found that of {before!r}, whose average is another"
            )
    shared = overlapping(targets)
    both = [name for name, target in targets.items() if memory(target) in shared]
    if any(name in averages for name in both):
        raise ValueError(f"model: expected tensors with memory of their own, found bytes shared by {both[:5]}")
    ours = averages.storages()
    for name, target in targets.items():
        if target.untyped_storage().data_ptr() in ours and memory(target) != memory(shards.local(values[name])):
            raise ValueError(f"model[{name!r}]: expected memory of its own, found that of the averages; clone it first")


def _update_refusal(name: str, ema: Tensor, model: Tensor) -> Exception | None:
    if WIDTH[ema.dtype] >= WIDTH[model.dtype]:
        return None
    wanted, found = dtype_name(model), dtype_name(ema)
    return TypeError(f"{name}: expected an average at least as wide as the model's {wanted}, found {found}")


def _swap_refusal(ema_name: str, ema: Tensor, model_name: str, model: Tensor, free_types: bool) -> Exception | None:
    if ema.dtype != model.dtype and not free_types:
        wanted, found = dtype_name(model), dtype_name(ema)
        return TypeError(f"{ema_name}: expected {wanted}, as in model, to exchange values, found {found}")
    return write_refusal(model_name, model)


def write_refusal(name: str, tensor: Tensor) -> Exception | None:
    tensor = shards.local(tensor)
    if tensor.numel() and _overlaps_itself(tensor):
        shape, strides = tuple(tensor.shape), tensor.stride()
        return ValueError(f"{name}: expected elements with memory of their own, found {shape} with strides {strides}")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return RuntimeError(f"{name}: Inplace update to inference tensor outside InferenceMode is not allowed")
    return None


def _overlap(spans: list[_Span]) -> Exception | None:
    """An error where two of the sorted spans share bytes."""
    for before, after in itertools.pairwise(spans):
        if after.begin < before.end:
            return ValueError(f"{after.name}: expected memory of its own, found bytes shared with {before.name}")
    return None


def overlapping(tensors: Mapping[str, Tensor]) -> set[tuple[object, ...]]:
    """The memory of those that share some bytes with another, but are not the same elements."""
    spans = {memory(tensor): _span(name, tensor) for name, tensor in tensors.items() if tensor.numel()}
    found: set[tuple[object, ...]] = set()
    widest = None
    for key, span in sorted(spans.items(), key=lambda each: each[1]):
        if widest and span.begin < widest[1].end:
            found |= {key, widest[0]}
        if widest is None or span.end > widest[1].end:
            widest = (key, span)
    return found


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


def memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same elements."""
    return (address(tensor), tensor.dtype, tensor.shape, tensor.stride())


def _span(name: str, tensor: Tensor) -> _Span:
    begin = address(tensor)
    return _Span(begin, begin + _extent(tensor) * tensor.element_size(), name)


def address(tensor: Tensor) -> int:
    """Where its memory begins; for kinds that have no address, a number of its own."""
    return tensor.data_ptr() if has_address(tensor) else id(tensor) << 64


def has_address(tensor: Tensor) -> bool:
    """Whether data_ptr() is an address of bytes, which raises or means nothing for other kinds."""
    return tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided and not _is_functorch(tensor)


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
