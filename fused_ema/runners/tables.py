"""Packs pairs of tensors into the tables that the CUDA kernel reads: the bytes of csrc/launch.h, as csrc/table.h and
csrc/plan.cpp make them. tests/runners/test_tables.py compares the two.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..pairs.memory import extent

# Little-endian, as every host and device of CUDA is.
ROW = struct.Struct("<QQqqqqqiBB?B?7x")
LAYOUT = struct.Struct("<i4x12q12q12q")
LAUNCH = struct.Struct("<QQQqii8d8QQ?7xQ")

MAX_AVERAGES, MAX_DIMS, VECTOR_BYTES = 8, 12, 16
THREADS, UNROLL, STEPS = 64, 2, 2  # of csrc/tiles.h
_VECTORS = THREADS * UNROLL * STEPS  # of the average in one tile

_FLOATS = {  # numbers of `enum class Type`; a complex element is two real ones
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 0,
    torch.complex128: 1,
}
_RAW = {1: 4, 2: 5, 4: 6, 8: 7}  # by the bytes of an element
_SIZES = (4, 8, 2, 2, 1, 2, 4, 8)  # bytes of each Type

Dim = tuple[int, int, int]  # size, the average's stride, the model's stride


class _Types(NamedTuple):
    """What follows from the types of a pair."""

    ema: int
    model: int
    ema_size: int  # bytes
    model_size: int
    reals: int  # in one element


class Tables:
    """The tables of one device."""

    def __init__(self) -> None:
        self._rows: list[bytes] = []
        self._layouts: list[bytes] = []
        self._counts: list[int] = []  # tiles of each row
        self.elements = self.scratch_bytes = 0

    def add(
        self, name: str, ema: Tensor, model: Tensor, average: bool, averages: int, stride: int, number: int
    ) -> None:
        """Appends a pair. `stride`: elements from one average to the next. `number`: elements of the pairs before it,
        on all devices. Raises RuntimeError, with nothing added, where the kernel would touch other memory."""
        if ema.shape != model.shape or not _reachable(ema, model) or ema.is_complex() != model.is_complex():
            raise RuntimeError(
                f"ema{name}: expected the shape, the device and the kind (real or complex) of model, "
                f"{list(model.shape)} on {model.device} in {model.dtype}, found {list(ema.shape)} on {ema.device} in "
                f"{ema.dtype}"
            )
        numel = ema.numel()
        if numel == 0:
            return
        types = _types(ema.dtype, model.dtype, average)
        if types is None:
            raise RuntimeError(f"ema{name}: there is no kernel for {ema.dtype} of {model.dtype}")
        ema_type, model_type, ema_size, model_size, reals = types
        if averages > 1:
            _check_stride(name, ema, averages, stride)
        numel *= reals
        ema_address, model_address = ema.data_ptr(), model.data_ptr()
        dims = [] if ema.is_contiguous() and model.is_contiguous() else _merged(ema, model, reals)
        if not dims or (len(dims) == 1 and dims[0][1:] == (1, 1)):
            layout = -1
            misaligned, model_aligned = _alignment(ema_address, model_address, ema_size, model_size)
        else:
            layout, misaligned, model_aligned = len(self._layouts), 0, False
            if len(dims) > MAX_DIMS:
                raise RuntimeError(
                    f"ema{name}: expected at most {MAX_DIMS} dimensions after merging those without gaps, found more"
                )
            padded = [*dims, *[(0, 0, 0)] * (MAX_DIMS - len(dims))]
            self._layouts.append(LAYOUT.pack(len(dims), *(dim[column] for column in range(3) for dim in padded)))
        scratch = -1
        if ema_type != model_type:
            scratch = (self.scratch_bytes + 15) // 16 * 16
            self.scratch_bytes = scratch + numel * model_size
        self._rows.append(
            ROW.pack(
                *(ema_address, model_address, stride * reals, numel, scratch, number * 2, self.elements, layout),
                *(ema_type, model_type, average, misaligned, model_aligned),
            )
        )
        tile = _VECTORS * (VECTOR_BYTES // ema_size)
        self._counts.append((numel + misaligned + tile - 1) // tile)
        self.elements += numel

    def tile_count(self) -> int:
        return sum(self._counts)

    def rows_and_layouts(self) -> tuple[bytearray, int]:
        """The bytes of both tables, and where the layouts begin."""
        return bytearray(b"".join([*self._rows, *self._layouts])), ROW.size * len(self._rows)

    def forget(self) -> None:
        """Frees what was uploaded, but the rows."""
        self._layouts, self._counts = [], []

    def count(self) -> int:
        return len(self._rows)

    def moved(self, row: int, ema: int, model: int) -> bytes | None:
        """A row for the same pair at other addresses; None where it would have other tiles."""
        fields = ROW.unpack(self._rows[row])
        layout, ema_type, model_type, average, misaligned, model_aligned = fields[7:]
        if layout < 0:
            before = misaligned
            misaligned, model_aligned = _alignment(ema, model, _SIZES[ema_type], _SIZES[model_type])
            if misaligned != before:
                return None
        kept = fields[2:8]
        return ROW.pack(ema, model, *kept, ema_type, model_type, average, misaligned, model_aligned)

    def replace(self, rows: dict[int, bytes]) -> None:
        for row, packed in rows.items():
            self._rows[row] = packed

    def tiles(self, device: torch.device) -> Tensor:
        """[tile, 2] in int32: the row and the index of each tile, made on the device, since there may be millions."""
        total = self.tile_count()
        counts = torch.tensor(self._counts, dtype=torch.int32, device=device)
        rows = torch.repeat_interleave(counts, output_size=total)
        first = torch.cumsum(counts, 0, dtype=torch.int32) - counts
        index = torch.arange(total, dtype=torch.int32, device=device) - first[rows]
        return torch.stack((rows, index), 1)


def launch(
    tables: tuple[int, int, int, int],
    averages: range,
    decays: Iterable[float] = (),
    keys: Iterable[int] = (),
    device_decays: Tensor | None = None,
    scratch: int = 0,
) -> bytes:
    """The kernel's argument. `tables`: the addresses of rows, layouts and tiles, and the number of tiles. `averages`
    take part; `decays` and `keys` are theirs, `device_decays` has one for every average. `scratch`: an address."""
    all_decays, all_keys = [0.0] * MAX_AVERAGES, [0] * MAX_AVERAGES
    for position, decay in zip(averages, decays, strict=False):
        all_decays[position] = decay
    for position, key in zip(averages, keys, strict=False):
        all_keys[position] = key
    address = 0 if device_decays is None else device_decays.data_ptr()
    is_f64 = device_decays is not None and device_decays.dtype is torch.float64
    return LAUNCH.pack(*tables, averages.start, averages.stop, *all_decays, *all_keys, address, is_f64, scratch)


@functools.cache
def _types(ema: torch.dtype, model: torch.dtype, average: bool) -> _Types | None:
    reals = 1 + ema.is_complex
    sizes = ema.itemsize // reals, model.itemsize // reals
    if not average and ema is model:
        return _Types(_RAW[sizes[0]], _RAW[sizes[1]], *sizes, reals)
    if ema not in _FLOATS or model not in _FLOATS:
        return None
    return _Types(_FLOATS[ema], _FLOATS[model], *sizes, reals)


def _alignment(ema: int, model: int, ema_size: int, model_size: int) -> tuple[int, bool]:
    """`misaligned` and `model_aligned` of a flat row whose sides lie at these addresses."""
    misaligned = ema % VECTOR_BYTES // ema_size
    model_vector = min(VECTOR_BYTES, VECTOR_BYTES // ema_size * model_size)
    return misaligned, (model - misaligned * model_size) % model_vector == 0


def _reachable(ema: Tensor, model: Tensor) -> bool:
    """Whether a kernel on the model's device can use the average: it may be in pinned host memory."""
    return ema.device == model.device or (model.is_cuda and ema.device.type == "cpu" and ema.is_pinned())


def _merged(ema: Tensor, model: Tensor, reals: int) -> list[Dim]:
    """The dimensions above size 1 by the average's strides, the largest first; those without a gap are one."""
    dims = [dim for dim in zip(ema.shape, ema.stride(), model.stride(), strict=True) if dim[0] != 1]
    if reals == 2:
        dims = [*((size, 2 * first, 2 * second) for size, first, second in dims), (2, 1, 1)]
    merged: list[Dim] = []
    for size, first, second in sorted(dims, key=lambda dim: -dim[1]):
        if merged and merged[-1][1:] == (first * size, second * size):
            size *= merged.pop()[0]
        merged.append((size, first, second))
    return merged


def _check_stride(name: str, ema: Tensor, averages: int, stride: int) -> None:
    reach, size = extent(ema), ema.element_size()
    last = ema.storage_offset() + (averages - 1) * stride + reach
    room = ema.untyped_storage().nbytes()
    if stride < reach or stride * size % VECTOR_BYTES or last * size > room:
        raise RuntimeError(
            f"ema{name}: {averages} averages with a stride of {stride} elements do not fit a storage of {room} bytes"
        )
