"""Random cases: the CPU runner and the emulated CUDA grid bit for bit and by the float64 oracle's bounds, the
pure-PyTorch path by the bounds. `make test-long` has 100,000 of them."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, LERP_PAIRS, MAX_AVERAGES, RAW_PAIRS, STOCHASTIC_PAIRS, TYPES
from grid_checks import in_copy, launch, place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_grid_manager_vs_cpu import assert_same, run_on_cpu, threads  # noqa: F401

from fused_ema import reference

many = settings(
    max_examples=5 * settings.default.max_examples,  # each with one thread and with two
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
OPS = {  # the types, and whether floats are averaged
    "update": (LERP_PAIRS, RAW_PAIRS + CAST_PAIRS),
    "update_stochastic": (STOCHASTIC_PAIRS, RAW_PAIRS),
    "copy": ([], CAST_PAIRS + RAW_PAIRS),
    "swap": ([], [(dtype, dtype) for dtype in TYPES]),
}
LAYOUTS = ["flat", "flat", "both permuted", "model permuted", "average permuted", "columns", "expanded model"]
# Between 2**-150 and 2**-126 float32(decay) is coarse: docs/numerics.md.
decays = st.sampled_from([*oracle.DECAYS, math.nextafter(0.5, 0), 1e-30]) | st.floats(2.0**-126, 1)


@st.composite
def cases(draw):
    op = draw(st.sampled_from(list(OPS)))
    averaged, copied = OPS[op]
    kinds = st.sampled_from([(pair, True) for pair in averaged] + [(pair, False) for pair in copied])
    sizes = st.sampled_from([0, 1, 3, 4, 5, 15, 16, 17]) | st.sampled_from(["tile - 1", "tile", "tile + 1", "3 tiles"])
    offsets = st.tuples(st.integers(0, 15), st.integers(0, 15))
    rows = st.lists(st.tuples(kinds, sizes, offsets, st.sampled_from(LAYOUTS)), min_size=1, max_size=4)
    count = draw(st.sampled_from([1, 1, 1, 2, 3, MAX_AVERAGES])) if op != "swap" else 1
    return op, draw(rows), draw(st.lists(decays, min_size=count, max_size=count)), draw(st.integers(0, 2**32 - 1))


def arranged(pair, layout, op):
    """The pair seen through other strides, where its size allows that."""
    n = len(pair.ema)
    columns = next((divisor for divisor in (2, 3, 5, 7) if n and n % divisor == 0), 1)
    shape = (n // columns, columns)
    if layout == "flat" or n == 0:
        return pair
    if layout == "expanded model" and op != "swap":
        return pair._replace(model=pair.model[:1].expand(n))
    ema, model = pair.ema.view(shape), pair.model.view(shape)
    if layout == "columns":
        return pair._replace(ema=ema[:, :1], model=model[:, :1])
    other = (columns, n // columns)
    return pair._replace(
        ema=pair.ema.view(other).T if layout in ("both permuted", "average permuted") else ema,
        model=pair.model.view(other).T if layout in ("both permuted", "model permuted") else model,
    )


@pytest.mark.parametrize("grid", ["small"], indirect=True)
@given(cases())
@many
def test_all_runners_agree(grid, threads, case):  # noqa: F811
    op, rows, decays, seed = case
    rng = np.random.default_rng(seed)

    def elements(size, dtype):
        tile = grid.tile(dtype)
        return {"tile - 1": tile - 1, "tile": tile, "tile + 1": tile + 1, "3 tiles": 3 * tile}.get(size, size)

    placed = [(kind[0], elements(size, kind[0][0]), offsets, kind[1]) for kind, size, offsets, _ in rows]
    memory, pairs = place(rng, placed, len(decays))
    pairs = [arranged(pair, layout, op) for pair, (*_, layout) in zip(pairs, rows, strict=True)]
    numbers = [0, *itertools.accumulate(2 * pair.ema.numel() for pair in pairs)]  # of elements, for random bits
    pairs = [pair._replace(number=number) for pair, number in zip(pairs, numbers, strict=False)]
    (other, others), (_, thirds) = in_copy(memory, pairs), in_copy(memory, pairs)
    keys = [int(key) for key in rng.integers(0, 2**63, len(decays))] if op == "update_stochastic" else ()
    run_on_cpu(others, len(decays), op, decays, keys=keys)
    if op == "update":
        check_pure_pytorch(others, thirds, decays)
    launch(grid, memory, pairs, op, decays, keys=keys)
    assert_same(pairs, memory, others, other, len(decays))


def check_pure_pytorch(others, thirds, decays):
    for done, pair in zip(others, thirds, strict=True):
        for k, decay in enumerate(decays):
            ema, old = pair.nth(k), pair.nth(k).clone()
            reference.update_(ema, pair.model, decay, average=pair.average)
            if pair.average:
                finite = done.nth(k).isfinite() & old.isfinite() & pair.model.isfinite()
                oracle.check_step([old[finite]], [pair.model[finite]], [ema[finite]], decay, bitwise=False)
                if decay == 0 or np.float32(decay) > 0:  # else 0 times infinity on one side only
                    assert torch.equal(ema.isnan(), done.nth(k).isnan())
            else:
                assert oracle.same_bits_but_nan(ema, done.nth(k))
