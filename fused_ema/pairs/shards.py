"""Sharded tensors (DTensor: FSDP2, tensor parallelism): what of them lies on this rank. An update needs no more."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pairing import Pairs


def is_sharded(tensor: object) -> bool:
    library = sys.modules.get("torch.distributed.tensor")  # as long as nothing imports it, there are none
    return library is not None and isinstance(tensor, library.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What lies here: the very tensor that holds the memory."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The same, put together from all ranks, each of which calls it, if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def first_here(tensor: Tensor) -> bool:
    """Whether this rank is the one that acts for all that share the tensor."""
    if not is_sharded(tensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    return coordinate is not None and not any(coordinate)


def localized(pairs: Pairs) -> Pairs:
    """Of each tensor, what lies here."""
    return pairs._replace(ema=[*map(local, pairs.ema)], model=[*map(local, pairs.model)])


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has put together for a forward pass: parameters are shards again. Nothing is sent."""
    library = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if library else ():
        if isinstance(module, library.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


class Spread(NamedTuple):
    """How a tensor lies on the ranks of a mesh."""

    mesh: Any  # DeviceMesh
    placements: tuple[Any, ...]  # Shard, Replicate
    shape: torch.Size  # of the whole
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Spread | None:
        if not is_sharded(tensor):
            return None
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())  # type: ignore[attr-defined]

    def tensor(self, shard: Tensor) -> Tensor:
        """The DTensor of which `shard` lies here. Nothing is sent: the shape is known, though shards may be uneven."""
        with torch.no_grad():
            return torch.distributed.tensor.DTensor.from_local(
                shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
            )

    def __str__(self) -> str:
        return f"a DTensor of shape {tuple(self.shape)} with placements {self.placements} on {self.mesh}"


def refusal(name: str, ema: Tensor, model: Tensor) -> Exception | None:
    """Why two tensors don't lie alike. (What they must be apart from that, is asked of their shards.)"""
    ours, theirs = Spread.of(ema), Spread.of(model)
    if ours is None and theirs is None:
        return None
    for side in (ours, theirs):
        if side and any(placement.is_partial() for placement in side.placements):
            return ValueError(f"{name}: expected shards or replicas, found {side}, which waits for a reduction")
    if ours and theirs and ours.shape != theirs.shape:
        return ValueError(
            f"{name}: expected shape {tuple(theirs.shape)}, as on the other side, found {tuple(ours.shape)}"
        )
    if ours is None or theirs is None:
        plain = "a tensor that is not sharded"
        hint = "; after a forward pass alone FSDP leaves parameters unsharded: call model.reshard()" if ours else ""
        return ValueError(f"{name}: expected {theirs or plain}, as on the other side, found {ours or plain}{hint}")
    if ours.mesh != theirs.mesh or ours.placements != theirs.placements:
        return ValueError(f"{name}: expected {theirs}, as on the other side, found {ours}")
    return None


def written(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that what the sharded ones hold has changed; their shards know already."""
    for tensor in tensors:
        if is_sharded(tensor) and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
