"""Random cases. The CPU runner, on one thread and on two, and the emulated CUDA grid give the same bits, within the
bounds of the float64 oracle; the pure-PyTorch path keeps the bounds. `make test-long` runs 100,000 cases."""

import math
import os
import threading

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, LERP_PAIRS, MAX_AVERAGES, STOCHASTIC_PAIRS, TYPES, Pair
from grid_checks import in_copy, launch, place
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_grid_manager_vs_cpu import assert_same, threads  # noqa: F401

from fused_ema import plan
from fused_ema.pairs.pairing import Pairs
from fused_ema.runners import extension as _native
from fused_ema.runners import reference
from fused_ema.runners.base import Call
from fused_ema.runners.watch import watch

many = settings(
    max_examples=5 * settings.default.max_examples,  # each with one thread and with two
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
LIKE = {torch.uint8: torch.int8, torch.int16: torch.uint16, torch.int32: torch.uint32, torch.int64: torch.uint64}
SAME_PAIRS = [(dtype, dtype) for dtype in TYPES]
OPS = {  # the types of those that are averaged, and of those that are not
    "update": (LERP_PAIRS, CAST_PAIRS + SAME_PAIRS),
    "update_stochastic": (STOCHASTIC_PAIRS, CAST_PAIRS + SAME_PAIRS),
    "update_finite": (LERP_PAIRS, CAST_PAIRS + SAME_PAIRS),
    "update_stochastic_finite": (STOCHASTIC_PAIRS, CAST_PAIRS + SAME_PAIRS),
    "copy": ([], CAST_PAIRS + SAME_PAIRS),
    "swap": ([], SAME_PAIRS),
}
PERMUTED = [f"{which} {how}" for which in ("both", "model", "average") for how in ("transposed", "channels_last")]
LAYOUTS = ["flat", "flat", "flat", *PERMUTED, "columns", "expanded model"]
# Between 2**-150 and 2**-126 float32(decay) is coarse, see docs/numerics.md.
decays = st.sampled_from([*oracle.DECAYS, math.nextafter(0.5, 0), 1e-30]) | st.floats(2.0**-126, 1)

GRAIN = 32  # elements


@pytest.fixture
def split(threads):  # noqa: F811
    """With two threads, each gets half of the elements, even of small tensors."""
    before = _native.load()._set_grain(GRAIN)
    yield
    _native.load()._set_grain(before)


@st.composite
def cases(draw):
    op = draw(st.sampled_from(list(OPS)))
    averaged, copied = OPS[op]
    kinds = st.sampled_from([(pair, True) for pair in averaged] + [(pair, False) for pair in copied])
    sizes = st.sampled_from([0, 1, 3, 4, 5, 15, 16, 17]) | st.sampled_from(["tile - 1", "tile", "tile + 1", "3 tiles"])
    offsets = st.tuples(st.integers(0, 15), st.integers(0, 15))
    row = st.tuples(kinds, sizes, offsets, st.sampled_from(LAYOUTS), st.booleans())
    rows = draw(st.lists(row, min_size=1, max_size=4))
    ties = draw(st.lists(st.integers(0, len(rows) - 1), max_size=2))  # rows that come again under another name
    count = draw(st.sampled_from([1, 1, 1, 2, 3, MAX_AVERAGES])) if op != "swap" else 1
    return op, rows, ties, draw(st.lists(decays, min_size=count, max_size=count)), draw(st.integers(0, 2**32 - 1))


def arranged(pair, layout, op):
    """The pair seen through other strides, if its size allows them."""
    n = len(pair.ema)
    if layout == "flat" or n == 0:
        return pair
    if layout == "expanded model" and op != "swap":
        return pair._replace(model=pair.model[:1].expand(n, *pair.model.shape[1:]))
    columns, rest = factor(n)
    if layout == "columns":
        return pair._replace(**{side: getattr(pair, side).unflatten(0, (rest, columns))[:, :1] for side in SIDES})
    which, _, how = layout.partition(" ")
    height, rest = factor(rest)
    shape, order = (columns, rest * height), (1, 0)  # as it lies in memory, and as it is seen
    if how == "channels_last":
        shape, order = (rest, height, 1, columns), (0, 3, 1, 2)
    seen = [shape[d] for d in order]

    def view(side, tensor):
        if which not in ("both", side):
            return tensor.unflatten(0, seen)
        return tensor.unflatten(0, shape).permute(*order, *range(len(order), len(order) + tensor.ndim - 1))

    return pair._replace(ema=view("average", pair.ema), model=view("model", pair.model))


SIDES = ("ema", "model")


def factor(n):
    """The smallest prime factor of n, and n divided by it."""
    first = next((divisor for divisor in (2, 3, 5, 7) if n % divisor == 0), 1)
    return first, n // first


def placed(rng, grid, op, rows, averages):
    """The memory, the pairs in it, and which of them are complex; those have a last dimension of 2."""
    given, complex_ = [], []
    for (dtypes, average), size, offsets, _, as_complex in rows:
        tile = grid.tile(dtypes[0])
        n = {"tile - 1": tile - 1, "tile": tile, "tile + 1": tile + 1, "3 tiles": 3 * tile}.get(size, size)
        complex_.append(as_complex and COMPLEX.keys() >= {*dtypes})
        parts = 1 + complex_[-1]
        given.append((dtypes, parts * n, [parts * offset for offset in offsets], average))
    memory, flat = place(rng, given, averages)
    pairs, number = [], 0
    for pair, two, (_, _, _, layout, _) in zip(flat, complex_, rows, strict=True):
        if two:
            pair = pair._replace(ema=pair.ema.unflatten(0, (-1, 2)), model=pair.model.unflatten(0, (-1, 2)))
        pair = arranged(pair, layout, op)
        pairs.append(pair._replace(number=number))
        number += (2 - two) * pair.ema.numel()  # a real element takes two numbers, as a complex one
    return memory, pairs, complex_


def run_on_cpu(pairs, complex_, ties, op, decays, keys):
    """Runs a plan as a manager does, after all checks."""
    sides, strides = [], []
    for i, (pair, two) in enumerate(zip(pairs, complex_, strict=True)):
        like = LIKE.get(pair.ema.dtype, pair.ema.dtype) if i % 2 else pair.ema.dtype  # another of the same size
        kinds = (like, like if like != pair.ema.dtype else pair.model.dtype)
        views = [side.view(kind) for side, kind in zip(pair[:2], kinds, strict=True)]
        sides.append([torch.view_as_complex(side) if two else side for side in views])
        strides.append(pair.stride // (1 + two))
    order = [*range(len(pairs)), *ties]
    ema, model = ([sides[i][side] for i in order] for side in (0, 1))
    checked = Pairs([f"[{i}]" for i in range(len(order))], ema, model, [pairs[i].average for i in order])
    ours = plan.Plan(
        checked,
        watch(ema, model),
        averages=len(decays),
        strides=[strides[i] for i in order],
        free_types=True,
    )
    assert ours.try_run(Call(op, tuple(decays), keys=keys))


@pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits stand still")
@pytest.mark.parametrize("grid", ["small"], indirect=True)
@given(cases())
@many
def test_all_runners_agree(grid, split, case):
    op, rows, ties, decays, seed = case
    rng = np.random.default_rng(seed)
    memory, pairs, complex_ = placed(rng, grid, op, rows, len(decays))
    (other, others), (_, thirds) = in_copy(memory, pairs), in_copy(memory, pairs)
    keys = tuple(int(key) for key in rng.integers(0, 2**63, len(decays))) if "stochastic" in op else ()
    run_on_cpu(others, complex_, ties, op, decays, keys)
    if "stochastic" not in op:
        check_pure_pytorch(op, others, thirds, decays)
    launch(grid, memory, pairs, op, decays, keys=keys)
    assert_same(pairs, memory, others, other, len(decays))


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_small_tensors_are_split(split):
    """A thread of Python's gets its own thread to share with, when it first does."""
    started = []

    def work():
        torch.set_num_threads(2)
        for n in (GRAIN, GRAIN + 1):
            before = len(os.listdir("/proc/self/task"))
            run_on_cpu([Pair(torch.ones(n), torch.zeros(n))], [False], [], "update", [0.5], ())
            started.append(len(os.listdir("/proc/self/task")) - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert started == [0, 1]


def check_pure_pytorch(op, others, thirds, decays):
    for done, pair in zip(others, thirds, strict=True):
        for k, decay in enumerate(decays):
            ema, old = pair.nth(k), pair.nth(k).clone()
            if not op.startswith("update"):
                ema.copy_(pair.model)
                if op == "swap":
                    pair.model.copy_(old)
                assert oracle.same_bits_but_nan(ema, done.nth(k))
                assert oracle.same_bits_but_nan(pair.model, done.model)
                continue
            skips = op == "update_finite"
            reference.update_(ema, pair.model, decay, average=pair.average, finite=skips)
            if pair.average and skips:
                kept = ~pair.model.isfinite()
                assert oracle.same_bits_but_nan(ema[kept], old[kept])
            if pair.average:
                finite = done.nth(k).isfinite() & old.isfinite() & pair.model.isfinite()
                oracle.check_step([old[finite]], [pair.model[finite]], [ema[finite]], decay, bitwise=False)
                if decay == 0 or np.float32(decay) > 0:  # else 0 times infinity on one side only
                    assert torch.equal(ema.isnan(), done.nth(k).isnan())
                    special = ~(old.isfinite() & pair.model.isfinite())
                    assert oracle.same_bits_but_nan(ema[special], done.nth(k)[special])
            else:
                assert oracle.same_bits_but_nan(ema, done.nth(k))
