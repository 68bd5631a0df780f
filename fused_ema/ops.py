"""The operation as a node of a traced graph: `torch.ops.fused_ema.lerp_`, used while torch.compile traces and only then
(outside, the plain call is several times cheaper than the dispatcher with its lists)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pairing import Pairs

torch.library.define("fused_ema::lerp_", "(Tensor(a!)[] ema, Tensor[] param, Tensor decay) -> ()")
torch.library.register_fake("fused_ema::lerp_", lambda ema, param, decay: None)


def implement(update: Callable[[list[Tensor], list[Tensor], Tensor], None]) -> None:
    """Makes `update` what the operation runs, once real tensors arrive."""
    torch.library.impl("fused_ema::lerp_", "CompositeExplicitAutograd", update)


def trace_update(pairs: Pairs, decay: float | Tensor, buffers: str) -> None:
    """`fused_ema.update` as nodes of the graph that is being traced; the operation checks the tensors when it runs."""
    average = [
        (parameter or buffers == "average") and ema.dtype.is_floating_point | ema.dtype.is_complex
        for ema, parameter in zip(pairs.ema, pairs.parameter, strict=True)
    ]
    averaged = [(e, p) for e, p, yes in zip(pairs.ema, pairs.model, average, strict=True) if yes]
    copied = [(e, p) for e, p, yes in zip(pairs.ema, pairs.model, average, strict=True) if not yes]
    device = pairs.ema[0].device if pairs.ema else None
    if not isinstance(decay, Tensor):
        decay = torch.full((), decay, dtype=torch.float64, device=device)
    with torch.no_grad():
        if averaged:
            torch.ops.fused_ema.lerp_([e for e, _ in averaged], [p for _, p in averaged], decay)
        for ema, model in copied:
            ema.copy_(torch.where(decay == 1, ema, model))
