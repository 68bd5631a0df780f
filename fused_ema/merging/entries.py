"""What a checkpoint holds: tensors by name, and where their elements are."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..pairs.memory import Span, overlaps
from .sums import PIECE

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
AVERAGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *REAL)
COPIED = {  # by the names that all releases of PyTorch have
    torch.bool,
    *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)),
}
BUFFER = 8 * PIECE  # bytes, the most that PIECE real numbers have


class Place(Protocol):
    """Where the elements of a tensor are, in the order of its memory, in pieces of at most BUFFER bytes."""

    def read(self, begin: int, count: int, buffer: Buffer) -> Tensor: ...
    def write(self, begin: int, piece: Tensor, buffer: Buffer) -> None: ...


class Buffer:
    """Memory of one thread, which is seen as bytes and as tensors."""

    def __init__(self) -> None:
        self._bytes = bytearray(BUFFER)
        self.view = memoryview(self._bytes)
        self._tensors: dict[torch.dtype, Tensor] = {}

    def tensor(self, dtype: torch.dtype, count: int) -> Tensor:
        if dtype not in self._tensors:
            self._tensors[dtype] = torch.frombuffer(self._bytes, dtype=dtype)
        return self._tensors[dtype][:count]


@dataclass
class InFile:
    """Elements that lie in a file, one after the other."""

    path: str
    file: int
    offset: int
    dtype: torch.dtype

    def read(self, begin: int, count: int, buffer: Buffer) -> Tensor:
        size = self.dtype.itemsize
        view, at = buffer.view[: count * size], self.offset + begin * size
        while len(view):
            got = os.preadv(self.file, [view], at)
            if not got:
                raise ValueError(f"{self.path}: truncated while it was read")
            view, at = view[got:], at + got
        return buffer.tensor(self.dtype, count)

    def write(self, begin: int, piece: Tensor, buffer: Buffer) -> None:
        """`piece` is the beginning of the buffer."""
        size = self.dtype.itemsize
        view, at = buffer.view[: piece.numel() * size], self.offset + begin * size
        while len(view):
            put = os.pwrite(self.file, view, at)
            view, at = view[put:], at + put


@dataclass
class InMemory:
    """Elements of a tensor of one dimension, which may be a mapped file."""

    values: Tensor

    def read(self, begin: int, count: int, buffer: Buffer) -> Tensor:
        return self.values[begin : begin + count]

    def write(self, begin: int, piece: Tensor, buffer: Buffer) -> None:
        self.values[begin : begin + piece.numel()].copy_(piece)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint. `count` elements of its memory, from `begin` bytes on, belong to it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # None: contiguous
    count: int
    begin: int
    open: Callable[[], Place] = field(compare=False, repr=False)

    @property
    def averaged(self) -> bool:
        return self.dtype in AVERAGED

    @property
    def real(self) -> tuple[torch.dtype, int]:
        """The type of the real numbers in it, or of the integers, and how many there are."""
        return REAL.get(self.dtype, self.dtype), self.count * (2 if self.dtype in REAL else 1)

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        strides = "" if self.stride is None else f" with strides {self.stride}"
        return f"{str(self.dtype).removeprefix('torch.')} of shape {self.shape}{strides}"


@dataclass
class Checkpoint:
    """Tensors by name. `about` is what the writer of its kind needs to know of the newest one."""

    path: str
    kind: str
    entries: dict[str, Entry]
    about: Any = None
    ties: dict[str, str] = field(default_factory=dict)  # name → the first name of the same elements, where they differ
    files: dict[str, tuple[int, ...]] = field(default_factory=dict)  # that are read, and what they were when opened

    def open(self, path: Path, closing: ExitStack) -> int:
        """A descriptor to read the file by, which `closing` closes."""
        if path.is_dir():
            raise ValueError(f"{path}: expected a file, found a folder")
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, f"{self.path} names this file, which is not there", str(path)
            ) from None
        except OSError as error:
            if error.errno == errno.EMFILE:
                many = (
                    "too many open files; a merge opens each shard of each checkpoint: raise the limit by `ulimit -n`"
                )
                raise OSError(errno.EMFILE, many, str(path)) from None
            raise
        closing.callback(os.close, file)
        self.files[str(path)] = identity(os.fstat(file))
        return file

    def check_unchanged(self) -> None:
        """Raises where another file is at the place of one that is read, or it was written to."""
        for path, before in self.files.items():
            if identity(os.stat(path)) != before:
                raise ValueError(f"{path}: changed while it was read; merge it again once it is complete")


def identity(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def reserve(path: str | os.PathLike[str], file: int, size: int) -> None:
    """So that a full disk shows before hours of work, where the file system can reserve space."""
    try:
        os.posix_fallocate(file, 0, size)
    except (OSError, AttributeError) as error:  # macOS has no such function
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror} for the {size} bytes of the average", str(path)) from None
        os.truncate(file, size)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def found_ties(path: str, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Names whose elements are those of an earlier name. Raises where two share some of their elements."""
    first: dict[tuple[int, int], str] = {}
    ties = {}
    for name, entry in entries.items():
        if entry.bytes and (before := first.setdefault((entry.begin, entry.bytes), name)) != name:
            ties[name] = before
    spans = [Span(begin, begin + size, name) for (begin, size), name in first.items()]
    for earlier, after in overlaps(spans):
        raise ValueError(
            f"{path}: {after.name!r}: expected memory of its own, found some shared with {earlier.name!r}; save "
            "a clone of each tensor"
        )
    return ties
