"""The CUDA kernel's own tile code (csrc/tiles.h, csrc/table.h), built by g++ and run over an emulated grid.

What a GPU would do is done here by the same source: each (block, thread) once, in shuffled order. Only the machine
code differs, and tests/audit_sass.py looks at that.
"""

import ctypes
import functools
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, *INTEGERS]  # in the order of enum Type
OPS = ["update", "copy", "swap"]  # of enum Op

LERP_PAIRS = [pair for pair in oracle.PAIRS if not pair[0].is_complex]  # of update; a manager has more
CAST_PAIRS = list(itertools.permutations(oracle.FLOATS, 2))
RAW_PAIRS = [(dtype, dtype) for dtype in INTEGERS]

SANITIZE = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-static-libubsan"]  # undefined includes alignment
SMALL = ["-DFUSED_EMA_THREADS=32", "-DFUSED_EMA_UNROLL=2", "-DFUSED_EMA_STEPS=2"]


class Pair(NamedTuple):
    ema: torch.Tensor
    model: torch.Tensor
    average: bool = True


@functools.cache
def build(size="default"):
    """default: the kernel's own tile size, with the sanitizer where g++ has it. small: 64 times fewer elements."""
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: the emulated grid needs it")
    source = Path(__file__).with_name("emulated_grid.cpp")
    folder = tempfile.TemporaryDirectory()
    output = Path(folder.name, f"{size}.so")
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", source, "-o", output]
    for flags in (SANITIZE, []) if size == "default" else (SMALL,):
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        if done.returncode == 0:
            grid = Grid(output)
            grid.folder, grid.sanitized = folder, flags is SANITIZE
            return grid
    raise AssertionError(done.stderr)


class Grid:
    """One build of emulated_grid.cpp."""

    def __init__(self, path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("grid_new", "grid_tiles", "grid_stores"):
            getattr(self.library, name).restype = ctypes.c_void_p
        for name in ("grid_tile_elements", "grid_store_count"):
            getattr(self.library, name).restype = ctypes.c_int64
        for name in ("grid_lerp_pairs", "grid_cast_pairs"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def tile(self, dtype):
        """Elements of an average of this type in one tile."""
        return self.library.grid_tile_elements(dtype.itemsize)

    def tables(self, pairs, with_tiles=True):
        return Tables(self.library, pairs, with_tiles)

    def stores(self):
        """The writes of the last run: addresses, sizes in bytes."""
        return array_at(self.library.grid_stores(), ctypes.c_int64, self.library.grid_store_count()).T

    def convert(self, function, values, dtype):
        """A C function (values, results, count) applied to a flat tensor."""
        results = torch.empty(len(values), dtype=dtype)
        count = ctypes.c_int64(len(values))
        self.library[function](ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(results.data_ptr()), count)
        return results


def array_at(address, type_, rows):
    """A copy of a C array of two columns."""
    if rows == 0:
        return np.empty((0, 2), type_)
    return np.ctypeslib.as_array((type_ * 2 * rows).from_address(address)).copy()


class Tables:
    """The tables of one launch."""

    def __init__(self, library, pairs, with_tiles):
        self.library, self.pairs = library, pairs  # keeps the tensors alive
        self.handle = ctypes.c_void_p(library.grid_new())
        self.added = [self._add(*pair, with_tiles) for pair in pairs]

    def __del__(self):
        self.library.grid_delete(self.handle)

    def _add(self, ema, model, average, with_tiles):
        sides = [ctypes.c_void_p(side.data_ptr()) for side in (ema, model)]
        types = [TYPES.index(side.dtype) for side in (ema, model)]
        shape = [(ctypes.c_int64 * ema.dim())(*values) for values in (ema.shape, ema.stride(), model.stride())]
        added = self.library.grid_add(self.handle, *sides, *types, int(average), ema.dim(), *shape, int(with_tiles))
        return bool(added)

    def counts(self):
        """Rows, layouts, tiles, elements."""
        out = (ctypes.c_int64 * 4)()
        self.library.grid_counts(self.handle, out)
        return tuple(out)

    def tiles(self):
        """[tile, (row, index)]"""
        return array_at(self.library.grid_tiles(self.handle), ctypes.c_uint32, self.counts()[2])

    def dims(self, row):
        """Of a row that is not flat; -1 of one that is."""
        return self.library.grid_dims(self.handle, ctypes.c_int64(row))

    def offsets(self, row, i):
        """Of element i of a row, on both sides."""
        out = (ctypes.c_int64 * 2)()
        self.library.grid_offsets(self.handle, ctypes.c_int64(row), ctypes.c_int64(i), out)
        return tuple(out)

    def run(self, op, decay, device_decay=None, tiles=None, seed=1):
        """`device_decay`: a tensor of one float32 or float64. `tiles`: chosen ones, as tiles() gives them."""
        self.library.grid_run(
            self.handle,
            OPS.index(op),
            ctypes.c_double(decay),
            None if device_decay is None else ctypes.c_void_p(device_decay.data_ptr()),
            int(device_decay is not None and device_decay.dtype == torch.float64),
            None if tiles is None else ctypes.c_void_p(tiles.ctypes.data),
            ctypes.c_int64(0 if tiles is None else len(tiles)),
            ctypes.c_uint64(seed),
        )
