"""`update` as one node of a traced graph, `torch.ops.fused_ema.lerp_`. It is used only while torch.compile traces:
elsewhere the plain call is several times cheaper than the dispatcher with its lists."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pairs import shards
from .pairs.pairing import Pairs

torch.library.define(
    "fused_ema::lerp_",
    "(Tensor(a!)[] ema, Tensor[] param, Tensor decay, str[]? labels=None, bool[]? averaged=None, "
    "bool[]? optional=None) -> ()",
)
torch.library.register_fake("fused_ema::lerp_", lambda *_, **__: None)


def implement(update: Callable[[Pairs, Tensor], None]) -> None:
    """Makes the operation run `update`, with all its checks, once real tensors arrive."""

    def run(
        ema: list[Tensor],
        param: list[Tensor],
        decay: Tensor,
        labels: list[str] | None = None,
        averaged: list[bool] | None = None,
        optional: list[bool] | None = None,
    ) -> None:
        labels = labels or [f"[{i}]" for i in range(len(ema))]
        update(Pairs(labels, ema, param, averaged or [True] * len(ema), optional or ()), decay)

    torch.library.impl("fused_ema::lerp_", "CompositeExplicitAutograd", run)


def trace_update(pairs: Pairs, decay: float | Tensor) -> None:
    """Records an update of these pairs as one call of the operation."""
    if not pairs.ema:
        return
    if not isinstance(decay, Tensor):
        if not 0.0 <= decay <= 1.0:
            raise ValueError("decay: expected a value in [0, 1]")  # tracing does not know the value
        # A product, since torch.full would make the number a constant, and compile again for each one.
        decay = torch.ones((), dtype=torch.float64, device=pairs.ema[0].device) * decay
    shards.check(pairs)
    with torch.no_grad():
        ema, model = ([_shard(tensor) for tensor in side] for side in (pairs.ema, pairs.model))
        torch.ops.fused_ema.lerp_(ema, model, decay, pairs.labels, pairs.averaged, list(pairs.optional))


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if shards.is_sharded(tensor) else tensor  # type: ignore[attr-defined]
