"""The tables that Python packs are those that csrc/table.h makes, byte for byte."""

import ctypes
import random
import re
from pathlib import Path

import emulated_grid
import oracle
import pytest
import torch

from fused_ema.runners import tables

FLOATS = oracle.FLOATS
COMPLEX = [torch.complex64, torch.complex128]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float8_e5m2]
SIZES = [1, 1, 2, 3, 5, 8, 33, 128]
RAW = {1: 4, 2: 5, 4: 6, 8: 7}  # enum Type: raw1 to raw8
TYPES = {each: number for number, each in enumerate(FLOATS)} | {torch.complex64: 0, torch.complex128: 1}
CSRC = Path(emulated_grid.__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="module")
def grid():
    return emulated_grid.build().library


def strided(rng, shape, dtype):
    """A tensor whose dimensions lie in any order, with gaps, some elements past where an allocation begins."""
    order = list(range(len(shape)))
    if rng.random() < 0.5:
        rng.shuffle(order)
    gaps = [size + rng.choice([0, 0, 0, 1]) for size in shape]
    room = [gaps[d] for d in order]
    count, offset = torch.Size(room).numel(), rng.choice([0, 0, 0, 1, 2, 3, 5])
    whole = torch.empty(count + offset, dtype=dtype)[offset:].view(room)
    return whole.permute([order.index(d) for d in range(len(shape))])[tuple(slice(0, size) for size in shape)]


def random_pair(rng):
    """(average, model, whether it is averaged)"""
    shape = [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4]))]
    if rng.random() < 0.03:
        shape = [*shape, 0]
    if torch.Size(shape).numel() > 1_000_000:
        shape = shape[:2]
    kind = rng.random()
    if kind < 0.2:
        types, average = [rng.choice(OTHERS)] * 2, False
    elif kind < 0.35:
        types, average = rng.choice([(a, b) for a in COMPLEX for b in COMPLEX]), rng.random() < 0.7
    else:
        types, average = (rng.choice(FLOATS), rng.choice(FLOATS)), rng.random() < 0.7
    ema = strided(rng, shape, types[0])
    model = torch.empty_like(ema, dtype=types[1]) if rng.random() < 0.3 else strided(rng, shape, types[1])
    return ema, model, average


def with_averages(rng, ema, averages):
    """The first of several averages like `ema`, and the elements from one to the next."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(ema.shape, ema.stride(), strict=True))
    stride = -(-max(extent, 1) * ema.element_size() // 16) * 16 // ema.element_size() + 16 * rng.choice([0, 0, 1])
    first = torch.empty(averages * stride, dtype=ema.dtype).as_strided(ema.shape, ema.stride())
    return first, stride


def in_c(grid, handle, ema, model, average, stride, number):
    """Adds a pair to tables of C++, by the rules of csrc/plan.cpp; returns whether that took it."""
    reals = 2 if ema.is_complex() else 1
    if not average and ema.dtype == model.dtype:
        types = [RAW[ema.element_size() // reals]] * 2
    else:
        types = [TYPES[ema.dtype], TYPES[model.dtype]]
    last = [[2], [1], [1]] if reals == 2 else [[], [], []]
    columns = [[*ema.shape], [reals * s for s in ema.stride()], [reals * s for s in model.stride()]]
    columns = [
        (ctypes.c_int64 * (len(each) + len(more)))(*each, *more) for each, more in zip(columns, last, strict=True)
    ]
    sides = [ctypes.c_void_p(side.data_ptr()) for side in (ema, model)]
    more = ctypes.c_int64(stride * reals), ctypes.c_int64(2 * number)
    return grid.grid_add(handle, *sides, *types, int(average), len(columns[0]), *columns, *more, 1)


@pytest.fixture
def compare(grid):
    """Packs pairs (average, model, whether averaged, stride) on both sides and compares all bytes."""

    def compare(pairs, averages=1):
        ours, number = tables.Tables(), 0
        theirs = emulated_grid.Tables(grid, [], True)
        for i, (ema, model, average, stride) in enumerate(pairs):
            ours.add(f"[{i}]", ema, model, average, averages, stride, number)
            assert in_c(grid, theirs.handle, ema, model, average, stride, number)
            number += ema.numel()
        rows, layouts, tiles, elements = theirs.counts()
        packed, at = ours.rows_and_layouts()
        assert at == rows * tables.ROW.size
        assert packed[:at] == theirs.table("rows", tables.ROW.size)
        assert packed[at:] == theirs.table("layouts", tables.LAYOUT.size)
        assert ours.tiles(torch.device("cpu")).numpy().tobytes() == theirs.table("tiles", 8)
        assert (ours.tile_count(), ours.elements, ours.scratch_bytes) == (tiles, elements, theirs.scratch_bytes())
        return rows, layouts

    return compare


@pytest.mark.parametrize("seed", range(8))
def test_random_pairs(compare, seed):
    rng = random.Random(seed)
    rows, layouts = compare([(*random_pair(rng), 0) for _ in range(500)])
    assert rows > 400
    assert layouts > 100


@pytest.mark.parametrize("averages", [2, 5, 8])
def test_several_averages(compare, averages):
    rng = random.Random(averages)
    pairs = []
    for _ in range(200):
        ema, model, average = random_pair(rng)
        first, stride = with_averages(rng, ema, averages)
        pairs.append((first, model, average, stride))
    compare(pairs, averages)


def test_each_pair_of_types_at_each_alignment(compare):
    pairs = []
    for kinds in [(a, b) for a in FLOATS for b in FLOATS] + [(a, a) for a in OTHERS]:
        for at, other in [(a, b) for a in range(4) for b in range(4)]:
            ema, model = torch.empty(700, dtype=kinds[0]), torch.empty(700, dtype=kinds[1])
            pairs.append((ema[at : at + 600], model[other : other + 600], kinds[0] in FLOATS, 0))
    assert compare(pairs) == (len(pairs), 0)


@pytest.mark.parametrize("seed", range(4))
def test_rows_at_other_addresses(grid, seed):
    """Those that `moved` makes, and csrc's set_addresses(), are those of the same pair in new memory."""
    rng = random.Random(seed)
    moved = 0
    for _ in range(150):
        ema, model, average = random_pair(rng)
        if ema.numel() == 0:
            continue
        new = []
        for side in (ema, model):
            memory = torch.empty(side.untyped_storage().nbytes() + 64, dtype=torch.uint8).untyped_storage()
            at = rng.choice([0, 0, 0, 1, 2, 4])
            new.append(torch.empty(0, dtype=side.dtype).set_(memory, at, side.shape, side.stride()))
        ours, fresh = tables.Tables(), tables.Tables()
        ours.add("", ema, model, average, 1, 0, 0)
        fresh.add("", *new, average, 1, 0, 0)
        theirs = emulated_grid.Tables(grid, [], True)
        assert in_c(grid, theirs.handle, ema, model, average, 0, 0)
        grid.grid_set_addresses(theirs.handle, *(ctypes.c_void_p(side.data_ptr()) for side in new))
        before, expected = (bytes(each.rows_and_layouts()[0][: tables.ROW.size]) for each in (ours, fresh))
        same_tiles = tables.ROW.unpack(before)[11] == tables.ROW.unpack(expected)[11]
        assert theirs.table("rows", tables.ROW.size) == expected
        assert ours.moved(0, *(side.data_ptr() for side in new)) == (expected if same_tiles else None)
        moved += same_tiles
    assert moved > 40


def test_empty_0d_and_no_pairs(compare):
    assert compare([]) == (0, 0)
    pairs = [(torch.tensor(1.0), torch.tensor(2.0), True, 0), (torch.empty(3, 0), torch.empty(3, 0), True, 0)]
    pairs.append((torch.tensor(1j), torch.tensor(2j), True, 0))
    assert compare(pairs) == (2, 0)


def test_twelve_dimensions_fit_and_thirteen_are_refused(grid, compare):
    def gapped(dims):
        return torch.empty([3] * dims)[(slice(0, 2),) * dims]

    compare([(gapped(12), gapped(12), True, 0)])
    ema, model = gapped(13), gapped(13)
    assert not in_c(grid, emulated_grid.Tables(grid, [], True).handle, ema, model, True, 0, 0)
    ours = tables.Tables()
    words = "ema['w']: expected at most 12 dimensions after merging those without gaps, found more"
    with pytest.raises(RuntimeError, match=re.escape(words)):
        ours.add("['w']", ema, model, True, 1, 0, 0)
    assert (CSRC / "plan.cpp").read_text().replace('", kMaxDims,\n              "', "12").count(words[8:]) == 1
    assert ours.rows_and_layouts() == (bytearray(), 0)
    assert ours.tile_count() == ours.elements == ours.scratch_bytes == 0


REFUSED = {
    "shape": (torch.zeros(3), torch.zeros(4), 0),
    "device": (torch.zeros(3), torch.zeros(3, device="meta"), 0),
    "kind": (torch.zeros(3, dtype=torch.complex64), torch.zeros(3), 0),
    "type": (torch.zeros(3, dtype=torch.int32), torch.zeros(3), 0),
    "overlapping averages": (torch.zeros(100)[:10], torch.zeros(10), 8),
    "averages off the boundaries": (torch.zeros(100)[:10], torch.zeros(10), 13),
    "averages past the end": (torch.zeros(100)[:10], torch.zeros(10), 64),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_corrupt_memory_is_refused(reason):
    ema, model, stride = REFUSED[reason]
    ours = tables.Tables()
    with pytest.raises(RuntimeError, match=r"^ema\['w'\]: "):
        ours.add("['w']", ema, model, True, 3 if stride else 1, stride, 0)
    assert ours.rows_and_layouts() == (bytearray(), 0)


def test_the_argument_of_the_kernel(grid):
    rng = random.Random(0)
    sizes = (ctypes.c_int64 * 4)()
    grid.grid_sizes(sizes)
    assert [*sizes] == [tables.ROW.size, tables.LAYOUT.size, 8, tables.LAUNCH.size]
    for _ in range(100):
        first = rng.randrange(8)
        averages = range(first, rng.randint(first + 1, 8))
        decays, keys = [rng.random() for _ in averages], [rng.getrandbits(64) for _ in averages]
        on_device = rng.choice([None, torch.zeros(8), torch.zeros(8, dtype=torch.float64)])
        head = [rng.getrandbits(48) for _ in range(4)]
        scratch = rng.getrandbits(48)
        call = emulated_grid.Call(averages.start, averages.stop)
        call.decay[averages.start : averages.stop], call.key[averages.start : averages.stop] = decays, keys
        call.device_decay, call.scratch = emulated_grid.address_of(on_device), scratch
        call.device_decay_is_f64 = on_device is not None and on_device.dtype == torch.float64
        expected = ctypes.create_string_buffer(tables.LAUNCH.size)
        pointers = [ctypes.c_void_p(each) for each in head[:3]]
        grid.grid_launch(expected, *pointers, ctypes.c_int64(head[3]), ctypes.byref(call))
        assert tables.launch(tuple(head), averages, decays, keys, on_device, scratch) == expected.raw


def test_constants_are_those_of_the_sources():
    sources = "".join(path.read_text() for path in CSRC.glob("*.h"))
    for name, value in [("THREADS", tables.THREADS), ("UNROLL", tables.UNROLL), ("STEPS", tables.STEPS)]:
        assert re.findall(rf"#define FUSED_EMA_{name} (\d+)", sources) == [str(value)]
    for name, value in [
        ("kMaxAverages", tables.MAX_AVERAGES),
        ("kMaxDims", tables.MAX_DIMS),
        ("kVectorBytes", tables.VECTOR_BYTES),
    ]:
        assert re.findall(rf"constexpr int {name} = (\d+);", sources) == [str(value)]
