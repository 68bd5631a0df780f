"""The arithmetic of a merge: the formula in float64, rounded once, to the bit."""

import math

import numpy as np
import oracle
import pytest
import torch
from merge_checks import nearest

from fused_ema._build.library import load
from fused_ema.merging import sums
from fused_ema.merging.sums import PIECE, Sum, round_once

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["extension", "torch"] if load() else ["torch"])
def compiled(request, monkeypatch):
    """Whether the extension computes the sums."""
    if request.param == "torch":
        monkeypatch.setattr(sums, "load", lambda: None)
    return request.param == "extension"


EXTENSION = pytest.mark.parametrize("compiled", ["extension"] if load() else [], indirect=True)


def rounded(values, dtype, compiled):
    out = torch.empty(len(values), dtype=dtype)
    if compiled:
        load().round_sum(values, out)
    else:
        round_once(values, out, torch.empty_like(values), torch.empty(len(values)))
    return out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_rounding_next_to_every_halfway_point(dtype, compiled):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].double()
    positive = every[every > 0].sort().values
    positive = torch.cat([torch.zeros(1, dtype=torch.float64), positive])
    top = 2 * positive[-1] - positive[-2]
    middle = (positive + torch.cat([positive[1:], top[None]])) / 2
    near = [middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40), middle * (1 + 2.0**-52), middle * (1 - 2.0**-52)]
    values = torch.cat(near + [-each for each in near])
    expected = torch.tensor([nearest(each, dtype) for each in values.tolist()], dtype=torch.float64)
    found = rounded(values, dtype, compiled)
    assert torch.equal(found.double(), expected)
    assert torch.equal(found.signbit(), expected.signbit())
    assert not torch.equal(values.to(dtype).double(), expected), "PyTorch rounds twice, so this proves something"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_rounding_of_anything(dtype, compiled):
    rng = np.random.default_rng(0)
    values = torch.from_numpy(np.ldexp(rng.normal(size=20000), rng.integers(-160, 140, 20000)))
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e300, 1e-300, 5e-324, 65520.0, 65519.999])
    values = torch.cat([values, special.double()])
    expected = torch.tensor([nearest(each, dtype) for each in values.tolist()], dtype=torch.float64)
    found = rounded(values, dtype, compiled).double()
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())
    assert rounded(torch.tensor([math.nan]).double(), dtype, compiled).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("count", [1, 7, 1000, PIECE])
def test_a_sum_is_the_formula(dtype, count):
    rng = np.random.default_rng(1)
    parts = [oracle.values(dtype, count, rng, largest=14) for _ in range(5)]
    weights = [0.1, 0.25, 0.3, 0.45, -0.1]
    out = torch.empty(count, dtype=dtype)
    assert Sum().write(iter(parts), weights, out)
    total = 0.0
    for weight, part in zip(weights, parts, strict=True):
        total = total + weight * part.double().numpy()  # numpy has no fused multiply-add
    if dtype in HALVES:
        assert out.double().tolist() == [nearest(each, dtype) for each in total.tolist()]
    else:
        assert oracle.same_bits(out, torch.from_numpy(total).to(dtype))


def test_equal_checkpoints_stay_equal():
    x = torch.randn(PIECE)
    for count in (2, 3, 7, 10):
        out = torch.empty(PIECE)
        Sum().write([x] * count, [1 / count] * count, out)
        assert oracle.same_bits(out, x)


def test_whether_a_sum_is_finite():
    out, ones = torch.empty(3), torch.ones(3)
    assert Sum().write([ones, ones], [0.5, 0.5], out)
    assert not Sum().write([ones, torch.tensor([1.0, math.nan, 1.0])], [0.5, 0.5], out)
    assert not Sum().write([ones, torch.tensor([1.0, -math.inf, 1.0])], [0.5, 0.5], out)
    huge = torch.full((3,), 1e308, dtype=torch.float64)  # finite, though their sum over the piece is not
    assert Sum().write([huge], [1.0], torch.empty(3, dtype=torch.float64))
    for dtype in (torch.float32, *HALVES):  # finite as a sum, but not once it is rounded
        largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
        assert not Sum().write([-largest, largest], [-5.0, 6.0], torch.empty(3, dtype=dtype))


@EXTENSION  # PyTorch's operations flush them as they are told to
def test_the_extension_keeps_subnormals_that_a_thread_flushes(compiled):
    assert torch.set_flush_denormal(True)
    part, out = torch.full((100,), 3 * 2.0**-149), torch.empty(100)
    try:
        Sum().write([part, part], [0.5, 0.5], out)
    finally:
        torch.set_flush_denormal(False)
    assert oracle.same_bits(out, part)


@EXTENSION
def test_the_extension_refuses_what_would_be_read_beyond_its_end(compiled):
    total = torch.zeros(4, dtype=torch.float64)
    for other in (torch.zeros(5), torch.zeros(8)[::2], torch.zeros(4, device="meta")):
        with pytest.raises(ValueError, match="float64 total"):
            load().add_weighted(total, other, 1.0, True)
        with pytest.raises(ValueError, match="float64 total"):
            load().round_sum(total, other)
    with pytest.raises(TypeError, match="floating type"):
        load().add_weighted(total, torch.zeros(4, dtype=torch.int32), 1.0, True)
    with pytest.raises(ValueError, match="float64 total"):
        load().round_sum(torch.zeros(4), torch.zeros(4))
