"""The tensors that a manager keeps: one or several averages of each parameter, by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..pairs.checks import check_tensor
from ..pairs.memory import nth_average, storage
from ..pairs.shards import Sharding, is_sharded, local

_ALIGNMENT = 128  # bytes from one average of a tensor to the next are a multiple of this: whole vectors, whole lines


class Averages:
    """`count` averages of each named tensor, one after the other in one piece of memory; tied names share it.

    Args:
        tensors: what is averaged, by name.
        count: how many averages of each tensor there are.
        dtype: see `fused_ema.EMA`.
        device: where all of them go; None: each average lies on its tensor's device.
    """

    def __init__(self, tensors: dict[str, Tensor], count: int, dtype: torch.dtype, device: torch.device | None) -> None:
        self.count = count
        self.dtype = dtype
        # Kernels write to averages on the host of a model on CUDA devices, so these lie in pinned memory.
        self.on_host = device is not None and device.type == "cpu" and any(t.is_cuda for t in tensors.values())
        self._first: dict[str, Tensor] = {}  # the first average of each; of sharded ones, the shard on this rank
        self._shardings = {name: sharding for name, tensor in tensors.items() if (sharding := Sharding.of(tensor))}
        tied: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in tied:
                tied[id(tensor)] = _empty(name, tensor, count, dtype, device)
            self._first[name] = tied[id(tensor)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __contains__(self, name: str) -> bool:
        return name in self._first

    @torch.inference_mode(False)
    def following(self, tensors: Mapping[str, Tensor]) -> tuple[Averages, list[str]]:
        """Averages of `tensors`, and the names of those that have yet to be written, since nothing of their name and
        shape is averaged here. The others keep their memory, or a copy of it where they were tied to each other."""
        new = copy.copy(self)
        fitting: dict[int, Tensor] = {}  # for each of the model's tensors, the first average that it may keep
        for name, tensor in tensors.items():
            if self._fits(name, tensor):
                fitting.setdefault(id(tensor), self._first[name])
        fresh = {name: tensor for name, tensor in tensors.items() if id(tensor) not in fitting}
        begun = Averages(fresh, self.count, self.dtype, torch.device("cpu") if self.on_host else None)
        owners: dict[int, int] = {}  # of the memory that is kept
        for key, first in fitting.items():
            if owners.setdefault(id(first), key) != key:
                fitting[key] = self._moved(first, Tensor.clone)
        new._first = {name: begun._first[name] if name in fresh else fitting[id(t)] for name, t in tensors.items()}
        new._shardings = {name: sharding for name, t in tensors.items() if (sharding := Sharding.of(t))}
        return new, list(fresh)

    def _fits(self, name: str, tensor: Tensor) -> bool:
        """Whether the average of this name can be that of the tensor."""
        if name not in self or is_lazy(tensor):
            return False
        first = self._first[name]
        same = first.shape == local(tensor).shape and first.is_complex() == tensor.is_complex()
        return same and Sharding.of(tensor) == self._shardings.get(name)

    def reshaped(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.Size]]:
        """The names whose tensors have another shape than their averages, with both."""
        shapes = {
            name: (self._shardings[name].shape if name in self._shardings else self._first[name].shape, tensor.shape)
            for name, tensor in tensors.items()
            if not is_lazy(tensor)
        }
        return {name: (ours, theirs) for name, (ours, theirs) in shapes.items() if ours != theirs}

    def untied(self) -> dict[str, Tensor]:
        """The first average of each tensor, under one of its names."""
        return {name: self._first[name] for name in {id(tensor): name for name, tensor in self._first.items()}.values()}

    def storages(self) -> set[int]:
        """Where the storages of all averages on this rank begin."""
        return {storage(tensor) for tensor in self._first.values() if tensor.numel()}

    def firsts(self, names: Iterable[str]) -> list[Tensor]:
        """The first average of each of these names, sharded as the model's tensor is."""
        return [self.as_sharded(name, self._first[name]) for name in names]

    def as_sharded(self, name: str, shard: Tensor) -> Tensor:
        """The sharded tensor whose part on this rank is `shard`; `shard` itself where the name is not sharded."""
        return self._shardings[name].tensor(shard) if name in self._shardings else shard

    def sharded(self) -> bool:
        return bool(self._shardings)

    def gathered(self, tensors: dict[str, Tensor]) -> bool:
        """Whether some of the model's tensors are gathered now whose averages are shards."""
        return any(name in self._shardings and not is_sharded(tensor) for name, tensor in tensors.items())

    def strides(self, names: Iterable[str]) -> list[int]:
        """For each of these names, the elements from one average to the next."""
        return [self._stride(self._first[name]) for name in names]

    def get(self, name: str, k: int) -> Tensor:
        """Average number `k` of a name; of a sharded one, the shard on this rank."""
        first = self._first[name]
        return first.detach() if k == 0 else nth_average(first, self._stride(first), k)

    def _stride(self, first: Tensor) -> int:
        return _stride(first.numel(), first.dtype, self.count)

    def cuda_devices(self) -> list[torch.device]:
        return list(dict.fromkeys(tensor.device for tensor in self._first.values() if tensor.is_cuda))

    def to(self, device: torch.device) -> None:
        from_cuda = bool(self.cuda_devices())
        self.on_host = device.type == "cpu" and (self.on_host or from_cuda)
        self._move(lambda memory: memory.to(device))

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        moved: dict[int, Tensor] = {}
        for name, tensor in self._first.items():
            if id(tensor) not in moved:
                moved[id(tensor)] = self._moved(tensor, move)
            self._first[name] = moved[id(tensor)]

    def _moved(self, first: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        memory = move(first.as_strided((first.untyped_storage().nbytes() // first.element_size(),), (1,), 0))
        if self.on_host and torch.cuda.is_available():
            memory = memory.pin_memory()
        return memory.as_strided(first.shape, first.stride(), 0)

    def to_plain(self) -> dict[str, Any]:
        """What a pickle of a manager holds: names, numbers and tensors, and no class of this package."""
        shardings = {name: tuple(sharding) for name, sharding in self._shardings.items()}
        plain = {"count": self.count, "dtype": self.dtype, "on_host": self.on_host}
        return {**plain, "first": self._first, "shardings": shardings}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Averages:
        self = cls.__new__(cls)
        self.count, self.on_host, self._first = plain["count"], plain["on_host"], plain["first"]
        self.dtype = plain.get("dtype", torch.float32)
        self._shardings = {name: Sharding(*each) for name, each in plain["shardings"].items()}
        if self.on_host:  # neither a pickle nor a copy is pinned
            self._move(lambda memory: memory)
        return self


def _empty(name: str, tensor: Tensor, count: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Memory for the averages of one tensor, viewed as the first of them, with the strides of a dense tensor."""
    check_tensor(f"model[{name!r}]", tensor)
    tensor = local(tensor)
    target = tensor.device if device is None else device
    if target.type not in ("cpu", tensor.device.type):
        raise ValueError(f"device: expected 'cpu' or {tensor.device}, where model[{name!r}] is, found {device}")
    strides = torch.empty_like(tensor, device="meta").stride()
    dtype = _average_dtype(tensor, dtype)
    pinned = target.type == "cpu" and tensor.is_cuda
    with torch.inference_mode(False):
        size = count * _stride(tensor.numel(), dtype, count)
        return torch.empty(size, dtype=dtype, device=target, pin_memory=pinned).as_strided(tensor.shape, strides)


def _stride(numel: int, dtype: torch.dtype, count: int) -> int:
    unit = _ALIGNMENT // dtype.itemsize
    return math.ceil(numel / unit) * unit if count > 1 else numel


def _average_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if dtype.itemsize == 2:
        return tensor.dtype if tensor.is_complex() else dtype
    return torch.promote_types(tensor.dtype, dtype)
