"""Checkpoints in safetensors files: one file, or a folder of them with an index."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .._warning import warn
from ..checkpoints.files import replacing, replacing_folder
from ..pairs.pairing import first_few
from .entries import Checkpoint, Entry, InFile, Place, reserve

FILE, FOLDER = "a safetensors file", "a folder of safetensors files"
INDEX = ".safetensors.index.json"
DTYPES = {
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (64, 32, 16, 8)},
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")  # configuration and tokenizer, or a model's code
NOT_BESIDE = ("trainer_state.json",)  # of a training, which can't go on from an average
CONFIGURATIONS = ("config.json", "adapter_config.json")


def open_file(path: Path, closing: ExitStack) -> Checkpoint:
    """`about` is the file's metadata."""
    checkpoint = Checkpoint(str(path), FILE, {})
    checkpoint.about = _read(checkpoint, path, closing)
    return checkpoint


def open_folder(path: Path, closing: ExitStack) -> Checkpoint:
    """A folder with an index, or with one file. `about` is the index's name and metadata, if there is one, and for each
    file its metadata and its names."""
    checkpoint = Checkpoint(str(path), FOLDER, {})
    indices = sorted(path.glob(f"*{INDEX}"))
    if not indices:
        (only,) = path.glob("*.safetensors")
        metadata = _read(checkpoint, only, closing)
        checkpoint.about = (None, None, {only.name: (metadata, list(checkpoint.entries))})
        return checkpoint
    if len(indices) > 1:
        raise ValueError(f"{path}: expected one index, found {', '.join(each.name for each in indices)}")
    try:
        index = json.loads(indices[0].read_text(encoding="utf-8"))
        files: dict[str, list[str]] = {}
        for name, file in index["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"{name!r} is outside the folder, at {file!r}")
            files.setdefault(file, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{indices[0]}: truncated or corrupt: {error!r}") from error
    found = {}
    for file, names in files.items():
        before = set(checkpoint.entries)
        found[file] = (_read(checkpoint, path / file, closing), names)
        if unlike := set(names) ^ (set(checkpoint.entries) - before):
            raise ValueError(
                f"{path / file}: expected the tensors of the index, found a difference: {sorted(unlike)[:5]}"
            )
    checkpoint.about = (indices[0].name, index.get("metadata"), found)
    return checkpoint


def _read(checkpoint: Checkpoint, path: Path, closing: ExitStack) -> dict[str, str]:
    """Adds the tensors of a file; returns its metadata."""
    file = checkpoint.open(path, closing)
    size = os.fstat(file).st_size
    try:
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(os.pread(file, length, 8))
        metadata: dict[str, str] = header.pop("__metadata__", {})
        _check_whole(header, size - 8 - length)
        strange = {name: about["dtype"] for name, about in header.items() if about["dtype"] not in DTYPES}
        for name in [name for name in header if name not in strange]:
            checkpoint.entries[name] = _entry(str(path), file, name, header[name], 8 + length, size)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or corrupt, or no safetensors file: {error}") from error
    for name, dtype in strange.items():
        raise TypeError(f"{path}: {name!r}: expected one of {', '.join(DTYPES)}, found {dtype}, which has no average")
    return metadata


def _check_whole(header: Mapping[str, Any], size: int) -> None:
    """Raises unless the tensors lie one after the other, as the format has it."""
    end = 0
    for begin, after in sorted(about["data_offsets"] for about in header.values()):
        if begin != end:
            raise ValueError(f"expected the next tensor at byte {end}, found one at {begin}")
        end = after
    if end != size:
        raise ValueError(f"expected tensors of {size} bytes, found {end}")


def _entry(path: str, file: int, name: str, about: Mapping[str, Any], start: int, size: int) -> Entry:
    (begin, end), shape = about["data_offsets"], tuple(about["shape"])
    dtype = DTYPES[about["dtype"]]
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{name!r}: expected a shape, found {shape}")
    count = math.prod(shape)
    if not 0 <= begin <= end <= size - start or end - begin != count * dtype.itemsize:
        raise ValueError(f"{name!r}: expected {count} elements of {about['dtype']}, found bytes {begin} to {end}")

    def place() -> Place:
        return InFile(path, file, start + begin, entry.real[0])

    entry = Entry(dtype, shape, None, count, start + begin, place)
    return entry


def warn_of_configurations(folders: Sequence[Checkpoint]) -> None:
    """Warns where folders have different configurations: the average has the newest one's."""
    newest = folders[-1]
    for name in CONFIGURATIONS:
        found = [_settings(Path(each.path) / name) for each in folders]
        for each, settings in zip(folders, found, strict=True):
            if unlike := sorted(key for key in settings | found[-1] if settings.get(key) != found[-1].get(key)):
                warn(
                    f"{each.path}/{name} differs from that of {newest.path}, which the average has, in "
                    f"{first_few(unlike, ', ')}; merge only models with the same configuration"
                )
                break


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in content.items() if key[0] != "_" and not key.endswith("_version")}
    except (OSError, ValueError, AttributeError, IndexError):
        return {}


# ---- Writing


@contextmanager
def written_file(out: Path, newest: Checkpoint) -> Iterator[dict[str, Place]]:
    """Gives the places of all tensors in a file that replaces `out` once they are written."""
    with replacing(out) as temporary, _laid_out(temporary, newest, list(newest.entries), newest.about) as places:
        yield places


@contextmanager
def written_folder(out: Path, newest: Checkpoint) -> Iterator[dict[str, Place]]:
    """Like `written_file`, for a folder with the files and the index of the newest one, and what is beside them."""
    index, metadata_of_index, files = newest.about
    with replacing_folder(out) as temporary:
        places: dict[str, Place] = {}
        with ExitStack() as closing:
            for file, (metadata, names) in files.items():
                places |= closing.enter_context(_laid_out(temporary / file, newest, names, metadata))
            yield places
        for each in sorted(Path(newest.path).iterdir()):
            belongs = each.suffix in BESIDE and ".index." not in each.name and each.name not in NOT_BESIDE
            if each.is_file() and belongs:
                (temporary / each.name).write_bytes(each.read_bytes())
        if index:
            weight_map = {name: file for file, (_, names) in files.items() for name in names}
            content = {"metadata": metadata_of_index or {}, "weight_map": weight_map}
            (temporary / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _laid_out(path: Path, newest: Checkpoint, names: list[str], metadata: dict[str, str]) -> Iterator[dict[str, Place]]:
    """Writes the header of a file and reserves the space of its tensors."""
    # The largest elements come first, as in files of the safetensors package, so that all are aligned.
    order = sorted(names, key=lambda name: -newest.entries[name].real[0].itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets, end = {}, 0
    for name in order:
        entry = newest.entries[name]
        offsets[name], end = end, end + entry.bytes
        header[name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        start = 8 + len(text)
        reserve(path, stream.fileno(), start + end)
        yield {
            name: InFile(str(path), stream.fileno(), start + offsets[name], newest.entries[name].real[0])
            for name in names
        }
