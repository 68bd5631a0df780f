"""The tensors that a manager keeps: one or several averages of each parameter, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..pairs.checks import check_tensor
from ..pairs.shards import Spread, is_sharded, local
from ..plan import nth_average

_ALIGNMENT = 128  # bytes from one average of a tensor to the next are a multiple of this: whole vectors, whole lines


class Averages:
    """`count` averages of each named tensor, one after the other in one piece of memory; tied names share it.

    Args:
        tensors: what is averaged, by name.
        count: of averages.
        dtype: see `fused_ema.EMA`.
        device: None, or where all of it goes.
    """

    def __init__(self, tensors: dict[str, Tensor], count: int, dtype: torch.dtype, device: torch.device | None) -> None:
        self.count = count
        # In memory of the host that kernels on CUDA devices write to, so pinned.
        self.on_host = device is not None and device.type == "cpu" and any(t.is_cuda for t in tensors.values())
        self._first: dict[str, Tensor] = {}  # of sharded ones, what lies on this rank
        self._spread = {name: spread for name, tensor in tensors.items() if (spread := Spread.of(tensor))}
        if device is not None and self._spread:
            raise ValueError(f"device: expected None for a model that is sharded over a mesh, found {device}")
        tied: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in tied:
                tied[id(tensor)] = _empty(name, tensor, count, dtype, device)
            self._first[name] = tied[id(tensor)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __contains__(self, name: str) -> bool:
        return name in self._first

    def untied(self) -> dict[str, Tensor]:
        """The first average of each tensor, under one of its names."""
        return {name: self._first[name] for name in {id(tensor): name for name, tensor in self._first.items()}.values()}

    def storages(self) -> set[int]:
        """Where the memory begins that they lie in, on this rank."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._first.values() if tensor.numel()}

    def firsts(self) -> list[Tensor]:
        return [self.spread(name, tensor) for name, tensor in self._first.items()]

    def spread(self, name: str, shard: Tensor) -> Tensor:
        """`shard`, which lies on this rank, as the tensor that it is part of; itself where nothing is sharded."""
        return self._spread[name].tensor(shard) if name in self._spread else shard

    def sharded(self) -> bool:
        return bool(self._spread)

    def gathered(self, tensors: dict[str, Tensor]) -> bool:
        """Whether some of the model's tensors are whole now, of which the averages are shards."""
        return any(name in self._spread and not is_sharded(tensor) for name, tensor in tensors.items())

    def apart(self) -> list[int]:
        """Elements from one average to the next, for each name."""
        return [self._apart(tensor) for tensor in self._first.values()]

    def get(self, name: str, k: int) -> Tensor:
        """Average k; of a sharded one, what lies on this rank."""
        first = self._first[name]
        return first.detach() if k == 0 else nth_average(first, self._apart(first), k)

    def _apart(self, first: Tensor) -> int:
        return _apart(first.numel(), first.dtype, self.count)

    def cuda_devices(self) -> list[torch.device]:
        return list(dict.fromkeys(tensor.device for tensor in self._first.values() if tensor.is_cuda))

    def to(self, device: torch.device) -> None:
        if self._spread:
            raise ValueError(f"device: expected the mesh's own for averages that are sharded over one, found {device}")
        from_cuda = bool(self.cuda_devices())
        self.on_host = device.type == "cpu" and (self.on_host or from_cuda)
        self._move(lambda whole: whole.to(device))

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        moved: dict[int, Tensor] = {}
        for name, tensor in self._first.items():
            if id(tensor) not in moved:
                whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
                whole = move(whole)
                if self.on_host and torch.cuda.is_available():
                    whole = whole.pin_memory()
                moved[id(tensor)] = whole.as_strided(tensor.shape, tensor.stride(), 0)
            self._first[name] = moved[id(tensor)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.on_host:  # neither a pickle nor a copy is pinned
            self._move(lambda whole: whole)


def _empty(name: str, tensor: Tensor, count: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Memory for the averages of one tensor, as the first of them, with the tensor's strides where it is dense."""
    check_tensor(f"model[{name!r}]", tensor)
    tensor = local(tensor)
    target = tensor.device if device is None else device
    if target.type not in ("cpu", tensor.device.type):
        raise ValueError(f"device: expected 'cpu' or that of model[{name!r}], {tensor.device}, found {device}")
    strides = torch.empty_like(tensor, device="meta").stride()
    dtype = _average_dtype(tensor, dtype)
    pinned = target.type == "cpu" and tensor.is_cuda
    with torch.inference_mode(False):
        size = count * _apart(tensor.numel(), dtype, count)
        return torch.empty(size, dtype=dtype, device=target, pin_memory=pinned).as_strided(tensor.shape, strides)


def _apart(numel: int, dtype: torch.dtype, count: int) -> int:
    unit = _ALIGNMENT // dtype.itemsize
    return math.ceil(numel / unit) * unit if count > 1 else numel


def _average_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if dtype.itemsize == 2:
        return tensor.dtype if tensor.is_complex() else dtype
    return torch.promote_types(tensor.dtype, dtype)
