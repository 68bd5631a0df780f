"""Stochastic rounding by the kernel's own functions: the random bits, and how each kind of value is rounded."""

import itertools

import numpy as np
import oracle
import pytest
import torch

from fused_ema.runners import reference

SIXTEEN_BITS = pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
CUT = {torch.bfloat16: 16, torch.float16: 13}  # bits that a normal value loses
KEYS = [0, 1, 0x0123456789ABCDEF, 2**64 - 1, 2**32, 2**63]


def to_float32(bits):
    return torch.from_numpy(np.asarray(bits, np.uint32).view(np.float32))


def drawn(rng, n):
    """Random bits, among them none and all."""
    random = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    random[rng.random(n) < 0.1] = 0
    random[rng.random(n) < 0.1] = 2**32 - 1
    return random


def rounded(grid, name, dtype, values, random):
    return grid.convert(f"grid_{name}_from_float", values, dtype, torch.from_numpy(np.asarray(random).view(np.int32)))


def all_kinds(dtype, rng):
    """All exponents, on and around each kind of step of both types; then half a million random patterns."""
    cut = CUT[dtype]
    heads = [0, 1, 2, (0x7FFFFF >> cut) - 1, 0x7FFFFF >> cut]
    tails = [0, 1, (1 << cut - 1) - 1, 1 << cut - 1, (1 << cut) - 2, (1 << cut) - 1]
    mantissas = [head << cut | tail for head, tail in itertools.product(heads, tails)]
    mantissas += [m for k in range(23) for m in (1 << k, (1 << k) - 1)]  # float16's subnormals lose up to 24 bits
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23  # the sign above them
    random = rng.integers(0, 1 << 32, 500_000, dtype=np.uint32)
    return to_float32(np.concatenate([np.repeat((exponents | np.array(mantissas, np.uint32)).ravel(), 8), random]))


@pytest.mark.parametrize("key", KEYS)
def test_random_bits(grid, key):
    edges = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**53 + 1, 2**62, 2**63 - 1]
    numbers = np.concatenate([edges, np.random.default_rng(1).integers(0, 2**63, 100_000), np.arange(50_000)])
    found = grid.random_bits(key, torch.from_numpy(numbers)).numpy().view(np.uint32)
    assert np.array_equal(found, oracle.random_bits(key, numbers))


def test_random_bits_look_random(grid):
    """Each bit set half of the time, in neighbouring elements and in neighbouring keys independently."""
    n = 1 << 16
    lines = [grid.random_bits(key, torch.arange(start, start + n)) for key in KEYS[:3] for start in (0, 2 * n, 1 << 32)]
    bits = (torch.stack(lines)[:, :, None] >> torch.arange(32) & 1).float() - 0.5  # [line, element, bit]
    five_sigma = 5 * 0.25 / n**0.5
    assert bits.mean(1).abs().max() < 2 * five_sigma
    assert (bits[:, 1:] * bits[:, :-1]).mean(1).abs().max() < five_sigma
    for one, other in itertools.combinations(bits, 2):
        assert (one * other).mean(0).abs().max() < five_sigma
    pairs = torch.einsum("lei,lej->lij", bits, bits) / n
    assert (pairs - torch.eye(32) / 4).abs().max() < 1.2 * five_sigma  # the largest of 4464


@SIXTEEN_BITS
def test_the_formula(grid, name, dtype):
    rng = np.random.default_rng(2)
    values = all_kinds(dtype, rng)
    random = drawn(rng, len(values))
    want = oracle.round_by_chance(values.numpy(), dtype, random.astype(np.uint64))
    assert oracle.same_bits_but_nan(rounded(grid, name, dtype, values, random), want)


@SIXTEEN_BITS
def test_it_is_one_of_the_two_neighbours(grid, name, dtype):
    """The truncated magnitude and the next one, by their bits; after the largest comes infinity."""
    rng = np.random.default_rng(3)
    values = all_kinds(dtype, rng)
    values = values[values.isfinite()]
    found = rounded(grid, name, dtype, values, drawn(rng, len(values)))
    nearest = values.abs().to(dtype)
    below = nearest.view(torch.int16) - (nearest.float() > values.abs()).short()
    exact = below.view(dtype).float() == values.abs()
    magnitude = found.view(torch.int16) & 0x7FFF
    infinite = torch.tensor(torch.inf, dtype=dtype).view(torch.int16)
    beyond = below >= infinite  # 2**16 and above, in float16
    assert torch.equal(magnitude[beyond], infinite.expand(int(beyond.sum())))
    assert torch.equal(magnitude[exact], below[exact])
    up = magnitude - below
    assert ((up == 0) | (up == 1))[~beyond].all()
    assert {0, 1} == set(up[~beyond & ~exact].tolist())
    assert torch.equal(found.view(torch.int16) < 0, values.signbit())


@SIXTEEN_BITS
def test_values_that_fit_stay(grid, name, dtype):
    """Every value that the type can represent stays, whatever the random bits are; NaN stays NaN."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rng = np.random.default_rng(4)
    for random in [np.zeros(2**16, np.uint32), np.full(2**16, 2**32 - 1, np.uint32), drawn(rng, 2**16)]:
        assert oracle.same_bits_but_nan(rounded(grid, name, dtype, patterns.float(), random), patterns)
    nan = to_float32([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
    assert rounded(grid, name, dtype, nan, np.full(5, 2**32 - 1, np.uint32)).isnan().all()


@SIXTEEN_BITS
def test_larger_values_round_to_no_smaller_ones(grid, name, dtype):
    rng = np.random.default_rng(5)
    values = all_kinds(dtype, rng)
    values = values[~values.isnan()].sort().values
    for random in [0, 2**32 - 1, *rng.integers(0, 2**32, 6)]:
        found = rounded(grid, name, dtype, values, np.full(len(values), random, np.uint32)).float()
        assert (found[1:] >= found[:-1]).all()


@SIXTEEN_BITS
@pytest.mark.parametrize("value", [1.0, -3.7e-3, 65000.0, 2.0**-14, 1.01 * 2.0**-20, -0.3 * 2.0**-24, 3e-39])
def test_the_mean_over_all_that_can_be_drawn_is_the_value(grid, name, dtype, value):
    """For normal and subnormal results, to the resolution of the bits."""
    cut = CUT[dtype]
    random = np.arange(1 << cut, dtype=np.uint32) << np.uint32(32 - cut)
    for tail in (0, 1, 12345, (1 << cut) - 1):
        x = to_float32([np.array(value, np.float32).view(np.uint32) + np.uint32(tail)])
        found = rounded(grid, name, dtype, x.expand(1 << cut).contiguous(), random).double()
        near, far, _ = oracle.neighbours(x.double().numpy(), dtype)
        error = abs(found.mean().item() - x.item())
        assert error <= abs(far - near).item() * 2.0**-cut


@SIXTEEN_BITS
@pytest.mark.parametrize("key", KEYS)
def test_the_pure_path_rounds_alike(grid, name, dtype, key):
    rng = np.random.default_rng(6)
    values = all_kinds(dtype, rng)
    for number in (0, 2**32 - 1000):
        numbers = torch.arange(number, number + len(values))
        found = rounded(grid, name, dtype, values, grid.random_bits(key, numbers).numpy())
        pure = reference.round_stochastically(values, dtype, key, number)
        other = (pure != found) & ~(pure.isnan() & found.isnan())
        # It adds float16's subnormals in float64, the kernels in float32: a difference once in a million.
        assert other.sum() <= (5 if dtype == torch.float16 else 0)
        assert (values[other].abs() < 2.0**-14).all()
