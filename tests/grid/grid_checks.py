"""Places tensors in memory with guards, and checks every byte of it after a launch on the emulated grid."""

import math
from collections import defaultdict

import numpy as np
import oracle
import torch
from emulated_grid import INTEGERS, Pair

GUARD = 48  # bytes
SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0]  # the subnormals are among the oracle's values


def noise(dtype, n, rng):
    """Values of the oracle; one in ten is a random bit pattern, one in twenty a special value, since 32 or 64 random
    bits are hardly ever NaN or Inf. Integers are random bits."""
    # One more than asked for, because torch's view refuses the stride of an empty numpy array.
    bits = torch.from_numpy(rng.integers(0, 256, (n + 1) * dtype.itemsize, dtype=np.uint8)).view(dtype)[:n]
    if not dtype.is_floating_point:
        return bits
    special = torch.from_numpy(rng.choice(SPECIAL, n)).to(dtype)
    kind = torch.from_numpy(rng.random(n))
    return torch.where(kind < 0.05, special, torch.where(kind < 0.15, bits, oracle.values(dtype, n, rng)))


def place(rng, rows, averages=1, number=0):
    """Makes a flat pair for each row (dtypes, n, offsets, average): n elements, `offsets` elements past a 16-byte
    boundary. All lie in one block of random bytes, with at least GUARD bytes around each tensor.

    With several `averages`, the pair has the first of them. The elements are numbered from `number` on, as in
    csrc/plan.cpp. Returns the block and the pairs."""
    starts, strides, end = [], [], GUARD
    for dtypes, n, offsets, _ in rows:
        size = dtypes[0].itemsize
        strides.append(-(-(n * size + GUARD) // 16) * 16 // size if averages > 1 else 0)
        for dtype, length, offset in zip(dtypes, ((averages - 1) * strides[-1] + n, n), offsets, strict=True):
            starts.append(end + offset * dtype.itemsize)
            end = -(-(starts[-1] + length * dtype.itemsize + GUARD) // 16) * 16
    memory = torch.empty(end, dtype=torch.uint8)  # torch aligns it to 64 bytes
    memory.copy_(noise(torch.uint8, end, rng))
    pairs, start = [], iter(starts)
    for (dtypes, n, _, average), stride in zip(rows, strides, strict=True):
        ema, model = (memory[at : at + n * t.itemsize].view(t) for t, at in zip(dtypes, start, strict=False))
        pairs.append(Pair(ema, model, average, stride, number))
        number += 2 * n
        model.copy_(noise(model.dtype, n, rng))
        for k in range(averages):
            equal = torch.from_numpy(rng.random(n) < 0.2)
            pairs[-1].nth(k).copy_(torch.where(equal, model.to(ema.dtype), noise(ema.dtype, n, rng)))
    return memory, pairs


def in_copy(memory, pairs, spare=0):
    """A copy of the memory with `spare` bytes more, and the same pairs in it."""
    other = torch.cat([memory, memory.new_full((spare,), 99)])
    views = [[same_view(side, other) for side in pair[:2]] for pair in pairs]
    return other, [Pair(*sides, *pair[2:]) for sides, pair in zip(views, pairs, strict=True)]


def same_view(tensor, memory):
    """The view into `memory` that `tensor` is into another block of the same length."""
    there = torch.empty(0, dtype=tensor.dtype)
    return there.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


# ---- One launch, with everything it must and must not do ----


def launch(grid, memory, pairs, op="update", decay=0.9, device_decay=None, *, first=0, keys=()):
    """Runs `pairs`, which lie in `memory`; checks values, guards, and that each element is written exactly once.

    `decay` and `keys` are those of the averages from `first` on; `decay` may be a number."""
    decays = [decay] if isinstance(decay, float) else decay
    ran = range(first, first + len(decays))
    before = memory.clone()
    old = [(pair, [pair.nth(k).clone() for k in ran], pair.model.clone()) for pair in pairs]
    tables = grid.tables(pairs)
    tables.run(op, decays, device_decay, first=first, keys=keys)
    if device_decay is not None:
        decays = device_decay[first : ran.stop].tolist()

    averages = defaultdict(list)
    expected = torch.zeros_like(memory)  # how often each byte is written
    for pair, old_averages, p in old:
        for k, e, d in zip(ran, old_averages, decays, strict=True):
            z, keep = pair.nth(k), torch.zeros(p.shape, dtype=torch.bool)
            if op.endswith("_finite") and pair.average:
                keep = ~p.isfinite()
                assert oracle.same_bits(z[keep], e[keep]), "an average moved where the model is not finite"
            if op in ("swap", "restore"):
                mark(expected, z, pair.model)
                assert oracle.same_bits(z, p)
                assert oracle.same_bits(pair.model, e)
            elif op == "copy" or d == 0 or not pair.average:
                if op != "copy" and d == 1:
                    continue  # nothing may be written
                mark(expected, z)
                same = oracle.same_bits if z.dtype == p.dtype else oracle.same_bits_but_nan
                assert same(z[~keep], p.to(z.dtype)[~keep]), (z.dtype, p.dtype)
            elif d != 1:
                mark(expected, z)
                stochastic = "stochastic" in op and z.dtype in oracle.HALF
                numbers = element_numbers(pair)[~keep] if stochastic else None
                averages[k].append((e[~keep], p[~keep], z[~keep], numbers))
    for k, steps in averages.items():
        stochastic = [step for step in steps if step[3] is not None]
        if stochastic:
            check_stochastic(stochastic, decays[k - first], keys[k - first])
        if len(stochastic) < len(steps):
            check_averages([step[:3] for step in steps if step[3] is None], decays[k - first])
    assert torch.equal(memory[expected == 0], before[expected == 0]), "bytes outside the tensors changed"
    assert torch.equal(writes_per_byte(grid, memory), expected.long()), "not every element was written exactly once"
    return tables


def mark(expected, *tensors):
    """Puts 1 into each byte that the tensors, which are views into another block, occupy there."""
    for tensor in tensors:
        integer = {dtype.itemsize: dtype for dtype in INTEGERS}[tensor.dtype.itemsize]
        same_view(tensor, expected).view(integer).fill_(0x0101010101010101 & torch.iinfo(integer).max)


def element_numbers(pair):
    """The number of each element, counted along the average's memory."""
    order = sorted(range(pair.ema.dim()), key=lambda d: -pair.ema.stride(d))
    count = torch.arange(pair.number, pair.number + pair.ema.numel()).view([pair.ema.shape[d] for d in order])
    return count.permute([order.index(d) for d in range(len(order))])


def writes_per_byte(grid, memory):
    addresses, sizes = grid.stores()
    assert (addresses % np.minimum(sizes, 16) == 0).all(), "misaligned store"
    at = addresses - memory.data_ptr()
    counts = np.zeros(len(memory), np.int64)
    for size in np.unique(sizes):
        touched = at[sizes == size][:, None] + np.arange(size)
        assert touched.min() >= 0, "written before the memory"
        assert touched.max() < len(counts), "written after the memory"
        counts += np.bincount(touched.ravel(), minlength=len(counts))
    return torch.from_numpy(counts)


def check_averages(steps, decay):
    """Checks each (old average, model, new average): finite values by `check_step`, others by the contract."""
    finite_steps = []
    for e, p, z in steps:
        cast = p.to(z.dtype)
        wide = oracle.is_wide(z.dtype, p.dtype)
        t = p.to(torch.float64 if wide else torch.float32) - e
        finite = t.isfinite() & cast.isfinite()
        finite_steps.append([side[finite] for side in (e, p, z)])
        between = (torch.minimum(e, cast) <= z) & (z <= torch.maximum(e, cast))
        assert between[finite].all()
        if z.dtype == torch.float64:  # check_step takes a sample; this checks all, less strictly
            error = (z - torch.lerp(e, cast, 1 - decay)).abs()
            assert (error <= 2.0**-50 * (e.abs() + cast.abs()) + 2.0**-1070)[finite].all()
        e, p, z = (side[~finite] for side in (e, p, z))
        if wide:  # Inf and NaN need no fused rounding
            rest = t[~finite]
            want = oracle.cast(e + (1 - decay) * rest if 1 - decay < 0.5 else p - decay * rest, z.dtype)
            want[e == p] = e[e == p]
        else:
            want = oracle.contract(e, p, decay, z.dtype)
        assert oracle.same_bits_but_nan(want, z), "bits differ from the formula"
    oracle.check_step(*zip(*finite_steps, strict=True), decay, bitwise=True)


def check_stochastic(steps, decay, key):
    """Checks each (old average, model, new average, numbers of its elements) bit for bit; of float64 a sample."""
    for e, p, z, numbers in steps:
        e, p, z, numbers = (side.reshape(-1) for side in (e, p, z, numbers))
        if oracle.is_wide(p.dtype) and len(e) > oracle.SAMPLE:
            at = torch.linspace(0, len(e) - 1, oracle.SAMPLE).long()
            e, p, z, numbers = (side[at] for side in (e, p, z, numbers))
        want = oracle.contract_by_chance(e, p, decay, z.dtype, key, numbers.numpy())
        assert oracle.same_bits_but_nan(want, z), "bits differ from the formula"
