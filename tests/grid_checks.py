"""Tensors in memory with guards, and one launch of the emulated grid with every byte of that memory checked."""

import numpy as np
import oracle
import torch
from emulated_grid import INTEGERS, Pair

GUARD = 48  # bytes


def noise(dtype, n, rng):
    """Values like weights, of any exponent, and corners; one in ten a random pattern of bits. Integers: bits."""
    # One more than asked for: an empty array of numpy's has a stride that torch's view refuses.
    bits = torch.from_numpy(rng.integers(0, 256, (n + 1) * dtype.itemsize, dtype=np.uint8)).view(dtype)[:n]
    if not dtype.is_floating_point:
        return bits
    return torch.where(torch.from_numpy(rng.random(n) < 0.1), bits, oracle.values(dtype, n, rng))


def place(rng, rows):
    """For each row (dtypes, n, offsets, average) a flat pair of n elements, `offsets` elements past a 16-byte boundary;
    all in one block of random bytes, GUARD of them or more around each tensor. Returns the block and the pairs."""
    starts, end = [], GUARD
    for dtypes, n, offsets, _ in rows:
        for dtype, offset in zip(dtypes, offsets, strict=True):
            starts.append(end + offset * dtype.itemsize)
            end = -(-(starts[-1] + n * dtype.itemsize + GUARD) // 16) * 16
    memory = torch.empty(end, dtype=torch.uint8)  # torch aligns it to 64 bytes
    memory.copy_(noise(torch.uint8, end, rng))
    pairs, start = [], iter(starts)
    for dtypes, n, _, average in rows:
        ema, model = (memory[at : at + n * t.itemsize].view(t) for t, at in zip(dtypes, start, strict=False))
        ema.copy_(noise(ema.dtype, n, rng))
        model.copy_(noise(model.dtype, n, rng))
        equal = torch.from_numpy(rng.random(n) < 0.2)
        ema[equal] = model[equal].to(ema.dtype)
        pairs.append(Pair(ema, model, average))
    return memory, pairs


# ---- One launch and all that it must and must not do ----


def launch(grid, memory, pairs, op="update", decay=0.9, device_decay=None):
    """Runs `pairs`, which lie in `memory`; checks values, guards, and that each element is written exactly once."""
    before = memory.clone()
    old = [(pair, pair.ema.clone(), pair.model.clone()) for pair in pairs]
    tables = grid.tables(pairs)
    tables.run(op, decay, device_decay)
    if device_decay is not None:
        decay = device_decay.item()

    averages = []
    expected = torch.zeros_like(memory)  # how often each byte is written
    for (ema, model, average), e, p in old:
        if decay == 1:
            continue  # nothing may be written
        mark(expected, ema)
        if op == "update" and average and decay != 0:
            averages.append((e, p, ema))
        elif op == "swap":
            mark(expected, model)
            assert oracle.same_bits(ema, p)
            assert oracle.same_bits(model, e)
        else:
            same = oracle.same_bits if ema.dtype == model.dtype else oracle.same_bits_but_nan
            assert same(ema, p.to(ema.dtype)), (ema.dtype, model.dtype)
    if averages:
        check_averages(averages, decay)
    assert torch.equal(memory[expected == 0], before[expected == 0]), "bytes outside the tensors changed"
    assert torch.equal(writes_per_byte(grid, memory), expected.long()), "not every element was written exactly once"
    return tables


def mark(expected, tensor):
    """Puts 1 into each byte that the tensor, a view into another block of memory, has there."""
    there = torch.empty(0, dtype=tensor.dtype)
    there.set_(expected.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    integer = {dtype.itemsize: dtype for dtype in INTEGERS}[tensor.dtype.itemsize]
    there.view(integer).fill_(0x0101010101010101 & torch.iinfo(integer).max)


def writes_per_byte(grid, memory):
    addresses, sizes = grid.stores()
    assert (addresses % sizes == 0).all(), "misaligned store"
    at = addresses - memory.data_ptr()
    counts = np.zeros(len(memory), np.int64)
    for size in np.unique(sizes):
        touched = at[sizes == size][:, None] + np.arange(size)
        assert touched.min() >= 0, "written before the memory"
        assert touched.max() < len(counts), "written behind the memory"
        counts += np.bincount(touched.ravel(), minlength=len(counts))
    return torch.from_numpy(counts)


def check_averages(steps, decay):
    """Each (old average, model, new average): `check_step` for what is finite, and the rest of the contract."""
    finite_steps = []
    for e, p, z in steps:
        cast = p.to(z.dtype)
        wide = torch.promote_types(z.dtype, torch.float32)
        t = p.to(wide) - e.to(wide)
        finite = t.isfinite() & cast.isfinite()
        finite_steps.append([side[finite] for side in (e, p, z)])
        between = (torch.minimum(e, cast) <= z) & (z <= torch.maximum(e, cast))
        assert between[finite].all()
        if wide == torch.float64:  # check_step looks at a sample, this roughly at all
            error = (z - torch.lerp(e, cast, 1 - decay)).abs()
            assert (error <= 2.0**-50 * (e.abs() + cast.abs()) + 2.0**-1070)[finite].all()
        e, p, z = (side[~finite] for side in (e, p, z))
        if wide == torch.float64:  # Inf and NaN need no fused rounding
            want = e + (1 - decay) * t[~finite] if 1 - decay < 0.5 else p - decay * t[~finite]
        else:
            want = oracle.contract(e, p, decay, z.dtype)
        assert oracle.same_bits_but_nan(want, z), "other bits than the formula"
    oracle.check_step(*zip(*finite_steps, strict=True), decay, bitwise=True)
