"""Writes files and folders so that what is under its final name is always complete."""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..pairs import shards
from ..pairs.checks import storage_refusal

PathLike: TypeAlias = "str | os.PathLike[str]"


def safetensors() -> Any:
    try:
        library = importlib.import_module("safetensors")
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            '.safetensors files need two packages; run pip install "fused-ema[files]", or pip install safetensors numpy'
        ) from error
    return library


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write to, which replaces `path` once it is on disk, and is removed after an error.

    If `path` is a symbolic link, the file that it points to is replaced. The new file gets the mode of the old one and,
    where that is allowed, its owner.
    """
    path = Path(os.path.realpath(path))
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        found = "a symbolic link that points to itself" if path.is_symlink() else "a device or pipe"
        raise ValueError(f"{path}: expected a file to replace or no file, found {found}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write to, found none at {path.parent}; make it first")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()  # it gets the mode that the umask asks for; safetensors may replace it by a file of mode 0600
        about = (path if path.exists() else temporary).stat()
        yield temporary
        with suppress(OSError):  # it may not be allowed, or the file system may have no owners
            os.chown(temporary, about.st_uid, about.st_gid)
        temporary.chmod(about.st_mode & 0o777)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)  # the directory holds the new name


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder to write to, which becomes `path` once all its files are on disk, and is removed after
    an error. An empty folder may be there before, but no other, since folders can't be exchanged at once."""
    path = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "one with files in it" if path.is_dir() else "a file"
        raise FileExistsError(
            f"{path}: expected no folder or an empty one, found {found}; remove it, or choose another"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write to, found none at {path.parent}; make it first")
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for each in temporary.iterdir():
            _sync(each)
        _sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Returns a contiguous copy on the CPU, as safetensors needs it. A complex number becomes two real ones.

    All ranks of a sharded tensor gather it; the first rank of the mesh gets the copy, and the others None.
    """
    if refusal := storage_refusal(f"ema[{name!r}]", shards.local(tensor)):
        raise refusal
    value = shards.whole(tensor.detach())
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    copy = value.to("cpu", dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
    if dtype is not None and not torch.equal(copy.isfinite(), value.to("cpu", torch.float64).isfinite()):
        most = torch.finfo(dtype).max
        raise ValueError(f"ema[{name!r}]: expected values of at most {most}, the largest {dtype}, found larger ones")
    return copy if shards.first_here(tensor) else None


def save(path: Path, tensors: Mapping[str, Tensor | None], metadata: dict[str, str]) -> None:
    """Writes the copies that `storable` made; ranks without them write nothing."""
    if "__metadata__" in tensors:
        raise ValueError(
            "ema['__metadata__']: safetensors files keep this name for their metadata; rename the parameter"
        )
    if not any(tensor is None for tensor in tensors.values()):
        with replacing(path) as temporary:
            safetensors().torch.save_file(tensors, temporary, {"format": "pt", **metadata})
