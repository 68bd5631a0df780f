"""Describes a manager, for `EMA.describe`, `repr` and `EMA.distance`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._warning import warn
from ..pairs.checks import check_tensor, dtype_name, storage_refusal
from ..pairs.pairing import listed
from ..pairs.shards import local
from ..runners import reference
from .averages import Averages
from .timetable import Nonfinite, Timetable


def describe(plan: dict[str, Any], averages: Averages, timetable: Timetable, **more: Any) -> dict[str, Any]:
    """See `EMA.describe`. `plan` describes what an update does, `more` is what the manager adds."""
    untied = averages.untied().values()
    return {
        **plan,
        "averages": averages.count,
        "average_bytes": sum(tensor.untyped_storage().nbytes() for tensor in untied),
        "dtype": ", ".join(sorted({dtype_name(tensor) for tensor in untied})),
        "rounding": timetable.rounding,
        "nonfinite": timetable.nonfinite,
        "schedules": [repr(schedule) for schedule in timetable.schedules],
        **more,
    }


def summary(about: dict[str, Any], model: str) -> str:
    """One line, from what `describe` returns."""
    if "problem" in about:
        return f"EMA({model}: {about['problem']})"
    left = f" ({len(about['not_averaged'])} not averaged)" if about["not_averaged"] else ""
    return (
        f"EMA({model}: {about['tensors']} tensors{left}, {about['elements']:,} elements, "
        f"{about['averages']} x {about['dtype']}, backend {about['backend']!r}, "
        f"{about['bytes_per_update']:,} bytes per update; schedule {', '.join(about['schedules'])}; "
        f"step {about['step']}, decay {about['decay']}{'' if about['swapped'] is None else ', swapped'})"
    )


def warn_of_nonfinite(averages: Iterable[Mapping[str, Tensor]], nonfinite: Nonfinite) -> None:
    """Warns of averages, by name, that hold NaN or infinity; `nonfinite` is their manager's option."""
    named = [(name, local(tensor)) for each in averages for name, tensor in each.items()]
    named = [(name, tensor) for name, tensor in named if storage_refusal(name, tensor) is None]
    finite = reference.are_finite([tensor for _, tensor in named])
    bad = list(dict.fromkeys(name for (name, _), fine in zip(named, finite, strict=True) if not fine))
    if not bad:
        return
    if nonfinite == "skip":
        advice = (
            "or make the manager again from a finite model. Updates with nonfinite='skip' brought no NaN: the averages "
            "began or were loaded with such elements, the block of swapped() wrote them, or the averages' dtype is too "
            "narrow for the model's values"
        )
    else:
        advice = (
            "and pass nonfinite='skip' to EMA, so that elements of the model that are not finite leave their averages "
            "as they are"
        )
    warn(
        f"EMA: averages hold NaN or infinity, which stay in them for good: {listed(bad)}. "
        f"EMA.distance() counts such elements. Go on from an earlier state, {advice}"
    )


@torch.no_grad()
def distance(pairs: Iterable[tuple[str, Tensor, Tensor]], decay: float, nonfinite: Nonfinite) -> dict[str, float]:
    """See `EMA.distance`. `pairs`: a name, its average and its tensor in the model; of sharded ones, shards."""
    gap = size = still = elements = 0.0
    bad = {"model": 0, "average": 0}
    for name, average, tensor in pairs:
        if refusal := storage_refusal(f"the average of {name!r}", average):
            raise refusal
        check_tensor(f"model[{name!r}]", tensor)
        parameter = local(tensor).detach().to(average.device)
        if parameter.shape != average.shape:
            found = tuple(parameter.shape)
            raise ValueError(f"model[{name!r}]: expected shape {tuple(average.shape)}, as the average's, found {found}")
        wide = torch.complex128 if average.is_complex() else torch.float64
        gap += (average.to(wide) - parameter.to(wide)).abs().square().sum().item()
        size += parameter.to(wide).abs().square().sum().item()
        moved = average.clone()
        reference.update_(moved, parameter, decay, average=True, finite=nonfinite == "skip")
        still += ((moved == average) & (average != parameter)).sum().item()
        elements += average.numel()
        for side, values in (("model", parameter), ("average", average)):
            bad[side] += values.numel() - int(values.isfinite().sum())
    return {
        "relative": math.sqrt(gap / size) if size else math.nan,
        "still": still / elements if elements else 0.0,
        "nonfinite_model": bad["model"],
        "nonfinite_average": bad["average"],
    }
