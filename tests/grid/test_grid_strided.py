"""Strided tensors on the emulated grid: which dimensions merge, and where each element lies."""

import math

import numpy as np
import pytest
import torch
from emulated_grid import CAST_PAIRS, LERP_PAIRS, RAW_PAIRS, Pair, build
from grid_checks import launch, place


def random_strides(rng, sizes):
    """The strides of a permuted tensor with random gaps."""
    strides, span = [0] * len(sizes), 1
    for d in rng.permutation(len(sizes)):
        strides[d] = span
        span *= sizes[d]
        if rng.random() < 0.4:
            span += int(rng.integers(1, 4))
    return strides


def launch_strided(grid, rng, dtypes, sizes, strides, op="update"):
    span = 1 + max(sum((n - 1) * s for n, s in zip(sizes, side, strict=True)) for side in strides)
    memory, [(ema, model, *_)] = place(rng, [(dtypes, span, rng.integers(0, 4, 2), True)])
    views = [t.as_strided(sizes, side, t.storage_offset()) for t, side in zip((ema, model), strides, strict=True)]
    return launch(grid, memory, [Pair(*views)], op)


def test_random_strides(grid):
    rng = np.random.default_rng(1)
    kinds = [("update", pair) for pair in LERP_PAIRS] + [("copy", pair) for pair in CAST_PAIRS + RAW_PAIRS]
    kinds += [("swap", pair) for pair in RAW_PAIRS]
    for trial in range(150):
        op, dtypes = kinds[trial % len(kinds)]
        sizes = rng.integers(1, 9, rng.integers(1, 6)).tolist()
        ema, model = random_strides(rng, sizes), random_strides(rng, sizes)
        if op != "swap" and rng.random() < 0.3:  # an expanded model
            model = [0 if rng.random() < 0.5 else s for s in model]
        launch_strided((grid, build("small"))[trial % 2], rng, dtypes, sizes, (ema, model), op)


IMAGE = [2, 3, 5, 7]
FIRST, LAST, GAP = [105, 35, 7, 1], [105, 1, 21, 3], [120, 40, 8, 1]  # channels first, channels last, 7 of each 8


@pytest.mark.parametrize(
    ("sizes", "ema", "model", "dims"),
    [
        (IMAGE, FIRST, FIRST, -1),  # -1: flat
        (IMAGE, LAST, LAST, -1),
        (IMAGE, FIRST, LAST, 3),  # N, C, H x W
        (IMAGE, LAST, FIRST, 3),
        (IMAGE, GAP, GAP, 2),  # N x C x H, W
        (IMAGE, FIRST, GAP, 2),
        (IMAGE, FIRST, [0, 0, 0, 0], 1),  # a scalar expanded
        ([1, 6, 1, 4], [999, 4, 7, 1], [5, 4, 0, 1], -1),  # strides of dimensions of size 1 do not matter
        ([4, 3], [1, 4], [1, 4], -1),  # both transposed
        ([3, 4], [8, 2], [8, 2], 1),  # every other element
        ([], [], [], -1),
    ],
)
def test_dimensions_that_merge(grid, sizes, ema, model, dims):
    rng = np.random.default_rng(2)
    tables = launch_strided(grid, rng, (torch.float32, torch.bfloat16), sizes, (ema, model))
    assert tables.dims(0) == dims


def test_too_many_dimensions_are_refused_and_leave_the_tables(grid):
    thirteen, twelve = torch.empty([2] * 13), torch.empty([2] * 12)
    pairs = [(torch.empty(5), torch.empty(5))]
    pairs += [(t, t.permute(*reversed(range(t.dim())))) for t in (thirteen, twelve)]
    tables = grid.tables([Pair(*pair) for pair in pairs])
    assert tables.added == [True, False, True]
    assert tables.counts() == (2, 1, 1 + 2**12 // grid.tile(torch.float32), 5 + 2**12)
    assert tables.dims(1) == 12


@pytest.mark.parametrize(
    ("sizes", "ema", "model"),
    [
        ([2**20, 2**20], [2**20, 1], [1, 2**20]),
        ([2**16, 3, 2**21], [2**24, 2**22, 1], [2**21, 2**40, 1]),
        ([5, 2**33, 7], [7 * 2**33, 7, 1], [0, 1, 2**34]),
    ],
)
def test_offsets_beyond_32_bits(grid, sizes, ema, model):
    """Elements are numbered along the average's memory."""
    numel = math.prod(sizes)
    pair = Pair(*(torch.empty_strided(sizes, strides, device="meta") for strides in (ema, model)))
    tables = grid.tables([pair], with_tiles=False)
    assert tables.counts()[::3] == (1, numel)
    some = np.random.default_rng(3).integers(0, numel, 200).tolist()
    for i in [0, 1, 2**31 - 1, 2**31, 2**32 + 5, numel - 1, *some]:
        rest, at = i, [0, 0]
        for d in sorted(range(len(sizes)), key=lambda d: ema[d]):
            rest, index = divmod(rest, sizes[d])
            at = [at[0] + index * ema[d], at[1] + index * model[d]]
        assert tables.offsets(0, i) == tuple(at)
