"""Averages from and for other packages, and plain safetensors files of them.

    restore(ema, load("last.pth.tar"))            # timm's checkpoint; its keys tell which layout it is
    torch.save(export(ema, "diffusers"), path)    # what EMAModel.load_state_dict takes
    save_safetensors("model.safetensors", ema)    # what model.load_state_dict takes

| layout | whose state | averages | count |
| --- | --- | --- | --- |
| "averaged_model" | torch's AveragedModel | by name, after `module.` | n_averaged: our updates, and the first copy |
| "timm" | a checkpoint of timm's | by name, in `state_dict_ema` | none |
| "diffusers" | EMAModel | `shadow_params`, by position | optimization_step: our step |
| "ema_pytorch" | ema_pytorch.EMA | by name, after `ema_model.` | step: our step |
| "torch_ema" | ExponentialMovingAverage | `shadow_params`, by position | num_updates: our step - update_after_step |
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..manager.ema import EMA
from ..manager.selection import tensors_of
from ..pairs.arguments import check_floating, whole_number
from ..pairs.checks import check_tensor, equal_values
from ..pairs.pairing import by_plain_name, listed, plain_name
from ..schedules import inverse_power, tf_warmup
from .files import safetensors, save, storable

__all__ = ["LAYOUTS", "export", "load", "restore", "save_safetensors"]


File: TypeAlias = "str | os.PathLike[str]"

_MARKS = {  # the keys that tell a layout: the first counts, but for timm's
    "averaged_model": ("n_averaged",),
    "timm": ("state_dict_ema",),
    "diffusers": ("optimization_step", "shadow_params"),
    "ema_pytorch": ("step", "initted"),
    "torch_ema": ("num_updates", "shadow_params"),
}
_PREFIXES = {"averaged_model": "module.", "timm": "", "ema_pytorch": "ema_model."}  # of the layouts by name
LAYOUTS = tuple(_MARKS)


def export(
    ema: EMA,
    layout: str,
    index: int = 0,
    *,
    parameters: Iterable[Tensor] | None = None,
    include_online: bool = True,
) -> dict[str, Any]:
    """The average as the state of another package: what its `load_state_dict` takes, in tensors and numbers.

    Averages keep their dtype, and are copies where the manager has several, or while they are in the model; what is not
    averaged is the model's. Names are those of `model.state_dict()`, for timm without what DDP and torch.compile put in
    front.

    Of the schedule, diffusers' and torch_ema's state have a part. diffusers goes on as we would with `constant`,
    `half_life`, `inverse_power` and `tf_warmup`; torch_ema with the same but `inverse_power`, and it counts for
    `tf_warmup` alone. Any other becomes the decay of the latest update, for good. No layout holds `update_every`.
    Averages of buffers have no place among `shadow_params`.

    Args:
        layout: one of `LAYOUTS`.
        index: of the average.
        parameters: for `shadow_params`, what the other package is given, where that is not `model.parameters()`.
        include_online: for "ema_pytorch", with the model's own weights, as its `include_online_model` (the default).

    Raises:
        ValueError: unknown layout, or `parameters` that are not the model's.
        RuntimeError: the model's own weights are asked for while it is swapped.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    index = ema._check_index(index)
    ema.wait()
    if layout not in _PREFIXES:
        places, averages = _places(ema, layout, parameters).values(), ema._by_tensor(index)
        shadows = [averages.get(id(place), place.detach()) for place in places]
        return {**_scalars(ema, layout, index), "shadow_params": shadows}
    averaged = ema.averaged_state_dict(index)
    if layout == "timm":
        return {"state_dict_ema": _unwrapped(ema.model, averaged)}
    named = {_PREFIXES[layout] + key: value for key, value in averaged.items()}
    if layout == "averaged_model":
        copied = 0 < ema.update_after_step <= ema.step
        return {"n_averaged": torch.tensor(ema.updates + copied), **named}
    if include_online and ema._swap:
        raise RuntimeError("export: expected the model's own weights, found it swapped; pass include_online=False")
    online = ema.model.state_dict() if include_online else {}
    named = {**{f"online_model.{key}": value for key, value in online.items()}, **named}
    return {"initted": torch.tensor(True), "step": torch.tensor(ema.step), **named}


def restore(
    ema: EMA,
    state: Mapping[str, Any],
    layout: str | None = None,
    index: int = 0,
    *,
    parameters: Iterable[Tensor] | None = None,
    step: int | None = None,
) -> None:
    """Takes over average and step from the state of another package; nothing else: the schedules stay.

    Names are compared without the segments of wrappers; of tied ones, one is enough. Values for what is not averaged
    are ignored. The step stays where none is counted: by timm, and by torch_ema without `use_num_updates`.

    Args:
        state: the `state_dict()`; for timm the checkpoint, of which all but `state_dict_ema` is ignored.
        layout: one of `LAYOUTS`; None: told by the keys.
        index: of the average. (All averages have one step.)
        parameters: for `shadow_params`, what the other package was given, where that is not `model.parameters()`.
        step: the manager's from now on; None: the state's.

    Raises:
        ValueError, TypeError: an unknown layout; no count of steps where the schedule would begin with a copy, or none
            that is whole; other names, shapes or number of tensors, or wider types than the averages': the
            differences. Nothing is changed.
        IndexError: there is no average of that index.
        RuntimeError: while swapped. Nothing is changed.
    """
    index = ema._check_index(index)
    layout = _layout_of(state, layout)
    step = _step_of(ema, layout, state) if step is None else whole_number("step", step, 0)
    upcoming = ema.step + 1 if ema.step < ema.update_after_step else ema.timetable.step_of(ema.updates + 1)
    if step is None and 0.0 in ema.timetable.decays_at(upcoming):
        raise ValueError(f"state: the layout {layout!r} counts no steps, and the next update would copy: pass step=")
    new = ema.state_dict()
    new["averages"][index] = _averages(ema, layout, _given(layout, state), _places(ema, layout, parameters))
    if step is not None:
        count = ema.timetable.updates_at(step)
        new.update(
            step=step,
            updates=count,
            decays=list(ema.timetable.decays_at(ema.timetable.step_of(count))) if count else [],
        )
    ema.load_state_dict(new)


def load(path: File, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint from a .safetensors file, or from any other with `torch.load(weights_only=True)`.

    timm's hold an argparse.Namespace, which is let in, since it runs nothing.

    Raises:
        ValueError: a pickle that could run code, as EDM2's, is refused; or the file is truncated, corrupt, or no dict.
        OSError: the file can't be opened.
        ImportError: safetensors is not installed.
    """
    library = safetensors() if Path(path).suffix.lower() == ".safetensors" else None
    try:
        if library:
            state = library.torch.load_file(path, device=str(map_location))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
            raise ValueError(f"{path}: expected a checkpoint, found a file that can't be read: {error!r}") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = named[1] if named else "a damaged file, or a pickle of something else"
        raise ValueError(
            f"{path}: expected tensors, numbers, strings and containers, found {found}: "
            "refused, since to unpickle it could run code"
        ) from None  # torch's own message tells how to run it all the same
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state


def save_safetensors(path: File, ema: EMA, index: int = 0, *, dtype: torch.dtype | None = None) -> None:
    """Writes the model with the average in it, for `model.load_state_dict(safetensors.torch.load_file(path))`.

    Names are without what DDP and torch.compile put in front, and hold tensors alone; tied ones are written each.
    Whatever interrupts it, the file is complete: the new one, or the one that was there before. Of a sharded model
    every rank calls it, and the mesh's first writes the tensors whole.

    Args:
        index: of the average.
        dtype: a floating type to cast floating tensors to. None: as they are.

    Raises:
        ValueError: a value is too large for `dtype`; complex128, which safetensors lacks.
        ImportError: safetensors, or numpy, which it needs to write, is not installed.
    """
    safetensors()
    check_floating(dtype or torch.float32)
    tensors: dict[str, Tensor | None] = {}
    for key, value in _unwrapped(ema.model, ema.averaged_state_dict(index)).items():
        if isinstance(value, Tensor):
            if value.dtype == torch.complex128:
                raise ValueError(f"ema[{key!r}]: expected a type that safetensors has, found complex128")
            copy = storable(key, value, dtype if value.is_floating_point() else None)
            tensors[key] = torch.view_as_complex(copy) if copy is not None and value.is_complex() else copy
    save(Path(path), tensors, {})


# ---- Writing


def _scalars(ema: EMA, layout: str, index: int) -> dict[str, Any]:
    schedule, after = ema.schedules[index], ema.update_after_step
    n = ema.step - after if getattr(schedule, "per_step", True) else ema.updates
    latest = float(schedule(max(1, n)))
    decay, least = (schedule.D, 0.0) if isinstance(schedule, tf_warmup) else (latest, latest)
    if layout == "torch_ema":  # it would warm up if it counted
        count = max(0, n) if isinstance(schedule, tf_warmup) else None
        return {"decay": decay, "num_updates": count, "collected_params": None}
    about = {"decay": decay, "min_decay": least, "optimization_step": ema.step, "use_ema_warmup": False}
    about |= {"update_after_step": after - 1, "inv_gamma": 1.0, "power": 2 / 3}  # step update_after_step + 1 copies
    if isinstance(schedule, inverse_power):
        about |= {"decay": schedule.D, "min_decay": schedule.min, "update_after_step": after + schedule.start}
        about |= {"use_ema_warmup": True, "inv_gamma": schedule.gamma, "power": schedule.power}
    return about


def _unwrapped(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """With the names of the innermost model."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            prefix = "module"
        elif "_orig_mod" in model._modules:  # torch.compile
            prefix = "_orig_mod"
        else:
            return state
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
        model = model.get_submodule(prefix)


# ---- Reading


def _layout_of(state: Any, layout: str | None) -> str:
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict, found {type(state).__name__}")
    told = [each for each, marks in _MARKS.items() if all(key in state for key in marks)]
    if layout in told:
        return layout
    if layout is None and len(told) == 1:
        return told[0]
    wanted = f"the layout {layout!r}, with {_MARKS[layout]}" if layout else f"one layout of {', '.join(LAYOUTS)}"
    keys = [*map(str, state)]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    raise ValueError(f"state: expected {wanted}, found {' and '.join(told) or 'none'}: the keys {keys[:8]}{more}")


def _step_of(ema: EMA, layout: str, state: Mapping[str, Any]) -> int | None:
    key = _MARKS[layout][0]
    count = state[key]
    if layout == "timm" or (layout == "torch_ema" and count is None):
        return None
    single = isinstance(count, Tensor) and count.numel() == 1
    step = whole_number(f"state[{key!r}]", count.item() if single else count, 0)
    if not step or layout not in ("averaged_model", "torch_ema"):
        return step
    if layout == "averaged_model":  # which counts the copy that it begins with
        step = (step - (ema.update_after_step > 0)) * ema.update_every
    return step + ema.update_after_step


def _given(layout: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the state, by key, which is without the layout's prefix."""
    if layout not in _PREFIXES:
        shadows = state["shadow_params"]
        if not isinstance(shadows, (list, tuple)):
            raise TypeError(f"shadow_params: expected a list of tensors, found {type(shadows).__name__}")
        return {f"shadow_params[{i}]": value for i, value in enumerate(shadows)}
    named, prefix = state["state_dict_ema"] if layout == "timm" else state, _PREFIXES[layout]
    if not isinstance(named, Mapping) or not all(isinstance(key, str) for key in named):
        raise TypeError(f"state: expected tensors by name in the layout {layout!r}, found {type(named).__name__}")
    return {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}


def _places(ema: EMA, layout: str, parameters: Iterable[Tensor] | None) -> dict[str, Any]:
    """What they belong to in the model: its tensors, or whatever its state_dict has besides."""
    if layout in _PREFIXES:
        return ema.model.state_dict(keep_vars=True)
    those = list(ema.model.parameters() if parameters is None else parameters)
    known = {id(tensor) for tensor in tensors_of(ema.model).values()}
    if strangers := [i for i, tensor in enumerate(those) if id(tensor) not in known]:
        raise ValueError(f"parameters: expected those of the manager's model, found others at {strangers[:5]}")
    return {f"shadow_params[{i}]": tensor for i, tensor in enumerate(those)}


def _averages(ema: EMA, layout: str, given: dict[str, Any], places: dict[str, Any]) -> dict[str, Tensor]:
    """By the manager's names."""
    positional = layout not in _PREFIXES
    if positional and len(given) != len(places):
        counts = f"expected {len(places)} tensors, one for each parameter, found {len(given)}"
        raise ValueError(f"shadow_params: {counts}; for some of the model's parameters only, pass those: `parameters`")
    current = ema._current()
    wanted = {name: id(current[name]) for name in ema._averages}
    averaged, problems = {*wanted.values()}, []
    found: dict[int, Any] = {}
    plain_places, plain_given = {plain_name(key): place for key, place in places.items()}, by_plain_name("state", given)
    for plain, place in plain_places.items():
        if plain not in plain_given or not (positional or id(place) in averaged):
            continue
        key = plain_given[plain]
        value = given[key]
        check_tensor(f"state[{key!r}]", value)
        tied = found.setdefault(id(place), value)
        if value.shape != place.shape:  # by position also where it is not averaged: the order may be another
            problems.append(f"{key!r}: expected shape {tuple(place.shape)}, found {tuple(value.shape)}")
        elif tied is not value and not equal_values(tied, value):
            problems.append(f"{key!r}: expected what it is tied to in the model, found other values")
    extra = [key for plain, key in plain_given.items() if plain not in plain_places]
    missing = [name for name, tensor in wanted.items() if tensor not in found]
    if extra or missing:
        differ = f"{listed(extra)} only in the state and {listed(missing)} only in the manager"
        raise ValueError(f"state: expected the model's names, found {differ}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("state: " + "; ".join(problems[:5]) + more)
    return {name: found[tensor] for name, tensor in wanted.items()}
