"""The emulated grid and the CPU runner, which run one plan, give a manager the same bits."""

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, TYPES, Pair
from grid_checks import in_copy, place
from test_grid_manager import ALL, DECAYS, FINITE, KEYS, OPS, place_strided

from fused_ema.pairs.checks import Action
from fused_ema.runners import extension as _native


@pytest.fixture(params=[1, 2])
def threads(request):
    if _native.load() is None:
        pytest.skip(f"no native extension: {_native.why_not()}")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def run_on_cpu(pairs, averages, op, decays, device_decay=None, keys=(), average=-1, scratch=()):
    """Runs a plan as a manager does, and returns it."""
    extension = _native.load()
    ema, model = [pair.ema for pair in pairs], [pair.model for pair in pairs]
    actions = [Action.NONE if len(p.ema) == 0 else Action.AVERAGE if p.average else Action.COPY for p in pairs]
    names, strides = [f"[{i}]" for i in range(len(pairs))], [pair.stride for pair in pairs]
    watch = extension.CompiledWatch([], [ema, model])
    plan = extension.PreparedPairs(names, ema, model, actions, watch, averages, strides)
    assert plan.run(extension.Op.__members__[op], decays, device_decay, keys, average, scratch)
    return plan


def place_large(rng, kinds, averages):
    """Flat ones at any alignment, over several pieces of the CPU's loops and enough for two threads, and permuted ones;
    then small ones of any strides."""
    rows = []
    for dtypes, average in kinds:
        for n in (1, 129, 20_000):
            rows.append((dtypes, n, rng.integers(0, [16 // dtype.itemsize for dtype in dtypes]), average))
    memory, pairs = place(rng, rows, averages)
    for i, pair in enumerate(pairs):
        if pair.ema.numel() == 20_000 and rng.random() < 0.3:
            views = [pair.ema.view(100, 200), pair.model.view(200, 100).T]
            pairs[i] = pair._replace(ema=views[0], model=views[1])
    strided, more = place_strided(rng, kinds, averages, expand=False)
    return (memory, pairs), (strided, more)


def assert_same(pairs, memory, others, other, averages):
    """Compares all bytes except the signs and payloads of NaN."""
    for one, two in zip(pairs, others, strict=True):
        views = [
            *zip(map(one.nth, range(averages)), map(two.nth, range(averages)), strict=True),
            (one.model, two.model),
        ]
        for a, b in views:
            assert oracle.same_bits_but_nan(a, b), (one.ema.dtype, one.model.dtype, one.ema.shape)
            if a.is_floating_point() and 0 not in a.stride():
                for side in (a, b):
                    side[side.isnan()] = 0
    assert torch.equal(memory, other), "bytes between the tensors differ"


@pytest.mark.parametrize("op", [*OPS, FINITE[1], "copy"])
@pytest.mark.parametrize("averages", [1, 3])
def test_updates(grid, threads, averages, op):
    rng = np.random.default_rng(1)
    keys = KEYS[:averages] if "stochastic" in op else []
    for memory, pairs in place_large(rng, ALL, averages):
        other, others = in_copy(memory, pairs)
        for decays in (DECAYS[:averages], [0.75, 1.0, 0.999][-averages:]):
            grid.tables(pairs).run(op, decays, keys=keys)
            run_on_cpu(others, averages, op, decays, keys=keys)
            assert_same(pairs, memory, others, other, averages)


@pytest.mark.parametrize("op", [*OPS, FINITE[0]])
def test_device_decays_and_one_of_several(grid, threads, op):
    rng = np.random.default_rng(2)
    [(memory, pairs), _] = place_large(rng, ALL, 4)
    other, others = in_copy(memory, pairs)
    on_device = torch.tensor([0.9999, 1.0, 0.0, 0.25], dtype=torch.float64)
    grid.tables(pairs).run(op, [0.5] * 4, on_device, keys=KEYS[:4])
    run_on_cpu(others, 4, op, [0.5] * 4, on_device, KEYS[:4])
    assert_same(pairs, memory, others, other, 4)
    grid.tables(pairs).run(op, [0.9], first=2, keys=KEYS[5:6])
    run_on_cpu(others, 4, op, [0.9], None, KEYS[5:6], 2)
    assert_same(pairs, memory, others, other, 4)


@pytest.mark.parametrize(("averages", "index"), [(1, 0), (3, 1)])
def test_exchanges(grid, threads, averages, index):
    """The scratch memory is the same too, and another plan of the same tensors can restore from it."""
    rng = np.random.default_rng(3)
    kinds = [(pair, pair[0].is_floating_point) for pair in [*CAST_PAIRS, *((dtype, dtype) for dtype in TYPES)]]
    for memory, pairs in place_large(rng, kinds, averages):
        other, others = in_copy(memory, pairs)
        start = memory.clone()
        tables, (scratch, other_scratch) = grid.tables(pairs), torch.full((2, 16 << 20), 99, dtype=torch.uint8)
        assert tables.scratch_bytes() <= len(scratch)
        average = index if averages > 1 else -1

        tables.run("swap", [0.0], first=index, scratch=scratch)
        plan = run_on_cpu(others, averages, "swap", [0.0], average=average, scratch=[other_scratch])
        assert plan.exchanged()
        assert plan.scratch_bytes() == [(torch.device("cpu"), tables.scratch_bytes())]
        assert torch.equal(scratch, other_scratch)
        swapped = memory.clone(), other.clone()

        tables.run("restore", [0.0], first=index, scratch=scratch)
        plan = run_on_cpu(others, averages, "restore", [0.0], average=average, scratch=[other_scratch])
        assert not plan.exchanged()
        assert torch.equal(memory, start)
        assert torch.equal(other, start)
        memory.copy_(swapped[0])
        other.copy_(swapped[1])
        assert_same(pairs, memory, others, other, averages)


def test_scratch_memory_is_checked(threads):
    """An exchange with too little of it is refused, and nothing is written."""
    pairs = [Pair(torch.ones(5), torch.zeros(5, dtype=torch.bfloat16))]
    for scratch in ([], [torch.empty(9, dtype=torch.uint8)], [torch.empty(10, dtype=torch.int8)]):
        with pytest.raises(ValueError, match="scratch"):
            run_on_cpu(pairs, 1, "swap", [0.0], scratch=scratch)
        assert pairs[0].ema.eq(1).all()
        assert pairs[0].model.eq(0).all()
    run_on_cpu(pairs, 1, "swap", [0.0], scratch=[torch.empty(10, dtype=torch.uint8)])
    assert pairs[0].model.eq(1).all()
