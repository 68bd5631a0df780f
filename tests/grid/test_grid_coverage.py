"""The emulated grid over sizes, alignments and types: each element is written once, nothing else is, and whole tiles
go by vectors."""

import ctypes
import mmap
import shutil

import numpy as np
import pytest
import torch
from emulated_grid import CAST_PAIRS, LERP_PAIRS, RAW_PAIRS, STOCHASTIC_PAIRS, Grid, Pair, build
from grid_checks import launch, noise, place

DECAYS = [0.999, 0.25]  # both branches of the contract: 1 - decay below one half, and not
CALLS = [("update", decay, pair) for decay in DECAYS for pair in LERP_PAIRS]
CALLS += [("update_finite", decay, pair) for decay in [0.999] for pair in LERP_PAIRS]
CALLS += [("copy", 0.0, pair) for pair in CAST_PAIRS + RAW_PAIRS] + [("swap", 0.0, pair) for pair in RAW_PAIRS]
sizes_of_tiles = pytest.mark.parametrize("grid", ["default", "small"], indirect=True)


def name(value):
    return "-".join(str(t).removeprefix("torch.") for t in value) if isinstance(value, tuple) else None


def test_every_pair_of_types_is_tested(grid):
    names = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}

    def parse(text):
        return {tuple(names[side] for side in pair.split("<-")) for pair in text.decode().split()}

    assert parse(grid.library.grid_lerp_pairs()) == set(LERP_PAIRS)
    assert parse(grid.library.grid_narrow_pairs()) == set(STOCHASTIC_PAIRS)
    assert parse(grid.library.grid_cast_pairs()) == set(CAST_PAIRS)


def vector_stores(grid, op, pairs):
    """How many 16-byte stores the averages must get, for each whole tile whose sides are aligned. And how many more
    they may get: averages narrower than the model need not go by vectors."""
    totals = [0, 0]
    for ema, model, average, *_ in pairs:
        tile, lanes = grid.tile(ema.dtype), 16 // ema.itemsize
        before = ema.data_ptr() % 16 // ema.itemsize
        if (model.data_ptr() - before * model.itemsize) % min(16, lanes * model.itemsize) == 0:
            end = len(ema) + before
            count = (end // tile - (before > 0 and end >= tile)) * tile // lanes
            totals[op.startswith("update") and average and model.itemsize > ema.itemsize] += count
    return [total * (2 if op == "swap" else 1) for total in totals]


def launch_flat(grid, memory, pairs, op, decay, device_decay=None):
    launch(grid, memory, pairs, op, decay, device_decay)
    if (device_decay.item() if device_decay is not None else decay) in (0, 1):
        pairs = [pair._replace(average=False) for pair in pairs]
    surely, perhaps = vector_stores(grid, op, pairs) if device_decay != 1 else (0, 0)
    assert (grid.stores()[1] == 16).sum() in (surely, surely + perhaps)
    return surely + perhaps


@sizes_of_tiles
@pytest.mark.parametrize(("op", "decay", "dtypes"), CALLS, ids=name)
def test_sizes_and_alignments(grid, op, decay, dtypes):
    """Each size at five pairs of offsets: none, two equal ones (the sides are aligned to each other), two random."""
    rng, tile = np.random.default_rng(1), grid.tile(dtypes[0])
    lanes = [16 // dtype.itemsize for dtype in dtypes]
    rows = []
    for n in [0, 1, 3, 15, 17, tile - 1, tile, tile + 1, 3 * tile + 5]:
        equal = rng.integers(1, lanes[0], 2, endpoint=True)
        free = rng.integers(0, lanes, (2, 2), endpoint=True)
        rows += [(dtypes, n, offsets, True) for offsets in [(0, 0), *zip(equal, equal, strict=True), *free]]
    assert launch_flat(grid, *place(rng, rows), op, decay) > 0


def place_mixed(rng, sizes, per_pair=2):
    """Tensors of every kind in one block of memory, in any order: averages, casts that an update copies, raw bytes."""
    kinds = [(pair, True) for pair in LERP_PAIRS] + [(pair, False) for pair in CAST_PAIRS + RAW_PAIRS]
    rows = []
    for dtypes, average in kinds * per_pair:
        offsets = [rng.integers(0, 16 // dtype.itemsize, endpoint=True) for dtype in dtypes]
        rows.append((dtypes, rng.choice(sizes), offsets, average))
    memory, pairs = place(rng, rows)
    return memory, [pairs[i] for i in rng.permutation(len(pairs))]


@sizes_of_tiles
@pytest.mark.parametrize("decay", [0.999, 0.0])
def test_one_launch_of_every_type(grid, decay):
    rng, tile = np.random.default_rng(2), grid.tile(torch.float32)
    assert launch_flat(grid, *place_mixed(rng, [0, 1, 100, tile, 2 * tile + 3]), "update", decay) > 0


@pytest.mark.parametrize("decay", [0.9999, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_on_the_device(grid, dtype, decay):
    memory, pairs = place_mixed(np.random.default_rng(3), [10, 5000], per_pair=1)
    device_decay = torch.tensor([decay], dtype=dtype)
    launch_flat(grid, memory, pairs, "update", 0.5, device_decay=device_decay)


def test_neither_tile_size_nor_order_changes_bits(grid):
    memory, pairs = place_mixed(np.random.default_rng(4), [1000, 5000, 17000], per_pair=1)
    start, results = memory.clone(), []
    for each, seed in [(grid, 1), (build("small"), 1), (grid, 2)]:
        memory.copy_(start)
        each.tables(pairs).run("update", 0.9, seed=seed)
        results.append(memory.clone())
        pairs.reverse()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty_tensors_add_nothing(grid):
    tables = grid.tables([Pair(torch.empty(sizes), torch.empty(sizes)) for sizes in ([0], [3, 0, 2], [0, 0])])
    assert all(tables.added)
    assert tables.counts() == (0, 0, 0, 0)
    tables.run("update", 0.9)
    assert len(grid.stores()[0]) == 0


PAGE = mmap.PAGESIZE


def at_an_edge(rng, dtype, n):
    """A tensor that starts or ends where its pages do; the pages next to them are out of reach."""
    length = -(-n * dtype.itemsize // PAGE) * PAGE
    area = torch.frombuffer(mmap.mmap(-1, length + 2 * PAGE), dtype=torch.uint8)
    for edge in (0, PAGE + length):
        address, size = ctypes.c_void_p(area.data_ptr() + edge), ctypes.c_size_t(PAGE)
        assert ctypes.CDLL(None).mprotect(address, size, 0) == 0
    room = area[PAGE : PAGE + length].view(dtype)
    tensor = room[:n] if rng.random() < 0.5 else room[len(room) - n :]
    return tensor.copy_(noise(dtype, n, rng))


def test_reads_stay_inside_the_tensors(grid):
    """Writing one byte too far would crash."""
    rng = np.random.default_rng(5)
    for dtypes in [*LERP_PAIRS, (torch.uint8, torch.uint8)]:
        for n in (1, 17, 100, grid.tile(dtypes[0]), grid.tile(dtypes[0]) + 1):
            pair = Pair(*(at_an_edge(rng, dtype, n) for dtype in dtypes), dtypes in LERP_PAIRS)
            grid.tables([pair]).run("update", 0.9)
            assert len(grid.stores()[0]) > 0


def test_the_sanitizer_reports(grid, tmp_path, capfd):
    """The sanitizer must report a model that is half an element off; else its silence would mean nothing."""
    if not grid.sanitized:
        pytest.skip("g++ can't link the undefined behaviour sanitizer here; stores were still checked for alignment")
    copy = Grid(shutil.copy(grid.path, tmp_path / "copy.so"))  # it reports each place once per library
    model = torch.zeros(18, dtype=torch.uint8)
    off = torch.frombuffer(model.numpy(), dtype=torch.bfloat16, count=8, offset=1)
    copy.tables([Pair(torch.zeros(8), off)]).run("update", 0.9)
    assert "misaligned address" in capfd.readouterr().err
