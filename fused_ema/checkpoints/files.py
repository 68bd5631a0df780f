"""Files of tensors: safetensors, written so that a file of its name is always whole."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pairs import shards
from ..pairs.checks import storage_refusal


def safetensors() -> Any:
    try:
        library = importlib.import_module("safetensors")
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(".safetensors files need two packages: pip install safetensors numpy") from error
    return library


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write; it takes the place of `path` once it is on disk, and goes where there is an error.

    A symbolic link stays one, and a file that is replaced passes on its mode and, where that is allowed, its owner.
    """
    path = Path(os.path.realpath(path))
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        raise ValueError(
            f"{path}: expected a file or none, found {'a circle of links' if path.is_symlink() else 'a device or pipe'}"
        )
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()  # with the mode that the umask gives; safetensors may replace it by a file of mode 0600
        about = (path if path.exists() else temporary).stat()
        yield temporary
        with suppress(OSError):  # where that is not allowed, or nothing has owners
            os.chown(temporary, about.st_uid, about.st_gid)
        temporary.chmod(about.st_mode & 0o777)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # where the new name is kept


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A copy in memory of its own, as safetensors wants it; complex numbers, which it lacks in part, as two reals.

    A sharded tensor is put together on all ranks, one after the other, and kept on the mesh's first; None elsewhere.
    """
    if refusal := storage_refusal(f"ema[{name!r}]", shards.local(tensor)):
        raise refusal
    value = shards.whole(tensor.detach())
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    copy = value.to("cpu", dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
    if dtype is not None and not torch.equal(copy.isfinite(), value.to("cpu", torch.float64).isfinite()):
        raise ValueError(
            f"ema[{name!r}]: expected values within {torch.finfo(dtype).max} for {dtype}, found larger ones"
        )
    return copy if shards.first_here(tensor) else None


def save(path: Path, tensors: Mapping[str, Tensor | None], metadata: dict[str, str]) -> None:
    """Writes what `storable` gave; nothing where that is on another rank."""
    if "__metadata__" in tensors:
        raise ValueError(
            "ema['__metadata__']: expected a name that a .safetensors file can hold, found its own for metadata"
        )
    if not any(tensor is None for tensor in tensors.values()):
        with replacing(path) as temporary:
            safetensors().torch.save_file(tensors, temporary, {"format": "pt", **metadata})
