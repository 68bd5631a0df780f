"""Hard cases of the arithmetic on the emulated grid: special values, neighbours, the 16-bit conversions."""

import itertools
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from emulated_grid import LERP_PAIRS
from grid_checks import launch, noise, place


def special_values(dtype):
    """Zeros, subnormals, extremes, Inf of both signs, and NaN."""
    info = torch.finfo(dtype)
    tiny, eps = info.smallest_normal, info.eps
    least = tiny * eps
    values = [0, least, 3 * least, tiny - least, tiny, 1 - eps / 2, 1, 1 + eps, 3, info.max, torch.inf]
    values = torch.tensor(values, dtype=torch.float64).to(dtype)
    return torch.cat([values, -values, torch.tensor([torch.nan], dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_random_values_have_special_ones_among_them(dtype):
    """The random values have NaN and Inf; else the tests of the runners would never meet them."""
    values = noise(dtype, 2000, np.random.default_rng(8))
    subnormal = (values != 0) & (values.abs() < torch.finfo(dtype).smallest_normal)
    zero, negative = values == 0, values.signbit()
    for kind in (values.isinf(), zero, subnormal):
        assert (kind & negative).any()
        assert (kind & ~negative).any()
    assert values.isnan().any()
    assert values.isfinite().double().mean() > 0.9


@pytest.mark.parametrize("decay", [0.9999, 0.75, 0.5, 0.25, 1e-3, 1 - 2.0**-53])
def test_special_values(grid, decay):
    """Every ordered pair of special values; equal values must keep their bits."""
    special = [[special_values(dtype) for dtype in dtypes] for dtypes in LERP_PAIRS]
    rows = [(dtypes, len(e) * len(p), (0, 0), True) for dtypes, (e, p) in zip(LERP_PAIRS, special, strict=True)]
    memory, pairs = place(np.random.default_rng(1), rows)
    for (ema, model, *_), (e, p) in zip(pairs, special, strict=True):
        ema.copy_(e.repeat_interleave(len(p)))
        model.copy_(p.repeat(len(e)))
    launch(grid, memory, pairs, decay=decay)


def test_values_stay_between(grid):
    """Neighbours and values far apart, at many decays; `launch` checks that none leaves its interval."""
    rng = np.random.default_rng(2)
    memory, [pair] = place(rng, [((torch.float32, torch.float32), 20000, (0, 0), True)])
    for decay in [*rng.random(30), 1 - 2.0**-30, 2.0**-30]:
        near = torch.from_numpy(1 + rng.integers(-4, 4, 20000) * 2.0**-24).float()
        pair.ema.copy_(torch.from_numpy(rng.standard_normal(20000)))
        pair.model.copy_(pair.ema * near)
        pair.model[::2] = torch.from_numpy(rng.standard_normal(10000))
        launch(grid, memory, [pair], decay=decay)


def test_the_oracle_itself():
    """Its float32 fma against exact fractions, on ordinary, cancelling, tied and subnormal operands."""
    rng = np.random.default_rng(3)
    a, b, c = ((rng.standard_normal(2400) * 2.0 ** rng.integers(-75, 60, 2400)).astype(np.float32) for _ in range(3))
    c[:600] = (-a[:600].astype(np.float64) * b[:600]).astype(np.float32)  # cancels all but the last bits
    a[600:1200], b[600:1200] = 1.0, np.spacing(c[600:1200]) / 2  # ties
    a[1200:1500] = 2.0**-100
    got = oracle._fma_f32(a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        if abs(exact) < 2**127:
            error = abs(Fraction(float(r)) - exact)
            for neighbour in (np.nextafter(r, np.float32(-np.inf)), np.nextafter(r, np.float32(np.inf))):
                other = abs(Fraction(float(neighbour)) - exact)
                assert error < other or (error == other and r.view(np.int32) % 2 == 0)


SIXTEEN_BITS = pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])


@SIXTEEN_BITS
def test_every_16_bit_pattern_to_float(grid, name, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert oracle.same_bits_but_nan(grid.convert(f"grid_{name}_to_float", values, torch.float32), values.float())


@SIXTEEN_BITS
def test_from_float_rounds_as_torch_does(grid, name, dtype):
    """All exponents, all roundings of each: below, at and above every kind of tie; then a million random patterns."""
    dropped = 24 - oracle.FORMAT[dtype][0]
    tie = 1 << (dropped - 1)
    tails = [0, 1, tie - 1, tie, tie + 1, 2 * tie - 1]
    heads = [0, 1, 2, 3, (0x7FFFFF >> dropped) - 1, 0x7FFFFF >> dropped]
    mantissas = [head << dropped | tail for head, tail in itertools.product(heads, tails)]
    # Results that are subnormal float16 drop up to 24 bits: single bits at all places stand for their ties.
    mantissas += [m for k in range(23) for m in (1 << k, (1 << k) - 1, (3 << k) & 0x7FFFFF)]
    mantissas = np.array([*mantissas, *(m ^ 1 for m in mantissas)], np.uint32)
    exponents = np.arange(512, dtype=np.uint32)[:, None] << 23  # the sign above them
    random = np.random.default_rng(4).integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    bits = np.concatenate([(exponents | mantissas).ravel(), random])
    values = torch.from_numpy(bits.view(np.float32))
    assert oracle.same_bits_but_nan(grid.convert(f"grid_{name}_from_float", values, dtype), values.to(dtype))
