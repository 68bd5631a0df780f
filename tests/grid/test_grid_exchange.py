"""Exchanges on the emulated grid; between two types, the model's values go to scratch memory and come back."""

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import CAST_PAIRS, RAW_PAIRS, build
from grid_checks import element_numbers, in_copy, mark, place, writes_per_byte
from test_grid_manager import place_strided

sizes_of_tiles = pytest.mark.parametrize("grid", ["default", "small"], indirect=True)
KINDS = [(pair, True) for pair in CAST_PAIRS + RAW_PAIRS]


def with_room(memory, pairs):
    """A copy of memory and pairs with ample scratch memory behind the tensors, and the offset where that begins."""
    size = sum(pair.model.numel() * pair.model.itemsize + 48 for pair in pairs)
    return *in_copy(memory, pairs, -(-size // 16) * 16), len(memory)


def saved_values(tables, pairs, memory, start):
    """A view of the saved values of each pair of two types, in the order of the average's memory."""
    row, found = 0, []
    for pair in pairs:
        if pair.ema.numel() == 0:
            continue
        at, size = tables.scratch(row), pair.model.numel() * pair.model.itemsize
        row += 1
        if pair.ema.dtype == pair.model.dtype:
            assert at == -1
            continue
        assert at >= 0
        assert at + size <= tables.scratch_bytes()
        found.append((pair, memory[start + at : start + at + size].view(pair.model.dtype)))
    return found


def in_order(pair, tensor):
    """The elements along the average's memory."""
    return tensor.reshape(-1)[element_numbers(pair._replace(number=0)).reshape(-1).argsort()]


def check_exchange(grid, memory, pairs, start, index=0):
    """Swaps and restores. `memory` holds the pairs, and from `start` on the scratch memory."""
    before, old = in_copy(memory, pairs)
    tables = grid.tables(pairs)
    scratch = memory[start:]
    assert scratch.data_ptr() % 16 == 0
    assert tables.scratch_bytes() <= len(scratch)
    kept = saved_values(tables, pairs, memory, start)

    tables.run("swap", [0.0], first=index, scratch=scratch, seed=1)
    expected = torch.zeros_like(memory)  # how often each byte is written
    for pair, was in zip(pairs, old, strict=True):
        mark(expected, pair.model)
        if pair.ema.dtype == pair.model.dtype:
            mark(expected, pair.nth(index))
            assert oracle.same_bits(pair.nth(index), was.model)
            assert oracle.same_bits(pair.model, was.nth(index))
        else:
            want = oracle.cast(was.nth(index), pair.model.dtype)
            assert oracle.same_bits_but_nan(pair.model, want), (pair.ema.dtype, pair.model.dtype)
    models = {id(pair): was.model for pair, was in zip(pairs, old, strict=True)}
    for pair, values in kept:
        mark(expected, values)
        assert oracle.same_bits(values, in_order(pair, models[id(pair)])), (pair.ema.dtype, pair.model.dtype)
    assert torch.equal(writes_per_byte(grid, memory), expected.long()), "not every element was written exactly once"
    assert torch.equal(memory[expected == 0], before[expected == 0]), "bytes outside the tensors changed"

    saved = scratch.clone()
    for pair, _ in kept:  # what the block does to them must not matter
        pair.model.fill_(7)
    tables.run("restore", [0.0], first=index, scratch=scratch, seed=2)
    assert torch.equal(memory[:start], before[:start]), "not restored bit for bit"
    assert torch.equal(scratch, saved), "the scratch memory has changed"
    expected.zero_()
    for pair in pairs:
        mark(expected, pair.model)
        if pair.ema.dtype == pair.model.dtype:
            mark(expected, pair.nth(index))
    assert torch.equal(writes_per_byte(grid, memory), expected.long()), "not every element was written exactly once"


@sizes_of_tiles
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0][0]}-{kind[0][1]}".replace("torch.", ""))
def test_sizes_and_alignments(grid, kind):
    """Each size at five pairs of offsets: none, two equal ones (aligned to each other), two random ones."""
    dtypes, average = kind
    rng, tile = np.random.default_rng(1), grid.tile(dtypes[0])
    lanes = [16 // dtype.itemsize for dtype in dtypes]
    rows = []
    for n in (0, 1, 17, tile - 1, tile, tile + 1, 2 * tile + 5):
        equal = rng.integers(1, lanes[0], 2, endpoint=True)
        free = rng.integers(0, lanes, (2, 2), endpoint=True)
        rows += [(dtypes, n, offsets, average) for offsets in [(0, 0), *zip(equal, equal, strict=True), *free]]
    check_exchange(grid, *with_room(*place(rng, rows)))


@sizes_of_tiles
@pytest.mark.parametrize(("averages", "index"), [(1, 0), (3, 0), (3, 1), (3, 2), (8, 7)])
def test_one_of_several_averages(grid, averages, index):
    """Of all types in one launch; the other averages keep every byte."""
    rng = np.random.default_rng(2)
    tile = grid.tile(torch.float32)
    rows = []
    for dtypes, average in KINDS * 2:
        offsets = rng.integers(0, [16 // dtype.itemsize for dtype in dtypes])
        rows.append((dtypes, rng.choice([0, 1, 100, tile, 2 * tile + 3]), offsets, average))
    check_exchange(grid, *with_room(*place(rng, rows, averages)), index)


def test_strided(grid):
    """Permuted, with gaps, and channels last; never an expanded model, whose elements are written twice."""
    rng = np.random.default_rng(3)
    for trial in range(12):
        placed = with_room(*place_strided(rng, KINDS, 3, expand=False))
        check_exchange((grid, build("small"))[trial % 2], *placed, trial % 3)


def test_values_that_the_model_can_hold_come_through(grid):
    """A wider model gets the average's very values; one of its own type its very bits, payloads of NaN among them."""
    rng = np.random.default_rng(4)
    rows = [((torch.bfloat16, torch.float32), 5000, (0, 0), True), ((torch.float32, torch.float32), 5000, (1, 0), True)]
    memory, pairs, start = with_room(*place(rng, rows))
    _, old = in_copy(memory, pairs)
    grid.tables(pairs).run("swap", [0.0], scratch=memory[start:])
    assert oracle.same_bits_but_nan(pairs[0].model.bfloat16(), old[0].ema)
    assert oracle.same_bits(pairs[1].model, old[1].ema)
