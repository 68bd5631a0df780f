"""The result that one update must have: exact arithmetic, the bound of one step, the contract's formulas bit for bit.

Everything is computed by numpy and fractions. Nothing here calls fused_ema, and torch rounds only in its casts.
"""

import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import torch

HALF = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, torch.float64, *HALF]
PAIRS = [  # (average, model)
    *((torch.float32, dtype) for dtype in (torch.float32, *HALF)),
    *((torch.float64, dtype) for dtype in FLOATS),
    *((average, dtype) for average in HALF for dtype in HALF),
    (torch.complex64, torch.complex64),
    (torch.complex128, torch.complex64),
    (torch.complex128, torch.complex128),
]
# Only a manager has these: averages narrower than the model.
NARROW_PAIRS = [(average, dtype) for average in HALF for dtype in FLOATS if dtype not in HALF]
NARROW_PAIRS += [(torch.float32, torch.float64)]
# The neighbours of 0 and 1, both sides of 1/2 (where the formula changes), and what people use.
DECAYS = [0.0, math.nextafter(0, 1), 1e-6, 0.3, 0.5, 0.9, 0.999, 0.9999, math.nextafter(1, 0), 1.0]
INNER_DECAYS = DECAYS[1:-1]
TILE_BYTES = 64 * 2 * 2 * 16  # of the average, in one tile of the default kernel: threads * unroll * steps * vector

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
# Bits of the significand, and the exponent that math.frexp gives for the smallest normal number.
FORMAT = {
    torch.float32: (24, -125),
    torch.float64: (53, -1021),
    torch.bfloat16: (8, -125),
    torch.float16: (11, -13),
}
# Exponents of the largest test values: the difference of two of them does not overflow the arithmetic's type.
LARGEST = {torch.float32: 126, torch.float64: 1000, torch.bfloat16: 126, torch.float16: 15}
SLACK = 1 + 2.0**-20  # for evaluating a float32 bound in float64
SAMPLE = 2000  # float64 elements looked at in one call: fractions are slow


# ---- Tensors ----


def real(dtype):
    return REAL.get(dtype, dtype)


def reals(tensor):
    """All elements in one dimension, complex ones as two."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def flat(tensors):
    return torch.cat([reals(tensor) for tensor in tensors]).cpu()


def same_bits(a, b):
    raw = [torch.cat([reals(t).cpu()]).view(torch.uint8) for t in (a, b)]  # cat: one element can have any stride
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def same_bits_but_nan(a, b):
    """NaN may differ in sign and payload."""
    a, b = reals(a).cpu(), reals(b).cpu()
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a[~a.isnan()], b[~b.isnan()])


def values(dtype, count, rng, largest=None):
    """Finite test values: some like weights, some of any exponent, and corner cases; complex numbers get two each."""
    if dtype in REAL:
        return torch.view_as_complex(values(real(dtype), 2 * count, rng, largest).view(count, 2))
    precision, smallest = FORMAT[dtype]
    largest = min(LARGEST[dtype], largest or LARGEST[dtype])
    tiny = smallest - precision  # 2**tiny is the smallest subnormal
    weights = rng.normal(0, 0.05, count)
    wide = np.ldexp(rng.uniform(-1, 1, count), rng.integers(tiny, largest + 1, count))
    ends = np.ldexp(1.0, [tiny, smallest - 1, largest - 1])  # the smallest, the smallest normal, the largest
    corners = np.array([0.0, -0.0, 1.0, -1.0, *ends, *-ends])
    kind = rng.choice(3, count, p=[0.5, 0.35, 0.15])
    return torch.from_numpy(np.choose(kind, [weights, wide, rng.choice(corners, count)])).to(dtype)


def value_pair(ema_dtype, model_dtype, count, rng):
    """Values of an average and its model, about a fifth of them equal where the types allow it."""
    ema, model = values(ema_dtype, count, rng), values(model_dtype, count, rng, LARGEST[real(ema_dtype)] - 1)
    equal = torch.from_numpy(rng.random(count) < 0.2)
    return torch.where(equal, model.to(ema_dtype), ema), model


# ---- Exact arithmetic ----


def ulp(x, dtype):
    precision, smallest = FORMAT[dtype]
    exponent = np.where(x == 0, smallest, np.frexp(x)[1])
    return np.ldexp(1.0, np.maximum(exponent, smallest) - precision)


def exact(ema, model, decay):
    """decay * ema + (1 - decay) * model in float64, for values that are exact in 32 bits."""
    weight = 1.0 - decay  # exact where it is used
    return ema + weight * (model - ema) if weight < 0.5 else model - decay * (model - ema)


def bound(ema, model, new, decay, dtype):
    """How far `new`, of `dtype` (32 bits at most), may be from `exact`: arrays of float64."""
    moved = 2.0**-23 * min(1 - decay, decay) * abs(model - ema)
    stored = 0.5 * ulp(new, dtype)
    if dtype != torch.float32:  # two roundings: to float32, then to the average's type
        stored += 0.5 * ulp(np.maximum(abs(new), abs(exact(ema, model, decay))), torch.float32)
    return (stored + moved) * SLACK


def error_over_bound(ema, model, new, decay, dtype, fused=True):
    """The error of each element over its bound, which must be at most 1: flat CPU tensors of finite values in, an array
    of float64 out.

    Without `fused`, a product in float64 is rounded by itself, which adds an error below the normal numbers."""
    ema, model, new = (side.double().numpy() for side in (ema, model, new))
    if dtype == torch.float64:
        return np.array([_error_over_bound_f64(*one, decay, fused) for one in zip(ema, model, new, strict=True)])
    return abs(new - exact(ema, model, decay)) / bound(ema, model, new, decay, dtype)


def _error_over_bound_f64(ema, model, new, decay, fused):
    if not math.isfinite(new):
        return math.inf
    d, e, p, n = (Fraction(float(x)) for x in (decay, ema, model, new))
    allowed = Fraction(math.ulp(new)) / 2 + Fraction(1, 2**52) * min(d, 1 - d) * abs(p - e)
    allowed += 0 if fused else Fraction(1, 2**1075)
    return float(abs(n - (d * e + (1 - d) * p)) / allowed)


# ---- The formula, bit for bit ----


def contract(ema, model, decay, dtype):
    """What the kernels must write for 0 < decay < 1: flat CPU tensors in and out."""
    return cast(moved(ema, model, decay), dtype)


def cast(tensor, dtype):
    """Rounds to nearest; float64 becomes 16 bits by way of float32."""
    return (tensor.float() if dtype.itemsize == 2 else tensor).to(dtype)


def is_wide(*dtypes):
    """Whether the arithmetic is in float64."""
    return torch.float64 in map(real, dtypes)


def moved(ema, model, decay):
    """An average after one update, in the type of the arithmetic."""
    weight = 1.0 - decay
    near = weight < 0.5
    wide = is_wide(ema.dtype, model.dtype)
    e, p = ((side.double() if wide else side.float()).numpy() for side in (ema, model))
    factor = e.dtype.type(weight if near else -decay)
    with np.errstate(all="ignore"):
        t = p - e
        finite = np.isfinite(t) if wide else slice(None)  # Inf and NaN need no fused rounding
        result = factor * t + (e if near else p)
        result[finite] = (_fma_f64 if wide else _fma_f32)(factor, t[finite], (e if near else p)[finite])
        return torch.from_numpy(np.where(e == p, e, result))


def _fma_f32(a, b, c):
    """The product of two float32 is exact in float64; the sum is rounded to odd, so that the last rounding is right."""
    product, c = np.float64(a) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    c_part = total - product
    rest = (product - (total - c_part)) + (c - c_part)  # total + rest is exact
    inexact_even = np.isfinite(total) & (rest != 0) & (total.view(np.int64) % 2 == 0)
    return np.where(inexact_even, np.nextafter(total, np.copysign(np.inf, rest)), total).astype(np.float32)


def _fma_f64(a, b, c):
    a = Fraction(float(a))
    return np.array([float(a * Fraction(x) + Fraction(y)) for x, y in zip(b.tolist(), c.tolist(), strict=True)])


# ---- Stochastic rounding, bit for bit ----

UINT32 = 2**32 - 1


def _mixed(x):
    """The hash "lowbias32" of 32-bit numbers (Wellons), which lie in uint64."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & np.uint64(UINT32)
    return x ^ (x >> np.uint64(16))


def random_bits(key, numbers):
    """32 bits for each of these elements: arrays of uint64 in and out."""
    numbers = numbers.astype(np.uint64)
    low, high = numbers & np.uint64(UINT32), numbers >> np.uint64(32)
    inner = _mixed(low ^ np.uint64(key & UINT32)) + np.uint64(key >> 32) + high * np.uint64(0x9E3779B9)
    return _mixed(inner & np.uint64(UINT32))


def neighbours(x, dtype):
    """x, finite and in float64: its two neighbours of a 16-bit type, towards 0 and away from 0, and the share of the
    way from the one to the other. Beyond the largest value lies infinity."""
    unit = ulp(x, dtype)
    near = np.trunc(x / unit) * unit
    far = near + np.copysign(unit, x)
    largest = torch.finfo(dtype).max
    return near, np.where(abs(far) > largest, np.copysign(np.inf, x), far), abs(x - near) / unit


def round_by_chance(x, dtype, random):
    """float32 to 16 bits: away from 0 where the share of the way and a random share, of as many bits as are cut off,
    reach 1 together. Beyond the largest value and its unit: infinity."""
    wide = np.where(np.isfinite(x), x, 0).astype(np.float64)
    near, far, share = neighbours(wide, dtype)
    bits = 24 - FORMAT[dtype][0]
    drawn = (random >> np.uint64(32 - bits)) * 2.0**-bits
    units = abs(near) / ulp(wide, dtype)
    total = units + share + drawn
    if dtype == torch.float16:  # its subnormals are added in float32
        total = np.where(abs(wide) < 2.0**-14, np.float32(units + share) + np.float32(drawn), total)
    rounded = np.where(np.floor(total) > units, far, near)
    largest = torch.finfo(dtype).max
    rounded = np.where(abs(wide) >= largest + ulp(largest, dtype), np.copysign(np.inf, wide), rounded)
    return torch.from_numpy(np.where(np.isfinite(x), rounded, x)).to(dtype)


def contract_by_chance(ema, model, decay, dtype, key, numbers):
    """What stochastic rounding must write for 0 < decay < 1; `numbers`: of the elements, an array."""
    result = moved(ema, model, decay).float().numpy()
    return round_by_chance(result, dtype, random_bits(key, numbers))


# ---- The check ----


def check_step(old, model, new, decay, *, bitwise):
    """Asserts that one update with `decay` took each of the tensors `old` to `new`; with `bitwise`, to the last bit."""
    groups = defaultdict(list)
    for o, p, n in zip(old, model, new, strict=True):
        assert (o.dtype, o.shape) == (n.dtype, n.shape)
        groups[real(o.dtype), real(p.dtype)].append((o, p, n))
    for (dtype, model_dtype), members in groups.items():
        e, p, n = (flat(side) for side in zip(*members, strict=True))
        if not len(n):
            continue
        what = f"{dtype} <- {model_dtype}, decay {decay!r}"
        if decay == 1:
            assert same_bits(n, e), f"{what}: written to"
        elif decay == 0:
            copied = same_bits if dtype == model_dtype else same_bits_but_nan
            assert copied(n, p.to(dtype)), f"{what}: not a copy"
        else:
            if is_wide(dtype, model_dtype):
                at = _sample([reals(o).numel() for o, _, _ in members])
                e, p, n = e[at], p[at], n[at]
            ratio = error_over_bound(e, p, n, decay, dtype, fused=bitwise)
            _at_most_one(ratio, f"{what}: error over bound", e, p, n)
            equal = e.double() == p.double()
            moved_away = _wrong(e, n) if bitwise else 2 * (e != n).int().numpy()  # or the sign of a zero may change
            _at_most_one(moved_away * equal.numpy(), f"{what}: equal to the model, yet moved", e, p, n)
            if bitwise:
                wrong = _wrong(contract(e, p, decay, dtype), n)
                _at_most_one(wrong, f"{what}: other bits than the formula", e, p, n)


def _wrong(expected, found):
    """2 where the bits differ, 0 elsewhere."""
    differ = expected.view(torch.uint8) != found.view(torch.uint8)
    return 2 * differ.view(-1, found.dtype.itemsize).any(1).int().numpy()


def _at_most_one(ratio, what, e, p, n):
    if ratio.size and not ratio.max() <= 1:
        i = int(np.argmax(np.nan_to_num(ratio, nan=np.inf)))
        raise AssertionError(
            f"{what}: {ratio[i]} at element {i}: average {e[i].item()!r}, model {p[i].item()!r}, found {n[i].item()!r}"
        )


def _sample(sizes):
    """Positions near the ends of each tensor, and random ones."""
    total = sum(sizes)
    if total <= SAMPLE:
        return torch.arange(total)
    rng = np.random.default_rng(total)
    ends = np.cumsum([0, *sizes])[:, None] + np.arange(-8, 8)
    ends = rng.permutation(np.unique(ends[(ends >= 0) & (ends < total)]))[: SAMPLE // 2]
    return torch.from_numpy(np.union1d(ends, rng.integers(0, total, SAMPLE // 2)))
