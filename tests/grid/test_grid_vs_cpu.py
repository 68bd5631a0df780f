"""The emulated grid and the CPU runner, which run one plan, give the same bits."""

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, RAW_PAIRS, TYPES, UPDATE_PAIRS, Pair
from grid_checks import noise

import fused_ema

CALLS = {  # of fused_ema: the kernel's name, pairs of types, decays
    "update": ("update", UPDATE_PAIRS + RAW_PAIRS, [0.999, 0.25]),
    "copy_": ("copy", CAST_PAIRS + RAW_PAIRS, [0.0]),
    "swap_": ("swap", [(dtype, dtype) for dtype in TYPES], [0.0]),
}


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request):
    if fused_ema.backend("cpu") != "cpu":
        pytest.skip("no compiled extension")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random_pairs(rng, types):
    """Pairs at random offsets, some of them permuted, large enough for four threads."""
    for dtypes in types:
        for n in (1, 130, 40_000):
            offsets = rng.integers(0, [16 // dtype.itemsize for dtype in dtypes])
            sides = [noise(dtype, n + at, rng)[at:] for dtype, at in zip(dtypes, offsets, strict=True)]
            if n == 40_000 and rng.random() < 0.5:
                sides = [side.view(200, 200) for side in sides]
                side = rng.integers(0, 2)
                sides[side] = sides[side].T
            yield Pair(*sides, dtypes in UPDATE_PAIRS)


@pytest.mark.filterwarnings("ignore")  # 16-bit averages at a high decay
@pytest.mark.parametrize("call", CALLS)
def test_same_bits(grid, call, threads):
    op, types, decays = CALLS[call]
    rng = np.random.default_rng(1)
    pairs = list(random_pairs(rng, types))
    for decay in decays:
        own = [Pair(ema.clone(), model.clone(), average) for ema, model, average, *_ in pairs]
        grid.tables(own).run(op, decay)
        theirs = [pairs[i] for i in rng.permutation(len(pairs))]
        arguments = [pair.ema for pair in theirs], [pair.model for pair in theirs]
        getattr(fused_ema, call)(*arguments, *([decay] if call == "update" else []))
        for mine, pair in zip(own, pairs, strict=True):
            for a, b in ((mine.ema, pair.ema), (mine.model, pair.model)):
                assert oracle.same_bits_but_nan(a, b), (mine.ema.dtype, mine.model.dtype, a.shape)
