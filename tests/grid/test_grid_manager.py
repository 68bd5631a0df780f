"""A manager's launches on the emulated grid: several averages in one pass, and averages narrower than the model."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, LERP_PAIRS, RAW_PAIRS, STOCHASTIC_PAIRS, build
from grid_checks import in_copy, launch, place
from test_grid_strided import random_strides

# For up to 8 averages: both branches of the contract, one decay that copies, and one that writes nothing.
DECAYS = [0.999, 0.25, 0.0, 1.0, 0.9999, 0.5, 0.75, 1 - 2.0**-30]
KEYS = [0x0123456789ABCDEF, 1, 2**64 - 1, 5 << 32, 0xDEADBEEF, 0, 2**63, 77]
OPS = ["update", "update_stochastic"]
FINITE = ["update_finite", "update_stochastic_finite"]
sizes_of_tiles = pytest.mark.parametrize("grid", ["default", "small"], indirect=True)
ALL = [(pair, True) for pair in LERP_PAIRS] + [(pair, False) for pair in CAST_PAIRS + RAW_PAIRS]


def place_all(rng, grid, averages, kinds=ALL, number=0):
    """A tensor of each kind, of up to two tiles and a bit, at any alignment."""
    rows = []
    for dtypes, average in kinds:
        tile = grid.tile(dtypes[0])
        offsets = rng.integers(0, [16 // dtype.itemsize for dtype in dtypes])
        if rng.random() < 0.5:  # aligned to each other
            offsets[:] = rng.integers(0, 16 // max(dtype.itemsize for dtype in dtypes), endpoint=True)
        rows.append((dtypes, rng.choice([0, 1, 100, tile, tile + 17, 2 * tile + 3]), offsets, average))
    return place(rng, [rows[i] for i in rng.permutation(len(rows))], averages, number)


@sizes_of_tiles
@pytest.mark.parametrize(
    ("op", "averages"), [*itertools.product(OPS, [1, 2, 3, 8]), *itertools.product(FINITE, [1, 8])]
)
def test_several_averages(grid, averages, op):
    """Each average follows the formula with its own decay and key; each element is written once, and nothing else."""
    rng = np.random.default_rng(1)
    order = rng.permutation(8)[:averages]
    memory, pairs = place_all(rng, grid, averages)
    launch(grid, memory, pairs, op, [DECAYS[i] for i in order], keys=[KEYS[i] for i in order])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("averages", [2, 3, 8])
def test_one_launch_has_the_bits_of_several(grid, averages, op):
    rng = np.random.default_rng(2)
    memory, pairs = place_all(rng, grid, averages)
    other, others = in_copy(memory, pairs)
    grid.tables(pairs).run(op, DECAYS[:averages], keys=KEYS[:averages])
    for k in range(averages):
        single = [pair._replace(ema=pair.nth(k), stride=0) for pair in others]
        grid.tables(single).run(op, DECAYS[k], keys=KEYS[k : k + 1], seed=k)
    assert torch.equal(memory, other)


@pytest.mark.parametrize("op", [*OPS, "copy"])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (3, 1), (1, 2), (0, 3), (2, 2)])
def test_some_of_four_averages(grid, first, count, op):
    """The other averages keep every byte."""
    rng = np.random.default_rng(3)
    memory, pairs = place_all(rng, grid, 4)
    decays = [0.0] * count if op == "copy" else [0.25, 0.999][:count] + [0.75] * (count - 2)
    launch(grid, memory, pairs, op, decays, first=first, keys=KEYS[:count])


@pytest.mark.parametrize("op", [*OPS, *FINITE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decays_on_the_device(grid, dtype, op):
    """The device has one for each average, counted from the first; the call's own decays are ignored."""
    rng = np.random.default_rng(4)
    on_device = torch.tensor(DECAYS[:6], dtype=dtype)
    memory, pairs = place_all(rng, grid, 6)
    launch(grid, memory, pairs, op, [0.5] * 6, on_device, keys=KEYS[:6])
    launch(grid, memory, pairs, op, [1.0] * 2, on_device, first=3, keys=KEYS[:2])


@sizes_of_tiles
@pytest.mark.parametrize("pair", STOCHASTIC_PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_stochastic_sizes_and_alignments(grid, pair):
    """Whole tiles, heads and tails number their elements in the same way, at each alignment."""
    rng, tile = np.random.default_rng(5), grid.tile(pair[0])
    rows = []
    for n in (1, 7, tile, tile + 1, 2 * tile + 9):
        shift = rng.integers(1, 8)
        offsets = [(0, 0), (shift, shift), *rng.integers(0, [8, 16 // pair[1].itemsize], (2, 2))]
        rows += [(pair, n, each, True) for each in offsets]
    for number in (0, 2**32 - tile, 2**40 + 5):  # over the edge of 32 bits, and far behind it
        memory, pairs = place(rng, rows, number=number)
        start = memory.clone()
        for op in ("update_stochastic", "update_stochastic_finite"):
            memory.copy_(start)
            launch(grid, memory, pairs, op, 0.99, keys=KEYS[:1])


def place_strided(rng, kinds, averages, expand=True):
    """Images with channels last, or tensors of up to 5 dimensions that are permuted and have gaps, each side in its own
    way; some models are expanded."""
    found = []
    for dtypes, average in kinds:
        sizes = rng.integers(1, 7, rng.integers(1, 6)).tolist()
        strides = [random_strides(rng, sizes) for _ in range(2)]
        if rng.random() < 0.3:
            sizes = rng.integers(2, 7, 4).tolist()
            _, c, h, w = sizes
            strides = [[c * h * w, 1, w * c, c]] * 2
        elif expand and rng.random() < 0.3:
            strides[1] = [0 if rng.random() < 0.5 else s for s in strides[1]]
        span = 1 + max(sum((n - 1) * s for n, s in zip(sizes, side, strict=True)) for side in strides)
        found.append((dtypes, span, rng.integers(0, 4, 2), average, sizes, strides))
    memory, pairs = place(rng, [row[:4] for row in found], averages)
    views = []
    number = 0
    for pair, (*_, sizes, strides) in zip(pairs, found, strict=True):
        sides = [t.as_strided(sizes, s, t.storage_offset()) for t, s in zip(pair[:2], strides, strict=True)]
        views.append(pair._replace(ema=sides[0], model=sides[1], number=number))
        number += 2 * sides[0].numel()
    return memory, views


@pytest.mark.parametrize("op", [*OPS, FINITE[1]])
def test_strided(grid, op):
    rng = np.random.default_rng(6)
    for trial in range(12):
        memory, pairs = place_strided(rng, ALL, 3)
        order = rng.permutation(8)[:3]
        each = (grid, build("small"))[trial % 2]
        launch(each, memory, pairs, op, [DECAYS[i] for i in order], keys=[KEYS[i] for i in order])


def test_the_bits_depend_on_seed_and_element_alone(grid):
    """They do not depend on tile size, the order of tensors in the launch, alignment, or the model's strides."""
    rng = np.random.default_rng(7)
    results = []
    for each, offsets, transposed in [
        (grid, (0, 0), 0),
        (build("small"), (0, 0), 0),
        (grid, (3, 1), 0),
        (grid, (1, 0), 1),
    ]:
        _, pairs = place(rng, [(dtypes, 91 * 90, offsets, True) for dtypes in STOCHASTIC_PAIRS])
        values = np.random.default_rng(8)
        for i, pair in enumerate(pairs):
            pair.ema.copy_(oracle.values(pair.ema.dtype, 91 * 90, values))
            pair.model.copy_(oracle.values(pair.model.dtype, 91 * 90, values, 10))
            if transposed:
                storage = pair.model.clone()
                model = pair.model.view(90, 91).T
                model.copy_(storage.view(91, 90))
                pairs[i] = pair._replace(ema=pair.ema.view(91, 90), model=model)
        shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
        each.tables(shuffled).run("update_stochastic", 0.9, keys=[5], seed=len(results))
        results.append([pair.ema.reshape(-1) for pair in pairs])
    for other in results[1:]:
        assert all(map(oracle.same_bits, results[0], other))


def test_keys_and_numbers_matter(grid):
    """Elements of equal values get other bits if the key, the number or the average differs."""
    n = 4096
    _, [pair] = place(np.random.default_rng(9), [((torch.bfloat16, torch.float32), n, (0, 0), True)], averages=2)
    seen = []
    for key, number in [(1, 0), (2, 0), (1 << 32, 0), (1, 2 * n), (1, 1 << 32)]:
        for k in (0, 1):
            pair.nth(k).fill_(1.0)
        pair.model.fill_(2.0)
        grid.tables([pair._replace(number=number)]).run("update_stochastic", [0.999, 0.999], keys=[key, key + 1])
        for k in (0, 1):
            moved = pair.nth(k) != 1
            assert 0.10 < moved.float().mean() < 0.16  # 0.001 of a way of 1 in units of 2**-7: 0.128
            if (key, number, k) != (2, 0, 0):  # which has the key of (1, 0, 1)
                seen.append(moved)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert 0.15 < (one != other).float().mean() < 0.30  # independent: 2 * 0.128 * 0.872 = 0.22
