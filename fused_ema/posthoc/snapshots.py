"""Snapshots of power_function averages: safetensors files whose metadata describe what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._warning import warn
from ..checkpoints.files import PathLike, safetensors, save, storable
from ..manager.ema import EMA
from ..pairs.arguments import check_floating, shown, whole_number
from ..pairs.pairing import first_few
from ..pairs.shards import is_sharded
from ..schedules import gamma_of

FILE_NAME = re.compile(r"ema-(\d{10,})\.safetensors")  # the number of updates
MARK, FORMAT = "fused_ema.posthoc", "1"
KEYS = ("step", "updates", "sigma_rels", "tensors", "complex")  # of the metadata; values are JSON


class Snapshot(NamedTuple):
    """A file of averages, as `snapshots` finds it.

    Attributes:
        path: the file.
        step: the calls of `EMA.update` before it was saved.
        updates: how many of them moved the averages.
        sigma_rels: one for each average in the file; see `schedules.power_function`.
    """

    path: Path
    step: int
    updates: int
    sigma_rels: tuple[float, ...]


def save_snapshot(folder: PathLike, ema: EMA, *, dtype: torch.dtype | None = None) -> Path:
    """Writes the power_function averages of `ema`, and no others, to folder/ema-{updates:010d}.safetensors.

    To reconstruct averages at the end of the training, save the last snapshot after its last update.

    If writing is interrupted, the file that was there before stays as it was. If averages are sharded, every rank has
    to call this; the first rank of the mesh writes the whole tensors, and the others do not wait for it.

    Args:
        folder: where to write; it is created if it does not exist. Keep the snapshots of one run in a
            folder of their own; a warning names those with more updates, which another run left there, or this one
            before it returned to an earlier state.
        ema: the manager. Its averages are first copied to the CPU, all at once.
        dtype: a floating type to cast to, such as torch.float16 for half the size. None: as they are.

    Raises:
        ValueError: no schedule is a power_function, there was no update yet, or a value is too large for `dtype`.
        ImportError: safetensors is not installed, or numpy, which it needs for writing.
    """
    safetensors()
    check_floating(dtype or torch.float32)
    state = ema.state_dict()
    schedules, updates = state["schedules"], state["updates"]
    powers = [k for k, each in enumerate(schedules) if isinstance(each, dict) and each["name"] == "power_function"]
    if not powers:
        raise ValueError(f"ema: expected an average whose schedule is a power_function, found {schedules}")
    if updates < 1:
        raise ValueError(f"ema: expected 1 update or more before a snapshot, found {updates}")
    averages: list[dict[str, Tensor]] = [state["averages"][k] for k in powers]
    first_of: dict[tuple[Any, ...], str] = {}  # the memory in each average → the first name that has it
    names = {name: first_of.setdefault(_memory(name, averages), name) for name in averages[0]}
    about = {
        "step": state["step"],
        "updates": updates,
        "sigma_rels": [schedules[k]["sigma_rel"] for k in powers],
        "tensors": names,  # → the name that it is stored under
        "complex": [name for name in names if averages[0][name].is_complex()],
    }
    tensors = {f"{k}/{x}": storable(x, each[x], dtype) for k, each in enumerate(averages) for x in first_of.values()}
    path = Path(folder, f"ema-{updates:010d}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, tensors, {MARK: FORMAT, **{key: json.dumps(about[key]) for key in KEYS}})
    later = sorted(each.name for each in path.parent.iterdir() if (count := _updates_of(each)) and count > updates)
    if later and not any(tensor is None for tensor in tensors.values()):
        warn(
            f"{folder}: {first_few(later, ', ')} had more updates than {path.name}, which was saved now; they belong "
            "to another run, or to this one before it returned to an earlier state. reconstruct() would mix them with "
            "the new ones; remove them, or use another folder",
        )
    return path


def snapshots(folder: PathLike) -> list[Snapshot]:
    """Returns the snapshots in a folder, in the order of their updates; other files are ignored.

    Raises:
        ValueError: a file is truncated, corrupt, or in a format of another version. The error names it.
        ImportError: safetensors is not installed.
    """
    found = []
    for path in Path(folder).iterdir():
        if (updates := _updates_of(path)) is not None:
            with opened(path) as (_, about):
                if about:
                    if updates != about["updates"]:
                        raise ValueError(f"{path}: the name says {updates} updates, the metadata {about['updates']}")
                    found.append(Snapshot(path, about["step"], about["updates"], tuple(about["sigma_rels"])))
    return sorted(found, key=lambda each: (each.updates, each.path))


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and its metadata, which are {} where `save_snapshot` did not write it."""
    library = safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            yield file, _about(path, file.metadata() or {})
    except library.SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error


def _updates_of(path: Path) -> int | None:
    """The updates in a snapshot's name; None for other files."""
    named = FILE_NAME.fullmatch(path.name)
    return int(named[1]) if named and path.is_file() else None


def _memory(name: str, averages: Sequence[dict[str, Tensor]]) -> tuple[Any, ...]:
    """A key that is equal for names that are tied in all averages. Sharded ones never are: empty shards look alike."""
    each = [average[name] for average in averages]
    if any(map(is_sharded, each)):
        return (name,)
    return tuple((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in each)


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata as `save_snapshot` writes them. Other keys, as older versions wrote, are ignored."""
    if metadata.get(MARK, FORMAT) != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, found {metadata[MARK]}; update fused_ema")
    if MARK not in metadata:
        return {}
    try:
        about: dict[str, Any] = {key: json.loads(metadata[key]) for key in KEYS}
        whole_number("step", about["step"], 0)
        whole_number("updates", about["updates"], 1)
        sigma_rels, names, parts = about["sigma_rels"], about["tensors"], about["complex"]
        if not isinstance(sigma_rels, list) or not sigma_rels:
            raise ValueError(f"sigma_rels: expected a list of numbers, found {shown(sigma_rels)}")
        for sigma_rel in sigma_rels:
            gamma_of(sigma_rel)
        if not isinstance(names, dict) or not all(isinstance(key, str) for key in names.values()):
            raise ValueError(f"tensors: expected a dict of names to names, found {shown(names)}")
        if not isinstance(parts, list) or not all(isinstance(name, str) and name in names for name in parts):
            raise ValueError(f"complex: expected a list of names of tensors, found {shown(parts)}")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    return about
