"""What a manager shows of itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..pairs.checks import check_tensor, dtype_name, storage_refusal
from ..pairs.shards import local
from ..runners import reference

if TYPE_CHECKING:
    from .ema import EMA


def describe(ema: EMA) -> dict[str, Any]:
    try:
        plan = ema._fitting_plan().describe()
    except (ValueError, TypeError, RuntimeError) as problem:
        plan = {"problem": str(problem)}
    untied = ema._averages.untied().values()
    return {
        **plan,
        "averages": len(ema.schedules),
        "average_bytes": sum(tensor.untyped_storage().nbytes() for tensor in untied),
        "dtype": ", ".join(sorted({dtype_name(tensor) for tensor in untied})),
        "rounding": ema.rounding,
        "schedules": [repr(schedule) for schedule in ema.schedules],
        "decay": ema.decay,
        "step": ema.step,
        "updates": ema.updates,
        "swapped": ema._swap.index if ema._swap else None,
        "not_averaged": ema._selection.left_out(),
    }


def summary(ema: EMA) -> str:
    about = describe(ema)
    if "problem" in about:
        return f"EMA({type(ema.model).__name__}: {about['problem']})"
    left = f" ({len(about['not_averaged'])} left out)" if about["not_averaged"] else ""
    return (
        f"EMA({type(ema.model).__name__}: {about['tensors']} tensors{left}, {about['elements']:,} elements, "
        f"{about['averages']} x {about['dtype']}, backend {about['backend']!r}, "
        f"{about['bytes_per_update']:,} bytes per update; schedule {', '.join(about['schedules'])}; "
        f"step {about['step']}, decay {about['decay']}{', swapped' if ema._swap else ''})"
    )


@torch.no_grad()
def distance(ema: EMA, index: int) -> dict[str, float]:
    decays = ema.decay
    decay = decays[index] if isinstance(decays, tuple) else decays
    current = ema._current()
    apart = size = still = elements = 0.0
    for name in ema._averages.untied():
        average = ema._shard(name, index)
        if refusal := storage_refusal(f"the average of {name!r}", average):
            raise refusal
        check_tensor(f"model[{name!r}]", current[name])
        parameter = local(current[name]).detach().to(average.device)
        wide = torch.complex128 if average.is_complex() else torch.float64
        apart += (average.to(wide) - parameter.to(wide)).abs().square().sum().item()
        size += parameter.to(wide).abs().square().sum().item()
        moved = average.clone()
        reference.update_(moved, parameter, decay, average=True)
        still += ((moved == average) & (average != parameter)).sum().item()
        elements += average.numel()
    return {
        "relative": math.sqrt(apart / size) if size else math.nan,
        "still": still / elements if elements else 0.0,
    }
