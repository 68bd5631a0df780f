"""Builds the CUDA kernel's tile code (csrc/tiles.h, csrc/table.h) with g++ and runs it over an emulated grid.

Every (block, thread) of a launch runs once, in shuffled order, from the same source as on a GPU. Only the machine code
differs; audit_sass.py reads that.
"""

import ctypes
import fcntl
import functools
import hashlib
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from sass import KERNELS

INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, *INTEGERS]  # in the order of enum Type
OPS = [*KERNELS.values()]  # in the order of enum Op
MAX_AVERAGES = 8

UPDATE_PAIRS = [pair for pair in oracle.PAIRS if not pair[0].is_complex]  # that fused_ema.update takes
LERP_PAIRS = UPDATE_PAIRS + oracle.NARROW_PAIRS  # that a manager takes
STOCHASTIC_PAIRS = [pair for pair in LERP_PAIRS if pair[0] in oracle.HALF]
CAST_PAIRS = list(itertools.permutations(oracle.FLOATS, 2))
RAW_PAIRS = [(dtype, dtype) for dtype in INTEGERS]

# "undefined" includes alignment. Leaving out three checks and optimising less halves the time to build.
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize=vptr,null,object-size", "-static-libubsan", "-Og"]
SMALL = ["-DFUSED_EMA_THREADS=32", "-DFUSED_EMA_UNROLL=2", "-DFUSED_EMA_STEPS=2"]


class Pair(NamedTuple):
    ema: torch.Tensor  # the first average
    model: torch.Tensor
    average: bool = True
    stride: int = 0  # elements from one average to the next
    number: int = 0  # of the first element, which its random bits depend on

    def nth(self, k):
        """Average k."""
        ema = self.ema
        return ema.as_strided(ema.shape, ema.stride(), ema.storage_offset() + k * self.stride)


class Call(ctypes.Structure):
    """struct Call of csrc/launch.h."""

    _fields_ = (
        ("first", ctypes.c_int32),
        ("last", ctypes.c_int32),
        ("decay", ctypes.c_double * MAX_AVERAGES),
        ("key", ctypes.c_uint64 * MAX_AVERAGES),
        ("device_decay", ctypes.c_void_p),
        ("device_decay_is_f64", ctypes.c_bool),
        ("scratch", ctypes.c_void_p),
    )


@functools.cache
def build(size="default"):
    """default: the kernel's own tile size, under a sanitizer if g++ has it. small: tiles of half as many threads."""
    path, flags = library("emulated_grid.cpp", *((SANITIZE, []) if size == "default" else (SMALL,)))
    grid = Grid(path)
    grid.sanitized = flags is SANITIZE
    return grid


def library(source, *choices):
    """The library that g++ makes of a file in this folder, and the first of several choices of flags that it takes."""
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: the emulated grid needs it")
    for flags in choices:
        path, errors = _library(source, flags)
        if path:
            return path, flags
    raise AssertionError(errors)


def _library(source, flags):
    """The library that these flags give, or None and the compiler's errors. Test processes and later runs share it."""
    source = Path(__file__).with_name(source)
    root = next(folder for folder in source.parents if (folder / "csrc").is_dir())
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", str(source), *flags]
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True).stdout
    contents = [
        version,
        repr(command).encode(),
        *(file.read_bytes() for file in (source, *sorted(root.glob("csrc/*.h")))),
    ]
    library = root / "build" / "grid" / f"{hashlib.sha256(b''.join(contents)).hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".tmp")
            done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
            if done.returncode:
                return None, done.stderr
            unfinished.rename(library)
    return library, ""


class Grid:
    """One build of emulated_grid.cpp."""

    def __init__(self, path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for name in ("grid_new", "grid_rows", "grid_layouts", "grid_tiles", "grid_stores"):
            getattr(self.library, name).restype = ctypes.c_void_p
        for name in ("grid_tile_elements", "grid_store_count", "grid_call_bytes", "grid_scratch_bytes", "grid_scratch"):
            getattr(self.library, name).restype = ctypes.c_int64
        for name in ("grid_lerp_pairs", "grid_narrow_pairs", "grid_cast_pairs"):
            getattr(self.library, name).restype = ctypes.c_char_p
        assert self.library.grid_call_bytes() == ctypes.sizeof(Call), "struct Call of csrc/launch.h has changed"

    def tile(self, dtype):
        """Elements of an average of this type in one tile."""
        return self.library.grid_tile_elements(dtype.itemsize)

    def tables(self, pairs, with_tiles=True):
        return Tables(self.library, pairs, with_tiles)

    def stores(self):
        """The writes of the last run: addresses, sizes in bytes."""
        return array_at(self.library.grid_stores(), ctypes.c_int64, self.library.grid_store_count()).T

    def convert(self, function, values, dtype, random=None):
        """A C function (values, results, count, random) applied to a flat tensor; `random`: int32 bits."""
        results = torch.empty(len(values), dtype=dtype)
        count = ctypes.c_int64(len(values))
        self.library[function](address_of(values), address_of(results), count, address_of(random))
        return results

    def random_bits(self, key, counters):
        """For counters in int64: their bits are taken as unsigned."""
        bits = torch.empty(len(counters), dtype=torch.int32)
        count = ctypes.c_int64(len(counters))
        self.library.grid_random_bits(ctypes.c_uint64(key), address_of(counters), address_of(bits), count)
        return bits


def address_of(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


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

    def _add(self, ema, model, average, stride, number, with_tiles):
        types = [TYPES.index(side.dtype) for side in (ema, model)]
        shape = [(ctypes.c_int64 * ema.dim())(*values) for values in (ema.shape, ema.stride(), model.stride())]
        arguments = [address_of(ema), address_of(model), *types, int(average), ema.dim(), *shape]
        more = ctypes.c_int64(stride), ctypes.c_int64(number)
        return bool(self.library.grid_add(self.handle, *arguments, *more, int(with_tiles)))

    def counts(self):
        """Rows, layouts, tiles, elements."""
        out = (ctypes.c_int64 * 4)()
        self.library.grid_counts(self.handle, out)
        return tuple(out)

    def table(self, name, size):
        """The bytes of a table, "rows", "layouts" or "tiles", whose entries have this size."""
        count = self.counts()[("rows", "layouts", "tiles").index(name)]
        return ctypes.string_at(getattr(self.library, f"grid_{name}")(self.handle), count * size)

    def tiles(self):
        """[tile, (row, index)]"""
        return array_at(self.library.grid_tiles(self.handle), ctypes.c_uint32, self.counts()[2])

    def dims(self, row):
        """Dimensions of a row's layout; -1 if the row is flat."""
        return self.library.grid_dims(self.handle, ctypes.c_int64(row))

    def scratch_bytes(self):
        """Bytes of scratch memory that an exchange needs."""
        return self.library.grid_scratch_bytes(self.handle)

    def scratch(self, row):
        """Where a row's part of the scratch memory begins; -1 if it needs none."""
        return self.library.grid_scratch(self.handle, ctypes.c_int64(row))

    def offsets(self, row, i):
        """Of element i of a row, on both sides."""
        out = (ctypes.c_int64 * 2)()
        self.library.grid_offsets(self.handle, ctypes.c_int64(row), ctypes.c_int64(i), out)
        return tuple(out)

    def run(self, op, decay, device_decay=None, tiles=None, seed=1, *, first=0, keys=(), scratch=None):
        """Runs one launch.

        `decay` and `keys` are those of the averages from `first` on; `decay` may be a number. `device_decay` is a
        float32 or float64 tensor with the decays of all averages, `scratch` a tensor of bytes. `tiles` chooses among
        tiles().
        """
        decays = [decay] if isinstance(decay, float) else decay
        call = Call(first, first + len(decays))
        call.decay[first : call.last] = decays
        call.key[first : first + len(keys)] = keys
        call.device_decay, call.scratch = address_of(device_decay), address_of(scratch)
        call.device_decay_is_f64 = device_decay is not None and device_decay.dtype == torch.float64
        self.library.grid_run(
            self.handle,
            OPS.index(op),
            ctypes.byref(call),
            None if tiles is None else ctypes.c_void_p(tiles.ctypes.data),
            ctypes.c_int64(0 if tiles is None else len(tiles)),
            ctypes.c_uint64(seed),
        )
