"""The CUDA kernel's own tile code (csrc/tiles.h, csrc/table.h), built by g++ and run over an emulated grid.

What a GPU would do is done here by the same source: each (block, thread) once, in shuffled order, in memory with
guards around each tensor. Only the machine code differs, and tests/audit_sass.py looks at that.
"""

import ctypes
import itertools
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

TYPES = ["f32", "f64", "bf16", "f16", "raw1", "raw2", "raw4", "raw8"]  # in the order of enum Type
SIZE = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2, "raw1": 1, "raw2": 2, "raw4": 4, "raw8": 8}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNIFICAND = {"f32": 24, "f64": 53, "bf16": 8, "f16": 11}  # bits, the hidden one included
MIN_EXPONENT = {"f32": -126, "f64": -1022, "bf16": -126, "f16": -14}
TORCH = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
UPDATE, COPY, SWAP = range(3)  # enum Op

FLOATS = ["f32", "f64", "bf16", "f16"]
LERP_PAIRS = [(e, p) for e in FLOATS for p in FLOATS if SIZE[e] >= SIZE[p]]
CAST_PAIRS = [(e, p) for e in FLOATS for p in FLOATS if e != p]
RAW_PAIRS = [(t, t) for t in TYPES if t.startswith("raw")]
DECAYS = [0.999, 0.25]  # both branches of the contract: 1 - decay below one half, and not


# ---- the library


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

    def tile(self, type_):
        return self.library.grid_tile_elements(SIZE[type_])

    def tables(self, tensors, with_tiles=True):
        return Tables(self.library, tensors, with_tiles)

    def stores(self):
        """The writes of the last run: addresses and sizes in bytes."""
        count = self.library.grid_store_count()
        if count == 0:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        array = np.ctypeslib.as_array((ctypes.c_uint64 * (2 * count)).from_address(self.library.grid_stores()))
        return array[0::2].copy(), array[1::2].copy()


class Tables:
    """The tables of one launch. A tensor is (ema address, model address, types, average, sizes, strides, strides)."""

    def __init__(self, library, tensors, with_tiles):
        self.library = library
        self.handle = ctypes.c_void_p(library.grid_new())
        self.added = [self._add(with_tiles, *tensor) for tensor in tensors]

    def __del__(self):
        self.library.grid_delete(self.handle)

    def _add(self, with_tiles, ema, model, types, average, sizes, ema_strides=None, model_strides=None):
        def array(values):
            return (ctypes.c_int64 * len(sizes))(*values)

        return bool(
            self.library.grid_add(
                self.handle,
                ctypes.c_void_p(ema),
                ctypes.c_void_p(model),
                TYPES.index(types[0]),
                TYPES.index(types[1]),
                int(average),
                len(sizes),
                array(sizes),
                array(ema_strides or contiguous(sizes)),
                array(model_strides or contiguous(sizes)),
                int(with_tiles),
            )
        )

    def counts(self):
        """Rows, layouts, tiles, elements."""
        out = (ctypes.c_int64 * 4)()
        self.library.grid_counts(self.handle, out)
        return tuple(out)

    def tiles(self):
        """[tile, (row, index)]"""
        count = self.counts()[2]
        array = (ctypes.c_uint32 * (2 * count)).from_address(self.library.grid_tiles(self.handle))
        return np.ctypeslib.as_array(array).reshape(-1, 2).copy()

    def dims(self, row):
        return self.library.grid_dims(self.handle, ctypes.c_int64(row))

    def offsets(self, row, i):
        out = (ctypes.c_int64 * 2)()
        self.library.grid_offsets(self.handle, ctypes.c_int64(row), ctypes.c_int64(i), out)
        return tuple(out)

    def run(self, op, decay, device_decay=None, tiles=None, seed=1):
        """`device_decay`: a numpy array of one float32 or float64. `tiles`: chosen ones, as tiles() gives them."""
        self.library.grid_run(
            self.handle,
            op,
            ctypes.c_double(decay),
            None if device_decay is None else ctypes.c_void_p(device_decay.ctypes.data),
            int(device_decay is not None and device_decay.dtype == np.float64),
            None if tiles is None else ctypes.c_void_p(tiles.ctypes.data),
            ctypes.c_int64(0 if tiles is None else len(tiles)),
            ctypes.c_uint64(seed),
        )


def contiguous(sizes):
    strides = [1] * len(sizes)
    for d in range(len(sizes) - 2, -1, -1):
        strides[d] = strides[d + 1] * sizes[d + 1]
    return strides


SANITIZE = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-static-libubsan"]  # undefined includes alignment
SMALL = ["-DFUSED_EMA_THREADS=32", "-DFUSED_EMA_UNROLL=2", "-DFUSED_EMA_STEPS=2"]


def build(folder, name, flags):
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: the emulated grid needs it")
    source, output = Path(__file__).with_name("emulated_grid.cpp"), folder / f"{name}.so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        str(source),
        "-o",
        str(output),
    ]
    done = subprocess.run(command + flags, capture_output=True, text=True)
    return Grid(output) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="session")
def grids(tmp_path_factory):
    """default: the kernel's own tile size, with the sanitizer where g++ has it. small: 64 times fewer elements."""
    folder = tmp_path_factory.mktemp("emulated_grid")
    sanitized = build(folder, "sanitized", SANITIZE)
    default = sanitized if isinstance(sanitized, Grid) else build(folder, "default", [])
    small = build(folder, "small", SMALL)
    assert isinstance(default, Grid), default
    assert isinstance(small, Grid), small
    return {"default": default, "small": small, "sanitized": sanitized is default}


@pytest.fixture
def grid(grids):
    return grids["default"]


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    """The sanitizer reports on stderr: misaligned accesses, overflows, shifts, bad bools."""
    yield
    assert "runtime error" not in capfd.readouterr().err


# ---- memory


def address_of(array):
    return array.ctypes.data


class Memory:
    """One block of bytes that holds all tensors of a launch, noise around each."""

    GUARD = 48

    def __init__(self, rng, size):
        self.bytes = rng.integers(0, 256, size + 64, dtype=np.uint8)
        self.used = -address_of(self.bytes) % 16
        self.rng = rng

    def take(self, type_, n, offset=0):
        """Room for n elements, the first `offset` elements past a 16-byte boundary."""
        start = self.used + self.GUARD + offset * SIZE[type_]
        self.used = start + n * SIZE[type_] + self.GUARD
        self.used += -(address_of(self.bytes) + self.used) % 16
        assert self.used + self.GUARD <= len(self.bytes)
        return start

    def view(self, start, type_, n):
        return self.bytes[start : start + n * SIZE[type_]].view(BITS[SIZE[type_]])

    def address(self, start):
        return address_of(self.bytes) + start


class Case:
    """A flat pair in a Memory."""

    def __init__(self, memory, types, n, ema_offset=0, model_offset=0, average=True):
        self.types, self.n, self.average, self.memory = types, n, average, memory
        self.ema_at = memory.take(types[0], n, ema_offset)
        self.model_at = memory.take(types[1], n, model_offset)
        self.ema[:] = noise(memory.rng, types[0], n)
        self.model[:] = noise(memory.rng, types[1], n)
        if types[0] == types[1]:
            same_value = memory.rng.random(n) < 0.2
            self.model[same_value] = self.ema[same_value]

    @property
    def ema(self):
        return self.memory.view(self.ema_at, self.types[0], self.n)

    @property
    def model(self):
        return self.memory.view(self.model_at, self.types[1], self.n)

    def tensor(self):
        ema, model = self.memory.address(self.ema_at), self.memory.address(self.model_at)
        return ema, model, self.types, self.average, [self.n]

    def vectors(self, tile):
        """How many 16-byte stores the average should get: all of its whole tiles, where both sides are aligned."""
        lanes = 16 // SIZE[self.types[0]]
        before = self.memory.address(self.ema_at) % 16 // SIZE[self.types[0]]
        model_vector = min(16, lanes * SIZE[self.types[1]])
        if (self.memory.address(self.model_at) - before * SIZE[self.types[1]]) % model_vector:
            return 0
        whole = (self.n + before) // tile - (1 if before and self.n + before >= tile else 0)
        return whole * tile // lanes


def noise(rng, type_, n):
    """Bits of n values: most of them ordinary, some zeros of both signs, some random bit patterns."""
    dtype = BITS[SIZE[type_]]
    random_bits = rng.integers(0, np.iinfo(dtype).max, n, dtype=dtype, endpoint=True)
    if type_ not in FLOATS:
        return random_bits
    bits = to_storage(rng.standard_normal(n) * 2.0 ** rng.integers(-12, 12, n), type_)
    kind = rng.random(n)
    bits[kind < 0.1] = random_bits[kind < 0.1]
    sign = dtype(1 << (8 * SIZE[type_] - 1))
    bits[kind > 0.95] = random_bits[kind > 0.95] & sign
    return bits


def sizes_for(tile):
    return [0, 1, 3, 15, 17, tile - 1, tile, tile + 1, 3 * tile + 5]


def make_cases(rng, types, tile):
    """Each size at five pairs of offsets: none, two equal ones (aligned to each other), two random ones."""
    ema_lanes, model_lanes = 16 // SIZE[types[0]], 16 // SIZE[types[1]]
    plan = []
    for n in sizes_for(tile):
        equal = rng.integers(1, ema_lanes, 2, endpoint=True)
        free = zip(
            rng.integers(0, ema_lanes, 2, endpoint=True),
            rng.integers(0, model_lanes, 2, endpoint=True),
            strict=True,
        )
        plan += [(n, a, b) for a, b in [(0, 0), *zip(equal, equal, strict=True), *free]]
    room = sum(n for n, _, _ in plan) * (SIZE[types[0]] + SIZE[types[1]]) + len(plan) * 512
    memory = Memory(rng, room)
    cases = [Case(memory, types, n, int(a), int(b)) for n, a, b in plan]
    return memory, cases


# ---- the oracle: DESIGN.md, section 3


def to_compute(bits, type_):
    """float32 or float64 values of bits; exact."""
    if type_ == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32 if type_ == "f32" else np.float64)


def to_storage(values, type_):
    """Bits of values after PyTorch's own cast."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[type_])
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[SIZE[type_]]
    return tensor.view(integer).numpy().view(BITS[SIZE[type_]]).copy()


def fma32(a, b, c):
    """round(a * b + c) for float32: the product is exact in float64, the sum is rounded to odd there, so that the last
    rounding is the only one that counts."""
    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
        total = product + c
        big = total - product
        error = (product - (total - big)) + (c - big)  # exact (Knuth's TwoSum)
        even = total.view(np.uint64) & np.uint64(1) == 0
        to_odd = np.isfinite(total) & (error != 0) & even
        total = np.where(to_odd, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
        return total.astype(np.float32)


def lerp32(e, p, decay):
    weight = 1.0 - decay
    factor, base = (weight, e) if weight < 0.5 else (-decay, p)
    with np.errstate(all="ignore"):
        t = p - e
    result = fma32(np.full_like(t, factor), t, base)
    return np.where(t == 0, e, result)


def round_fraction(x, significand=53, min_exponent=-1022):
    """x as the nearest binary float, ties to even."""
    if x == 0:
        return 0.0
    exponent = math.frexp(abs(x.numerator) / x.denominator)[1] - 1 if abs(x) >= Fraction(1, 2**1000) else -1022
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent and exponent > min_exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, min_exponent) - significand + 1)
    rounded = float(round(x / unit) * unit)  # Python rounds halves to even
    return math.copysign(rounded, x)


def lerp64(e, p, decay):
    """For finite e and p whose difference is finite."""
    if e == p:
        return e
    weight = 1.0 - decay
    t = p - e
    factor, base = (weight, e) if weight < 0.5 else (-decay, p)
    return round_fraction(Fraction(factor) * Fraction(t) + Fraction(base))


def in_float64(types):
    return "f64" in types


def same_bits(a, b, type_):
    """Equal bits; two NaN may differ in theirs."""
    if type_ not in FLOATS:
        return a == b
    return (a == b) | (np.isnan(to_compute(a, type_)) & np.isnan(to_compute(b, type_)))


def check_lerp(rng, types, e, p, got, decay):
    """Bits against the contract (of all elements where arithmetic is float32, of a sample in float64); the bound."""
    ema_type, model_type = types
    compute = np.float64 if in_float64(types) else np.float32
    with np.errstate(invalid="ignore"):  # signalling NaN
        x, y = to_compute(e, ema_type).astype(compute), to_compute(p, model_type).astype(compute)
    z = to_compute(got, ema_type)
    with np.errstate(all="ignore"):
        bounded = np.isfinite(y - x)
    if compute is np.float32:
        assert same_bits(got, to_storage(lerp32(x, y, decay), ema_type), ema_type).all()
        bounded &= np.isfinite(z)  # a bfloat16 model may be too large for a float16 average
    else:
        for i in rng.permutation(np.flatnonzero(bounded))[:40]:
            want = np.float64(lerp64(float(x[i]), float(y[i]), decay))
            assert want.tobytes() == z[i].tobytes(), (x[i], y[i], z[i], want)
        rest, (factor, base) = ~bounded, (1.0 - decay, x) if 1.0 - decay < 0.5 else (-decay, y)
        with np.errstate(all="ignore"):
            want = factor * (y - x) + base  # Inf and NaN need no fused rounding
        assert same_bits(want[rest].view(np.uint64), z[rest].view(np.uint64), "f64").all()
    check_bound(types, x[bounded], y[bounded], z[bounded], decay)


def check_bound(types, e, p, got, decay):
    """|err| <= half an ulp of the average's type + 2^-23 min(w, decay) |p - e| (2^-52 in float64); 16-bit averages add
    the half ulp of float32. In long double, whose own error is below a 2^-62nd of the operands."""
    e, p, got = (np.asarray(x, np.longdouble) for x in (e, p, got))
    weight = 1 - np.longdouble(decay)
    error = np.abs(got - (e + weight * (p - e)))
    bound = half_ulp(got, types[0]) + (0 if types[0] in ("f32", "f64") else half_ulp(got, "f32"))
    bound += (
        2.0 ** (-52 if in_float64(types) else -23) * (1 + 2.0**-20) * min(weight, np.longdouble(decay)) * np.abs(p - e)
    )
    bound += 2.0**-62 * (np.abs(e) + np.abs(p))
    worst = np.argmax(error - bound) if len(error) else None
    assert (error <= bound).all(), (e[worst], p[worst], got[worst], decay)


def half_ulp(x, type_):
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, MIN_EXPONENT[type_])
    return np.ldexp(np.longdouble(1), exponent - SIGNIFICAND[type_])


def expect(case, op, decay, e, p):
    """The bits that an exact copy or exchange leaves in (ema, model)."""
    if op == SWAP:
        return p, e
    if case.types[0] == case.types[1]:
        return p, p
    return to_storage(to_compute(p, case.types[1]), case.types[0]), p


def writes_per_byte(grid, memory):
    """How often each byte of memory was written by the last run; nothing outside it was."""
    addresses, sizes = grid.stores()
    assert (addresses % sizes == 0).all(), "misaligned store"
    at = addresses.astype(np.int64) - address_of(memory.bytes)
    counts = np.zeros(len(memory.bytes), np.int64)
    for size in np.unique(sizes):
        touched = at[sizes == size][:, None] + np.arange(size, dtype=np.int64)
        assert touched.min() >= 0
        assert touched.max() < len(counts)
        counts += np.bincount(touched.ravel(), minlength=len(counts))
    return counts


def run_and_check(grid, memory, cases, op, decay, device_decay=None, seed=1):
    before = memory.bytes.copy()
    old = [(case.ema.copy(), case.model.copy()) for case in cases]
    tables = grid.tables([case.tensor() for case in cases])
    tables.run(op, decay, device_decay, seed=seed)
    if device_decay is not None:
        decay = float(device_decay[0])

    written = np.zeros(len(before), np.int64)
    for case, (e, p) in zip(cases, old, strict=True):
        ema_bytes = slice(case.ema_at, case.ema_at + e.nbytes)
        model_bytes = slice(case.model_at, case.model_at + p.nbytes)
        if op == UPDATE and case.average and decay != 0:
            check_lerp(memory.rng, case.types, e, p, case.ema, decay)
        else:
            ema, model = expect(case, op, decay, e, p)
            exact = case.types[0] == case.types[1]
            assert (case.ema == ema).all() if exact else same_bits(case.ema, ema, case.types[0]).all()
            assert (case.model == model).all()
        before[ema_bytes] = memory.bytes[ema_bytes]
        written[ema_bytes] = 1
        if op == SWAP:
            before[model_bytes] = memory.bytes[model_bytes]
            written[model_bytes] = 1
    assert (memory.bytes == before).all(), "bytes outside the tensors changed"
    assert (writes_per_byte(grid, memory) == written).all(), "not every element was written exactly once"
    vectors = sum(case.vectors(grid.tile(case.types[0])) for case in cases)
    assert (grid.stores()[1] == 16).sum() == vectors * (2 if op == SWAP else 1)
    return vectors


# ---- flat tensors


def named(pairs):
    return pytest.mark.parametrize("types", pairs, ids=lambda t: f"{t[0]}<-{t[1]}")


sized = pytest.mark.parametrize("size", ["default", "small"])


def test_every_pair_of_types_is_tested(grid):
    def parse(text):
        return sorted(tuple(pair.split("<-")) for pair in text.decode().split())

    assert parse(grid.library.grid_lerp_pairs()) == sorted(LERP_PAIRS)
    assert parse(grid.library.grid_cast_pairs()) == sorted(CAST_PAIRS)


@sized
@named(LERP_PAIRS)
def test_update(grids, size, types):
    grid, rng = grids[size], np.random.default_rng(1)
    for seed, decay in enumerate(DECAYS):
        memory, cases = make_cases(rng, types, grid.tile(types[0]))
        assert run_and_check(grid, memory, cases, UPDATE, decay, seed=seed) > 0


@sized
@named(CAST_PAIRS + RAW_PAIRS)
def test_copy(grids, size, types):
    grid, rng = grids[size], np.random.default_rng(2)
    memory, cases = make_cases(rng, types, grid.tile(types[0]))
    assert run_and_check(grid, memory, cases, COPY, 0.0) > 0


@sized
@named(RAW_PAIRS)
def test_swap(grids, size, types):
    grid, rng = grids[size], np.random.default_rng(3)
    memory, cases = make_cases(rng, types, grid.tile(types[0]))
    assert run_and_check(grid, memory, cases, SWAP, 0.0) > 0


def mixed_cases(rng, sizes, per_type=2):
    """Tensors of every kind in one memory: averages, casts that an update copies, raw bytes."""
    plan = []
    for types, average in [(t, True) for t in LERP_PAIRS] + [(t, False) for t in CAST_PAIRS + RAW_PAIRS]:
        for _ in range(per_type):
            offsets = [int(rng.integers(0, 16 // SIZE[t], endpoint=True)) for t in types]
            plan.append((types, int(rng.choice(sizes)), *offsets, average))
    memory = Memory(rng, sum(n * 16 + 512 for _, n, *_ in plan))
    cases = [Case(memory, *row) for row in plan]
    return memory, [cases[i] for i in rng.permutation(len(cases))]


@sized
@pytest.mark.parametrize("decay", [0.999, 0.0])
def test_one_launch_of_every_type(grids, size, decay):
    grid, rng = grids[size], np.random.default_rng(4)
    memory, cases = mixed_cases(rng, [0, 1, 100, grid.tile("f32"), 2 * grid.tile("f32") + 3])
    assert run_and_check(grid, memory, cases, UPDATE, decay) > 0


def test_neither_tile_size_nor_order_changes_bits(grids):
    rng = np.random.default_rng(5)
    memory, cases = mixed_cases(rng, [1000, 5000, 17000], per_type=1)
    start, results = memory.bytes.copy(), []
    for grid, seed in [(grids["default"], 1), (grids["small"], 1), (grids["default"], 2)]:
        memory.bytes[:] = start
        grid.tables([case.tensor() for case in cases]).run(UPDATE, 0.9, seed=seed)
        results.append(memory.bytes.copy())
        cases.reverse()
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decay_on_the_device(grid, dtype):
    rng = np.random.default_rng(6)
    for decay in (0.9999, 0.25, 0.0):
        memory, cases = mixed_cases(rng, [10, 5000], per_type=1)
        run_and_check(grid, memory, cases, UPDATE, 0.5, device_decay=np.array([decay], dtype))

    memory, cases = mixed_cases(rng, [10, 5000], per_type=1)
    before = memory.bytes.copy()
    grid.tables([case.tensor() for case in cases]).run(UPDATE, 0.5, np.array([1.0], dtype))
    assert (memory.bytes == before).all()
    assert len(grid.stores()[0]) == 0


@named(LERP_PAIRS)
def test_special_values(grid, types):
    """Every ordered pair of zeros, subnormals, extremes, Inf and NaN; equal values must stay, bit for bit."""
    special = {}
    for side in types:
        with np.errstate(over="ignore"):
            tiny, largest = (np.float64(getattr(torch.finfo(TORCH[side]), name)) for name in ("smallest_normal", "max"))
            step = torch.finfo(TORCH[side]).eps
            least = tiny * step
            values = [
                0.0,
                least,
                3 * least,
                tiny - least,
                tiny,
                1 - step / 2,
                1.0,
                1 + step,
                3.0,
                largest,
                np.inf,
            ]
        bits = to_storage(np.array(values), side)
        sign = BITS[SIZE[side]](1 << (8 * SIZE[side] - 1))
        special[side] = np.concatenate([bits, bits | sign, to_storage(np.array([np.nan]), side)])
    pairs = np.array(list(itertools.product(special[types[0]], special[types[1]])), dtype=object)
    rng = np.random.default_rng(7)
    for decay in (0.9999, 0.75, 0.5, 0.25, 1e-3, 1 - 2.0**-53):
        memory = Memory(rng, 1 << 16)
        case = Case(memory, types, len(pairs))
        case.ema[:], case.model[:] = pairs[:, 0].astype(case.ema.dtype), pairs[:, 1].astype(case.model.dtype)
        e = case.ema.copy()
        run_and_check(grid, memory, [case], UPDATE, decay)
        x, y = (to_compute(bits, t).astype(np.float64) for bits, t in zip((e, case.model), types, strict=True))
        finite_equal = (x == y) & np.isfinite(x)
        assert (case.ema == e)[finite_equal].all()
        with np.errstate(all="ignore"):
            z, t = to_compute(case.ema, types[0]).astype(np.float64), y - x
            between = np.isfinite(t) & (np.abs(t) <= (np.inf if in_float64(types) else np.finfo(np.float32).max))
            between &= same_value_in(types, y)
            assert ((np.minimum(x, y) <= z) & (z <= np.maximum(x, y)))[between].all()


def same_value_in(types, y):
    """Where the model's value can be written in the average's type."""
    return to_compute(to_storage(y, types[0]), types[0]).astype(np.float64) == y


def test_values_stay_between(grid):
    """min(e, p) <= e' <= max(e, p), for neighbours and far apart, at many decays."""
    rng = np.random.default_rng(8)
    memory = Memory(rng, 1 << 20)
    case = Case(memory, ("f32", "f32"), 20000)
    for decay in [*rng.random(30), 1 - 2.0**-30, 2.0**-30]:
        near = np.float32(1) + rng.integers(-4, 4, case.n).astype(np.float32) * np.float32(2.0**-24)
        case.ema[:] = to_storage(rng.standard_normal(case.n), "f32")
        case.model[:] = (case.ema.view(np.float32) * near).view(np.uint32)
        case.model[::2] = to_storage(rng.standard_normal(case.n // 2), "f32")
        x, y = case.ema.view(np.float32).copy(), case.model.view(np.float32)
        grid.tables([case.tensor()]).run(UPDATE, decay)
        z = case.ema.view(np.float32)
        assert ((np.minimum(x, y) <= z) & (z <= np.maximum(x, y))).all()


def test_the_oracle_itself():
    """fma32 against exact fractions, on ordinary, cancelling, tied and subnormal operands."""
    rng = np.random.default_rng(9)

    def operands(n):
        return (rng.standard_normal(n) * 2.0 ** rng.integers(-75, 60, n)).astype(np.float32)

    a, b, c = operands(2400), operands(2400), operands(2400)
    c[:600] = (-a[:600].astype(np.float64) * b[:600]).astype(np.float32)  # cancels all but the last bits
    a[600:1200], b[600:1200] = 1.0, np.spacing(c[600:1200]) / 2  # ties
    a[1200:1500] = 2.0**-100
    got = fma32(a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if abs(exact) < 2**127:
            assert round_fraction(exact, 24, -126) == r
    values = np.concatenate([rng.standard_normal(500), rng.standard_normal(500) * 2.0**-1060])
    for x in values.tolist():
        assert round_fraction(Fraction(x)) == x
        assert round_fraction(Fraction(x) / 3) == float(Fraction(x) / 3)


# ---- conversions


@pytest.mark.parametrize("type_", ["bf16", "f16"])
def test_every_16_bit_pattern_to_float(grid, type_):
    bits, got = np.arange(65536, dtype=np.uint16), np.empty(65536, np.uint32)
    pointers = ctypes.c_void_p(address_of(bits)), ctypes.c_void_p(address_of(got))
    getattr(grid.library, f"grid_{type_}_to_float")(*pointers, ctypes.c_int64(len(bits)))
    want = torch.from_numpy(bits.view(np.int16)).view(TORCH[type_]).float().numpy().view(np.uint32)
    assert same_bits(got, want, "f32").all()
    assert np.isnan(got.view(np.float32)).sum() == np.isnan(to_compute(bits, type_)).sum()


@pytest.mark.parametrize("type_", ["bf16", "f16"])
def test_from_float_rounds_as_torch_does(grid, type_):
    """All exponents, all roundings of each: below, at and above every kind of tie; then a million random patterns."""
    dropped = 24 - SIGNIFICAND[type_]
    tie = 1 << (dropped - 1)
    tails = [0, 1, tie - 1, tie, tie + 1, 2 * tie - 1]
    # Results that are subnormal float16 drop up to 24 bits: single bits at all places stand for their ties.
    places = [1 << k for k in range(23)] + [(1 << k) - 1 for k in range(23)] + [(3 << k) & 0x7FFFFF for k in range(23)]
    heads = [0, 1, 2, 3, (0x7FFFFF >> dropped) - 1, 0x7FFFFF >> dropped]
    mantissas = [head << dropped | tail for head in heads for tail in tails] + places
    mantissas += [m ^ 1 for m in mantissas]
    exhaustive = [s << 31 | x << 23 | m for s in (0, 1) for x in range(256) for m in mantissas]
    rng = np.random.default_rng(10)
    random_bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    values = np.concatenate([np.array(exhaustive, np.uint32), random_bits])
    got = np.empty(len(values), np.uint16)
    pointers = ctypes.c_void_p(address_of(values)), ctypes.c_void_p(address_of(got))
    getattr(grid.library, f"grid_{type_}_from_float")(*pointers, ctypes.c_int64(len(values)))
    assert same_bits(got, to_storage(values.view(np.float32), type_), type_).all()


# ---- strided tensors


def random_layout(rng, sizes):
    """Strides of a permuted tensor with random gaps, and the elements it spans."""
    strides, span = [0] * len(sizes), 1
    for d in rng.permutation(len(sizes)):
        strides[d] = span
        span *= sizes[d]
        if rng.random() < 0.4:
            span += int(rng.integers(1, 4))
    return strides, 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def strided_view(memory, start, type_, span, sizes, strides):
    size = SIZE[type_]
    return np.lib.stride_tricks.as_strided(memory.view(start, type_, span), sizes, [s * size for s in strides])


def check_strided(grid, rng, types, sizes, ema, model, op, decay=0.9):
    """`ema` and `model`: strides and span of each side."""
    memory = Memory(rng, (ema[1] * SIZE[types[0]] + model[1] * SIZE[types[1]]) + 512)
    at = [memory.take(t, span, int(rng.integers(0, 4))) for t, (_, span) in zip(types, (ema, model), strict=True)]
    for start, t, (_, span) in zip(at, types, (ema, model), strict=True):
        memory.view(start, t, span)[:] = noise(rng, t, span)
    views = [strided_view(memory, at[i], types[i], side[1], sizes, side[0]) for i, side in enumerate((ema, model))]
    e, p = views[0].copy(), views[1].copy()
    before = memory.bytes.copy()
    tables = grid.tables([(memory.address(at[0]), memory.address(at[1]), types, True, sizes, ema[0], model[0])])
    tables.run(op, decay)

    got = views[0].ravel()
    if op == UPDATE:
        check_lerp(rng, types, e.ravel(), p.ravel(), got, decay)
    elif types[0] == types[1]:
        assert (got == p.ravel()).all()
    else:
        assert same_bits(got, to_storage(to_compute(p.ravel(), types[1]), types[0]), types[0]).all()
    written = np.zeros(len(before), np.int64)
    expected = [(views[0], 0)]
    if op == SWAP:
        assert (views[1] == e).all()
        expected.append((views[1], 1))
    for view, side in expected:
        starts = (np.arange(ema[1] if side == 0 else model[1]) * SIZE[types[side]] + at[side])[:, None]
        touched = np.lib.stride_tricks.as_strided(
            starts, sizes, [s * starts.itemsize for s in (ema, model)[side][0]]
        ).ravel()[:, None] + np.arange(view.itemsize)
        written[touched] = 1
    assert (writes_per_byte(grid, memory) == written).all()
    assert (memory.bytes == before)[written == 0].all()
    return tables


def test_random_strides(grids):
    rng = np.random.default_rng(11)
    kinds = (
        [(UPDATE, t) for t in LERP_PAIRS] + [(COPY, t) for t in CAST_PAIRS + RAW_PAIRS] + [(SWAP, t) for t in RAW_PAIRS]
    )
    for trial in range(150):
        op, types = kinds[trial % len(kinds)]
        sizes = [int(n) for n in rng.integers(1, 9, rng.integers(1, 6))]
        ema, model = random_layout(rng, sizes), random_layout(rng, sizes)
        if op != SWAP and rng.random() < 0.3:  # an expanded model
            strides = [0 if rng.random() < 0.5 else s for s in model[0]]
            model = strides, 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        check_strided(grids[("default", "small")[trial % 2]], rng, types, sizes, ema, model, op)


def channels_last(n, c, h, w):
    return [h * w * c, 1, w * c, c]


def test_dimensions_that_merge(grid):
    """Which pairs end as flat ones, and how many dimensions the others keep."""
    rng = np.random.default_rng(12)
    image = [2, 3, 5, 7]
    span = math.prod(image)
    gap = [3 * 5 * 8, 5 * 8, 8, 1]
    for sizes, ema, model, dims in [
        (image, contiguous(image), contiguous(image), -1),
        (image, channels_last(*image), channels_last(*image), -1),
        (image, contiguous(image), channels_last(*image), 3),  # N, C, H x W
        (image, channels_last(*image), contiguous(image), 3),
        ([1, 6, 1, 4], [999, 4, 7, 1], [5, 4, 0, 1], -1),  # strides of size-1 dimensions mean nothing
        (image, gap, gap, 2),  # one gap: N x C x H, W
        (image, contiguous(image), gap, 2),
        (image, contiguous(image), [0, 0, 0, 0], 1),  # a scalar expanded
        ([4, 3], [1, 4], [1, 4], -1),  # transposed alike
        ([3, 4], [8, 2], [8, 2], 1),  # every other element
        ([], [], [], -1),
    ]:
        last = [1 + sum((n - 1) * s for n, s in zip(sizes, side, strict=True)) for side in (ema, model)]
        assert max(last) <= 2 * span
        tables = check_strided(grid, rng, ("f32", "bf16"), sizes, (ema, last[0]), (model, last[1]), UPDATE)
        assert tables.dims(0) == dims, (sizes, ema, model)


def test_too_many_dimensions_are_refused_and_leave_the_tables(grid):
    sizes = [2] * 13
    forward = contiguous(sizes)
    tables = grid.tables(
        [
            (4096, 8192, ("f32", "f32"), True, [5]),
            (4096, 8192, ("f32", "f32"), True, sizes, forward, forward[::-1]),
            (4096, 8192, ("f32", "f32"), True, sizes[1:], forward[1:], forward[:0:-1]),
        ]
    )
    assert tables.added == [True, False, True]
    assert tables.counts() == (2, 1, 2, 5 + 2**12)
    assert tables.dims(1) == 12


def test_empty_tensors_add_nothing(grid):
    tables = grid.tables([(4096, 8192, ("f32", "f32"), True, sizes) for sizes in ([0], [3, 0, 2], [0, 0])])
    assert all(tables.added)
    assert tables.counts() == (0, 0, 0, 0)
    tables.run(UPDATE, 0.9)
    assert len(grid.stores()[0]) == 0


# ---- large tensors: no memory behind them but for the tiles that run


@sized
def test_tiles_cover_large_tensors(grids, size):
    """Tile tables around 2^31 and 2^32 elements, from addresses that nothing is ever read from."""
    grid = grids[size]
    for type_, numel, misaligned in [
        ("f32", 100, 0),
        ("f32", 2**31 + 17, 3),
        ("raw1", 2**32 + 1, 15),
        ("bf16", 2**32, 0),
    ]:
        if size == "small" and type_ != "raw1":
            numel = min(numel, 2**26)  # tables, too, take memory
        address = 2**40 + misaligned * SIZE[type_]
        tables = grid.tables([(address, address + 2**50, (type_, type_), True, [n]) for n in (7, numel)])
        tile = grid.tile(type_)
        tiles = tables.tiles()
        large = tiles[tiles[:, 0] == 1, 1]
        assert (large == np.arange(-(-(numel + misaligned) // tile))).all()
        assert tables.counts()[3] == numel + 7


def test_offsets_beyond_32_bits(grid):
    rng = np.random.default_rng(13)
    for sizes, ema, model in [
        ([2**20, 2**20], [2**20, 1], [1, 2**20]),
        ([2**16, 3, 2**21], [2**24, 2**22, 1], [2**21, 2**40, 1]),
        ([5, 2**33, 7], [7 * 2**33, 7, 1], [0, 1, 2**34]),
    ]:
        numel = math.prod(sizes)
        tables = grid.tables([(2**20, 2**60, ("f32", "f32"), True, sizes, ema, model)], with_tiles=False)
        assert tables.counts()[::3] == (1, numel)
        # Elements are numbered along the average's memory.
        order = sorted(range(len(sizes)), key=lambda d: -ema[d])
        for i in [0, 1, 2**31 - 1, 2**31, 2**32 + 5, numel - 1, *rng.integers(0, numel, 200).tolist()]:
            rest, at = i, [0, 0]
            for d in reversed(order):
                rest, index = divmod(rest, sizes[d])
                at = [at[0] + index * ema[d], at[1] + index * model[d]]
            assert tables.offsets(0, i) == tuple(at)


class Virtual:
    """A range of addresses; pages appear as they are touched."""

    READ_WRITE, PRIVATE_ANONYMOUS_NORESERVE, NO_HUGE_PAGES = 0x3, 0x2 | 0x20 | 0x4000, 15

    def __init__(self, size):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        length = ctypes.c_size_t(size)
        address = self.libc.mmap(None, length, self.READ_WRITE, self.PRIVATE_ANONYMOUS_NORESERVE, -1, ctypes.c_long(0))
        if address in (None, ctypes.c_void_p(-1).value):
            pytest.skip(f"this machine gives no {size >> 40} TiB of virtual memory: errno {ctypes.get_errno()}")
        self.address, self.size = address, size
        self.libc.madvise(ctypes.c_void_p(address), length, self.NO_HUGE_PAGES)

    def at(self, offset, type_, n):
        assert offset >= 0
        assert offset + n * SIZE[type_] <= self.size
        array = (ctypes.c_uint8 * (n * SIZE[type_])).from_address(self.address + offset)
        return np.ctypeslib.as_array(array).view(BITS[SIZE[type_]])

    def close(self):
        self.libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size))


@pytest.mark.parametrize("way", ["vectors", "elements", "strided"])
def test_two_to_the_forty_elements(grid, way):
    """float32 <- bfloat16 of 2^40 elements; only tiles at the ends and around 2^31 and 2^32 run."""
    numel, types, decay, ahead = 2**40, ("f32", "bf16"), 0.9, 3
    rng = np.random.default_rng(14)
    ema, model = Virtual(numel * 4 + 4096), Virtual(numel * 2 + 4096)
    try:
        ema_start = ahead * 4 if way != "strided" else 0
        model_start = {"vectors": ahead * 2, "elements": 0, "strided": 0}[way]
        sizes, ema_strides, model_strides = [numel], [1], [1]
        if way == "strided":  # the two outer dimensions exchanged
            sizes = [2**10, 2**10, 2**20]
            ema_strides, model_strides = [2**30, 2**20, 1], [2**20, 2**30, 1]
        tensor = (
            ema.address + ema_start,
            model.address + model_start,
            types,
            True,
            sizes,
            ema_strides,
            model_strides,
        )
        tables = grid.tables([tensor], with_tiles=False)
        assert tables.counts()[::3] == (1, numel)

        tile, misaligned = grid.tile("f32"), ema_start // 4
        last = (numel + misaligned - 1) // tile
        chosen = sorted(
            {0, 1, last - 1, last} | {(x + misaligned) // tile + k for x in (2**31, 2**32) for k in (-1, 0)}
        )
        runs = []  # first element, count
        for index in chosen:
            low, high = max(0, index * tile - misaligned), min(numel, (index + 1) * tile - misaligned)
            runs.append((low, high - low))
        assert runs[0][0] == 0
        assert sum(runs[-1]) == numel

        def model_at(
            first,
        ):  # where the model's value of element `first` lies; a tile never leaves its inner row
            if way != "strided":
                return first
            outer, middle, inner = first >> 30, first >> 20 & 1023, first & (2**20 - 1)
            return middle << 30 | outer << 20 | inner

        old = []
        for first, n in runs:
            e, p = noise(rng, "f32", n), noise(rng, "bf16", n)
            ema.at(ema_start + first * 4, "f32", n)[:] = e
            model.at(model_start + model_at(first) * 2, "bf16", n)[:] = p
            old.append((e, p))
        tiles = np.array([(0, index) for index in chosen], np.uint32)
        tables.run(UPDATE, decay, tiles=tiles)

        for (first, n), (e, p) in zip(runs, old, strict=True):
            check_lerp(rng, types, e, p, ema.at(ema_start + first * 4, "f32", n), decay)
        addresses, bytes_each = grid.stores()
        words = (addresses[:, None] + np.arange(0, 16, 4, dtype=np.uint64))[np.arange(0, 16, 4) < bytes_each[:, None]]
        wanted = np.concatenate([np.arange(first, first + n, dtype=np.uint64) for first, n in runs])
        assert (np.sort(words) == wanted * np.uint64(4) + np.uint64(ema.address + ema_start)).all()
        assert ((bytes_each == 16).any()) == (way == "vectors")
    finally:
        ema.close()
        model.close()


# ---- what is read


def test_reads_stay_inside_the_tensors(grid):
    """Tensors that end where their page does, the next page being out of reach: one byte too far would be fatal."""
    page = 4096
    rng = np.random.default_rng(15)
    for types in [("f32", "f32"), ("f32", "bf16"), ("bf16", "bf16"), ("f64", "f16"), ("raw1", "raw1")]:
        for n in (1, 17, 100, grid.tile(types[0]), grid.tile(types[0]) + 1):
            sides = []
            for t in types:
                length = -(-n * SIZE[t] // page) * page
                area = Virtual(length + 2 * page)
                for edge in (0, page + length):
                    assert area.libc.mprotect(ctypes.c_void_p(area.address + edge), ctypes.c_size_t(page), 0) == 0
                start = page + (length - n * SIZE[t]) * int(rng.integers(0, 2))  # at one edge or at the other
                area.at(start, t, n)[:] = noise(rng, t, n)
                sides.append((area, start))
            addresses = [area.address + start for area, start in sides]
            grid.tables([(*addresses, types, types[0] != "raw1", [n])]).run(UPDATE, 0.9)
            assert len(grid.stores()[0]) > 0
            for area, _ in sides:
                area.close()


def test_the_sanitizer_reports(grids, tmp_path, capfd):
    """A model half an element off its type must show, or silence from the sanitizer would mean nothing."""
    if not grids["sanitized"]:
        pytest.skip("g++ can't link the undefined behaviour sanitizer here; stores were still checked for alignment")
    copy = Grid(shutil.copy(grids["default"].path, tmp_path / "copy.so"))  # it reports each place once per library
    memory = Memory(np.random.default_rng(16), 4096)
    ema, model = memory.take("f32", 8), memory.take("bf16", 9)
    copy.tables([(memory.address(ema), memory.address(model) + 1, ("f32", "bf16"), True, [8])]).run(UPDATE, 0.9)
    assert "misaligned address" in capfd.readouterr().err


# ---- the other runner of the same plan


@pytest.fixture
def cpu_runner():
    try:
        import fused_ema

        backend = fused_ema.backend("cpu")
    except (ImportError, AttributeError) as error:
        pytest.skip(f"fused_ema can't be used: {error}")
    if backend != "cpu":
        pytest.skip(f"no compiled extension: backend('cpu') is {backend!r}")
    threads = torch.get_num_threads()
    yield fused_ema
    torch.set_num_threads(threads)


def torch_pairs(rng, pairs):
    """Pairs of tensors in their own memory, at random offsets, some of them permuted; large enough for four threads."""
    ema, model = [], []
    for types in pairs:
        for n in (1, 130, 40_000):
            sides = []
            for type_ in types:
                offset = int(rng.integers(0, 16 // SIZE[type_]))
                bits = torch.from_numpy(noise(rng, type_, n + offset).view(f"i{SIZE[type_]}"))
                sides.append((bits.view(TORCH[type_]) if type_ in TORCH else bits)[offset:])
            if n == 40_000 and rng.random() < 0.5:
                sides[int(rng.integers(0, 2))] = sides[0].reshape(200, 200).T.contiguous().T.to(sides[0].dtype)
                sides = [side.reshape(200, 200) if side.dim() == 1 else side for side in sides]
            ema.append(sides[0])
            model.append(sides[1])
    return ema, model


@pytest.mark.filterwarnings("ignore")  # 16-bit averages at a high decay
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("call", ["update", "copy_", "swap_"])
def test_same_bits_as_the_cpu_runner(grid, cpu_runner, call, threads):
    rng = np.random.default_rng(17 + threads)
    pairs = {
        "update": LERP_PAIRS + RAW_PAIRS,
        "copy_": CAST_PAIRS + RAW_PAIRS,
        "swap_": [(t, t) for t in TYPES],
    }[call]
    ema, model = torch_pairs(rng, pairs)
    names = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
    for decay in DECAYS if call == "update" else [0.0]:
        own = [
            (e.clone(memory_format=torch.preserve_format), m.clone(memory_format=torch.preserve_format))
            for e, m in zip(ema, model, strict=True)
        ]
        tensors = []
        for e, m in own:
            types = tuple(names.get(x.dtype, f"raw{x.element_size()}") for x in (e, m))
            average = e.is_floating_point()
            if call == "swap_":
                types = (f"raw{e.element_size()}",) * 2
            tensors.append(
                (
                    e.data_ptr(),
                    m.data_ptr(),
                    types,
                    average,
                    list(e.shape),
                    list(e.stride()),
                    list(m.stride()),
                )
            )
        grid.tables(tensors).run({"update": UPDATE, "copy_": COPY, "swap_": SWAP}[call], decay)

        torch.set_num_threads(threads)
        order = rng.permutation(len(ema))
        arguments = [ema[i] for i in order], [model[i] for i in order]
        getattr(cpu_runner, call)(*arguments, *([decay] if call == "update" else []))
        for mine, theirs in zip(own, zip(ema, model, strict=True), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                type_ = names.get(a.dtype, f"raw{a.element_size()}")
                integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
                bits = [x.contiguous().view(integer).numpy().view(BITS[a.element_size()]) for x in (a, b)]
                assert same_bits(*bits, type_).all(), (a.dtype, a.shape)
