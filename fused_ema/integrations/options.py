"""The options that a callback hands on to `fused_ema.EMA`, checked before there is a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..manager.ema import EMA
from ..manager.selection import Select
from ..manager.timetable import Nonfinite, Rounding
from ..pairs.arguments import Buffers, average_index


class Options(TypedDict, total=False):
    """See `fused_ema.EMA`."""

    dtype: torch.dtype
    device: torch.device | str | None
    buffers: Buffers
    select: Select | None
    update_every: int
    update_after_step: int
    rounding: Rounding
    seed: int
    nonfinite: Nonfinite


def check_options(decay: Any, index: int, options: Options, **flags: bool) -> None:
    """Raises what `fused_ema.EMA` would raise for every model; `flags` are the callback's own True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, found {flag!r}")
    known = list(inspect.signature(EMA).parameters)[2:]  # after the model and the decay
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"options: expected those of fused_ema.EMA ({', '.join(known)}), found {', '.join(unknown)}")
    torch.device(options.get("device") or "cpu")  # raises; a tensor there could keep forked processes from CUDA
    given: Any = {**options, "device": None}
    if callable(given.get("select")):
        given["select"] = None  # the names are not those of the user's model
    manager = EMA(nn.LayerNorm(1, device="cpu"), decay, **given)  # a layer that takes no random numbers
    average_index(index, len(manager.schedules))


def reselect_as_saved(ema: EMA, select: Select | None, state: Mapping[str, Any], *, drop: bool = False) -> None:
    """Averages what a saved state names and `select` takes once it trains: layers that were unfrozen after the start,
    and are frozen again in a new run. With `drop`, nothing else. Later calls of `ema.reselect()` use `select`."""
    if select is None:
        return
    names: set[str] | None = set(state["averages"][0])

    def chosen(name: str, tensor: Tensor) -> bool:
        if names is not None and name in names:
            tensor = nn.Parameter(tensor.detach())
        elif names is not None and drop:
            return False
        return select(name, tensor)

    ema.reselect(chosen)
    names = None
