"""Checks of pairs of tensors. They all run before the first byte is written, whichever runner follows."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import shards
from .memory import Span, extent, has_address, is_functorch, overlaps, overlaps_itself, place, span, storage
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
PLAIN_TYPES = frozenset({Tensor, nn.Parameter, nn.Buffer})


class Action(enum.IntEnum):
    """What an update does with a pair. The numbers are those of `Action` in csrc/plan.h."""

    NONE = 0
    COPY = 1
    AVERAGE = 2


class Checked(NamedTuple):
    """Pairs that may be written, and the operations on them that may not."""

    pairs: Pairs  # where tensors are sharded, the shards on this rank
    sharded: bool  # whether some of them were
    actions: list[Action]
    no_update: Exception | None  # the reason, where an update is refused
    no_swap: Exception | None  # the reason, where a swap is refused
    spans: dict[int, tuple[Span, Span]]  # of both sides, for each pair whose action is not NONE


def check(pairs: Pairs, *, free_types: bool = False) -> Checked:
    """Raises ValueError, TypeError or RuntimeError, naming the tensor, where a pair can't be used.

    `free_types` lets averages be narrower than the model, be exchanged with it though the types differ, and lie in
    pinned memory of the host.
    """
    if sharded := any(map(shards.is_sharded, (*pairs.ema, *pairs.model))):
        shards.check(pairs)
        pairs = shards.localized(pairs)
    actions = []
    for label, ema, model, averaged in zip(*pairs[:4], strict=True):
        _check_both(label, ema, model, free_types)
        moving = Action.AVERAGE if averaged and ema.dtype in WIDTH else Action.COPY
        actions.append(Action.NONE if ema.numel() == 0 else moving)
    hint = "; call ema.reselect(), which takes the model as it is now" if free_types else ""
    _drop_repeated(pairs, actions, hint)

    active = [
        (f"ema{label}", ema, f"model{label}", model, action)
        for label, ema, model, action in zip(*pairs[:3], actions, strict=True)
        if action is not Action.NONE
    ]
    found = [(span(ema_name, ema), span(model_name, model)) for ema_name, ema, model_name, model, _ in active]
    spans = dict(zip((i for i, action in enumerate(actions) if action is not Action.NONE), found, strict=True))
    objects = {name: id(model) for _, _, name, model, _ in active}
    no_swap = _overlap_refusal({ours for ours, _ in found}, {theirs for _, theirs in found}, objects, hint)
    no_update = None
    for ema_name, ema, model_name, model, action in active:
        if action is Action.AVERAGE and not free_types:
            no_update = no_update or _update_refusal(ema_name, ema, model)
        no_swap = no_swap or _swap_refusal(ema_name, ema, model_name, model, free_types)
    return Checked(pairs, sharded, actions, no_update, no_swap, spans)


def without_unfit(pairs: Pairs) -> Pairs:
    """Without the optional pairs that can't be used: a cache that grew on one side, a table that both sides share."""
    unfit = set()
    for i in [i for i, optional in enumerate(pairs.optional) if optional]:
        label, ema, model = pairs.labels[i], pairs.ema[i], pairs.model[i]
        try:
            _check_both(label, ema, model, free_types=False)
            refusal = shards.refusal(f"ema{label}", ema, model)
        except (TypeError, ValueError, RuntimeError) as problem:
            refusal = problem
        if refusal or storage(shards.local(ema)) == storage(shards.local(model)):
            unfit.add(i)
    kept = [i for i in range(len(pairs.labels)) if i not in unfit]
    return Pairs(*([side[i] for i in kept] for side in pairs)) if unfit else pairs  # type: ignore[arg-type]


def _drop_repeated(pairs: Pairs, actions: list[Action], hint: str) -> None:
    """Makes a pair that is tied to an earlier one run once; refuses one average of two different tensors, with a
    hint."""
    first: dict[tuple[object, ...], int] = {}
    for i, (ema, model) in enumerate(zip(pairs.ema, pairs.model, strict=True)):
        if actions[i] is Action.NONE:
            continue
        before = first.setdefault(place(ema), i)
        if before == i:
            continue
        if place(pairs.model[before]) != place(model):
            one, other = pairs.labels[before], pairs.labels[i]
            raise ValueError(
                f"ema{other}: expected one model tensor for each average, "
                f"found model{one} and model{other} both feeding the average ema{one}{hint}"
            )
        actions[i] = Action.NONE


def _overlap_refusal(ema: set[Span], model: set[Span], objects: dict[str, int], hint_for_ties: str) -> Exception | None:
    """Raises where an average shares bytes with anything else. Where tensors of the model share bytes, a swap alone is
    refused: returns the reason. `objects` are the ids of the model's tensors by name; tied ones are one object."""
    refusal = None
    for before, after in overlaps(ema | model):
        if before in model and after in model:
            hint = hint_for_ties if objects[before.name] == objects[after.name] else ""
            refusal = refusal or ValueError(
                f"{after.name}: expected memory of its own, found bytes shared with {before.name}{hint}"
            )
            continue
        average, other = (after, before) if after in ema else (before, after)
        hint = "" if other in ema else "; make the average a copy of the model (copy.deepcopy, or clone each tensor)"
        raise ValueError(f"{average.name}: expected memory of its own, found bytes shared with {other.name}{hint}")
    return refusal


def check_tensor(name: str, tensor: object) -> None:
    """Raises where no operation here can read the tensor."""
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
    if is_functorch(tensor):
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
    """The reason where a dense tensor has less memory than its shape needs; reading it would end the process."""
    if not tensor.numel() or not has_address(tensor):
        return None
    needed = (tensor.storage_offset() + extent(tensor)) * tensor.element_size()
    found = tensor.untyped_storage().nbytes()
    if found >= needed:
        return None
    state = "freed" if found == 0 else f"of {found} bytes"
    return RuntimeError(f"{name}: expected a storage of at least {needed} bytes; storage of {name!r} is {state}")


def write_refusal(name: str, tensor: Tensor) -> Exception | None:
    """The reason where a tensor can't be written in place."""
    tensor = shards.local(tensor)
    if tensor.numel() and overlaps_itself(tensor):
        shape, strides = tuple(tensor.shape), tensor.stride()
        return ValueError(f"{name}: expected elements with memory of their own, found {shape} with strides {strides}")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return RuntimeError(f"{name}: Inplace update to inference tensor outside InferenceMode is not allowed")
    return None


def _elsewhere(tensor: Tensor) -> str:
    """What to do about a parameter whose values a trainer keeps somewhere else; "" where the tensor holds them."""
    if getattr(tensor, "_fsdp_flattened", False) or getattr(tensor, "_is_flat_param", False):
        return (
            "expected a parameter of its own, found one of FullyShardedDataParallel (FSDP1), which keeps its values in "
            "a flat one and moves them at each forward pass: shard by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if getattr(tensor, "ds_numel", 0) and tensor.numel() == 0:
        return (
            "expected a parameter with values, found an empty one, which DeepSpeed's ZeRO-3 has sharded: update within "
            "deepspeed.zero.GatheredParameters(model.parameters()), or train with stage 2"
        )
    return ""


def _check_both(label: str, ema: Tensor, model: Tensor, free_types: bool) -> None:
    check_tensor(f"ema{label}", ema)
    check_tensor(f"model{label}", model)
    _check_pair(f"ema{label}", ema, model, free_types)


def _check_pair(name: str, ema: Tensor, model: Tensor, free_types: bool) -> None:
    if ema.shape != model.shape:
        hint = "; to leave it out, pass names='common'" if name.startswith(("ema['", 'ema["')) else ""
        raise ValueError(f"{name}: expected shape {tuple(model.shape)}, as in model, found {tuple(ema.shape)}{hint}")
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


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, of any types, hold equal values; NaN equals NaN."""
    return a is b or (a.shape == b.shape and torch.allclose(a, b.to(a), rtol=0, atol=0, equal_nan=True))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
