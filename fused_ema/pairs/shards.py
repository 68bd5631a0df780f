"""Sharded tensors (DTensor: FSDP2, tensor parallelism). An update needs only the shards on its own rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .pairing import Pairs


def is_sharded(tensor: object) -> bool:
    library = sys.modules.get("torch.distributed.tensor")  # there is no DTensor before something imports it
    return library is not None and isinstance(tensor, library.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The shard on this rank, as the tensor object that holds the memory; a plain tensor as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor. Every rank has to call this for a sharded tensor."""
    if not is_sharded(tensor):
        return tensor
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    if local(tensor).device.type != mesh.device_type:  # the mesh may be unable to gather from host memory
        tensor = Sharding.of(tensor).tensor(local(tensor).to(_gathers_on(mesh)))  # type: ignore[union-attr]
    return tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]


def _gathers_on(mesh: Any) -> str:
    """The type of the devices that the mesh communicates between."""
    return str(mesh.device_type)


def first_here(tensor: Tensor) -> bool:
    """Whether this rank is the first of those that share the tensor, and acts for all of them."""
    if not is_sharded(tensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    return coordinate is not None and not any(coordinate)


def localized(pairs: Pairs) -> Pairs:
    """The pairs with each sharded tensor replaced by its shard on this rank."""
    return pairs._replace(ema=[*map(local, pairs.ema)], model=[*map(local, pairs.model)])


def reshard(model: nn.Module) -> None:
    """Frees the full parameters that FSDP2 gathered for a forward pass, without communication."""
    library = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if library else ():
        if isinstance(module, library.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


class Sharding(NamedTuple):
    """How a tensor is sharded over the ranks of a mesh."""

    mesh: Any  # DeviceMesh
    placements: tuple[Any, ...]  # Shard, Replicate
    shape: torch.Size  # of the full tensor
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Sharding | None:
        if not is_sharded(tensor):
            return None
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())  # type: ignore[attr-defined]

    def tensor(self, shard: Tensor) -> Tensor:
        """The DTensor with this shard. The shape is known, so even uneven shards need no communication.

        A shard in host memory may belong to a mesh of CUDA devices, as FSDP2's CPUOffloadPolicy has it. `from_local`
        would copy that to the device, so it describes a meta tensor first.
        """
        library: Any = torch.distributed.tensor
        on_mesh = shard.device.type == self.mesh.device_type
        with torch.no_grad():
            made: Any = library.DTensor.from_local(
                shard if on_mesh else shard.detach().to("meta"),
                self.mesh,
                self.placements,
                run_check=False,
                shape=self.shape,
                stride=self.stride,
            )
            if not on_mesh:
                made = library.DTensor(shard.detach(), made._spec, requires_grad=False)
        return made  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"a DTensor of shape {tuple(self.shape)} with placements {self.placements} on {self.mesh}"


def fits(full: Tensor, other: Tensor) -> bool:
    """Whether `full` is a plain tensor, and `other` a sharded one of its shape, so that `like` cuts out a shard."""
    if is_sharded(full) or not is_sharded(other) or full.shape != other.shape:
        return False
    library = torch.distributed.tensor
    # Other placements, as FSDP2 over tensor parallelism has, may put the rows into another order.
    return all(type(each) in (library.Shard, library.Replicate) for each in other.placements)  # type: ignore[attr-defined]


def like(full: Tensor, other: Tensor) -> Tensor:
    """The full tensor, sharded as `other` is, where it `fits`, else as it is. No rank needs any other."""
    if not fits(full, other):
        return full
    library = torch.distributed.tensor
    mesh = other.device_mesh  # type: ignore[attr-defined]
    with torch.no_grad():
        copies = (library.Replicate(),) * mesh.ndim
        here = full.detach().to(local(other).device)
        everywhere = Sharding(mesh, copies, here.shape, here.stride()).tensor(here)
        return everywhere.redistribute(mesh, other.placements)  # type: ignore[attr-defined, no-any-return]


def refusal(name: str, ema: Tensor, model: Tensor, gather: str = "", shard: str = "") -> Exception | None:
    """The reason where two tensors are not sharded in the same way. All other checks look at their shards.

    `gather` and `shard`: what to do where only `ema` is sharded, and where only `model` is.
    """
    ours, theirs = Sharding.of(ema), Sharding.of(model)
    if ours is None and theirs is None:
        return None
    for side in (ours, theirs):
        if side and any(placement.is_partial() for placement in side.placements):
            return ValueError(f"{name}: expected shards or replicas, found {side}, which still has to be reduced")
    if ours and theirs and ours.shape != theirs.shape:
        return ValueError(
            f"{name}: expected shape {tuple(theirs.shape)}, as on the other side, found {tuple(ours.shape)}"
        )
    if ours is None or theirs is None:
        plain = "a tensor that is not sharded"
        hint = gather if ours else shard
        return ValueError(f"{name}: expected {theirs or plain}, as on the other side, found {ours or plain}{hint}")
    if ours.mesh != theirs.mesh or ours.placements != theirs.placements:
        return ValueError(f"{name}: expected {theirs}, as on the other side, found {ours}")
    return None


_RESHARD = "; after a forward pass alone FSDP leaves parameters unsharded: call model.reshard()"
_SHARD = (
    "; shard the averages as the model is sharded: make the fused_ema.EMA after fully_shard, not before (it can load "
    "the state of one that was made before)"
)


def check(pairs: Pairs) -> None:
    """Raises where the tensors of a pair are not sharded in the same way."""
    for label, ema, model in zip(pairs.labels, pairs.ema, pairs.model, strict=True):
        if problem := refusal(f"ema{label}", ema, model, gather=_RESHARD, shard=_SHARD):
            raise problem


def written(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that sharded tensors have changed; the counters of their shards are already up to date."""
    for tensor in tensors:
        if is_sharded(tensor) and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
