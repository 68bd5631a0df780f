"""Checkpoints in files of torch.save: a state dict, alone or under a key."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.files import replacing
from ..checkpoints.load import load
from ..pairs.checks import check_tensor
from ..pairs.memory import extent
from ..pairs.pairing import first_few
from .entries import Checkpoint, Entry, InFile, InMemory, Place, contiguous_stride, found_ties, reserve

KIND = "a file of torch.save"


def open_file(path: Path, key: str | None, closing: ExitStack) -> Checkpoint:
    """`about` is the state dict, whose tensors are mapped, and the keys above it."""
    checkpoint = Checkpoint(str(path), KIND, {})
    file = checkpoint.open(path, closing)
    try:
        content = load(path, mmap=True)
    except OSError as error:  # mmap's own, about the file's end
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    state, keys = checkpoint.about = _chosen(path, content, key)
    offsets = _offsets(path, keys)
    checkpoint.check_unchanged()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            _check_plain(path, name, tensor)
            continue
        try:
            check_tensor(name, tensor)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{path}: {error}") from None
        checkpoint.entries[name] = _entry(str(path), file, tensor, offsets.get(name))
    checkpoint.ties = found_ties(str(path), checkpoint.entries)
    return checkpoint


def _chosen(path: Path, content: Mapping[str, Any], key: str | None) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict, and the keys that lead to it."""

    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())

    if key is None and holds(content):
        return content, []
    inside: list[Any] = [name for name, value in content.items() if holds(value)]
    hint = f"; found tensors under {first_few(list(map(repr, inside)), ', ')}" if inside else ""
    if key is None:
        if len(inside) != 1:
            raise ValueError(f"{path}: expected tensors by name, or one dict of them{hint}; name one of them by key=")
        key = inside[0]
    found: Any = content
    keys = key.split(".") if key not in content else [key]
    for each in keys:
        found = found.get(each) if isinstance(found, Mapping) else None
    if not holds(found):
        raise ValueError(f"{path}: key: expected a dict of tensors under {key!r}, found none{hint}")
    return found, keys


def _check_plain(path: Path, name: str, value: Any) -> None:
    """Raises where a value that is no tensor holds some: their elements would not be written."""
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return
    else:
        raise ValueError(
            f"{path}: {name!r}: expected a tensor, or numbers, strings and containers of them, found one that holds a "
            f"{type(value).__name__}; save the model's state dict alone, or name it by key="
        )
    for each in inside:
        _check_plain(path, name, each)


def _offsets(path: Path, keys: list[str]) -> dict[str, int]:
    """Where the elements of each tensor begin in the file, if this PyTorch says so. (Older ones do not.)"""
    if not hasattr(torch.serialization, "_is_meta_location"):
        return {}
    state: Any = load(path, map_location="meta")
    for each in keys:
        state = state[each]
    found = {}
    for name, tensor in state.items():
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if isinstance(tensor, Tensor) else None
        if start is not None:
            found[name] = start + tensor.storage_offset() * tensor.element_size()
    return found


def _entry(path: str, file: int, tensor: Tensor, offset: int | None) -> Entry:
    count = extent(tensor) if tensor.numel() else 0
    shape, stride = tuple(tensor.shape), tensor.stride()

    def place() -> Place:
        real = entry.real[0]
        return InMemory(_flat(tensor, count)) if offset is None else InFile(path, file, offset, real)

    begin = tensor.data_ptr() if offset is None else offset
    dtype = tensor.dtype
    entry = Entry(dtype, shape, None if stride == contiguous_stride(shape) else stride, count, begin, place)
    return entry


def _flat(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().as_strided((count,), (1,))
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat


@contextmanager
def written_file(out: Path, newest: Checkpoint) -> Iterator[dict[str, Place]]:
    """Gives the places of all tensors in a file that replaces `out` once they are written."""
    state, keys = newest.about
    content: Any = state
    for each in reversed(keys):
        content = {each: content}
    with replacing(out) as temporary:
        with torch.serialization.skip_data():  # which leaves holes for the elements
            torch.save(content, temporary)
        offsets = _offsets(temporary, keys)
        file = os.open(temporary, os.O_RDWR)
        try:
            reserve(temporary, file, os.fstat(file).st_size)
            places: dict[str, Place] = {
                name: InFile(str(temporary), file, offset, newest.entries[name].real[0])
                for name, offset in offsets.items()
            }
            if not offsets:
                with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # what is written goes to the file
                    mapped: Any = torch.load(temporary, mmap=True, weights_only=True)
                for each in keys:
                    mapped = mapped[each]
                places = {name: InMemory(_flat(mapped[name], entry.count)) for name, entry in newest.entries.items()}
            yield places
        finally:
            os.close(file)
