"""Averages in 16 bits, rounded stochastically: reproducible, unbiased, and moving where nearest stands still."""

import math

import pytest
import torch
from conftest import averages
from oracle import HALF, same_bits
from torch import nn

from fused_ema import EMA
from fused_ema.runners import extension as _native
from fused_ema.runners import reference

pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")

COUNT = 20_000


def name(dtype):
    return str(dtype).removeprefix("torch.")


def rounded(old, new, decay, *, dtype, step=1, seed=0, index=0, count=1):
    """The averages after one stochastic update, from lists of old values and of the model's new ones."""
    model = nn.ParameterList([tensor.clone() for tensor in old])
    ema = EMA(model, [decay] * count, dtype=dtype, rounding="stochastic", seed=seed)
    ema.load_state_dict({**ema.state_dict(), "step": step - 1})
    for parameter, values in zip(model, new, strict=True):
        parameter.data.copy_(values)
    ema.update()
    return list(averages(ema, index).values())


def neighbours(dtype):
    """Values of all magnitudes, by name: one that `dtype` can hold, and the next one further from 0; as float32."""
    least, half_ulp = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps / 2
    found = {
        "zero": 0.0,
        "one": 1.0,
        "minus one": -1.0,
        "large": torch.finfo(dtype).max * (1 - 3 * half_ulp),
        "smallest normal": least,
        "largest subnormal": least * (1 - 2 * half_ulp),
        "subnormal": least * 10 * half_ulp,
        "minus subnormal": -least * 10 * half_ulp,
    }
    for name, value in found.items():
        low = torch.tensor(value).to(dtype)
        assert math.isclose(low.item(), value, rel_tol=1e-2)
        yield name, low.float().item(), (low.view(torch.int16) + 1).view(dtype).float().item()


def outcomes(dtype, decay=0.7, elements=COUNT, tensors=1, **options):
    """Which elements between two neighbours were rounded away from 0, in each tensor."""
    old, new = (
        [torch.full((elements,), value) for _ in range(tensors)] for value in (1.0, 1.0 + torch.finfo(dtype).eps)
    )
    return [average != 1 for average in rounded(old, new, decay, dtype=dtype, **options)]


# ---- Reproducible


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_bits_depend_on_seed_step_and_average(backend, dtype):
    options = [{}, {"seed": 1}, {"seed": 2**40}, {"step": 2}, {"step": 2**33}, {"count": 2, "index": 1}]
    found = [outcomes(dtype, **each)[0] for each in options]
    again = [outcomes(dtype, **each)[0] for each in options]
    assert all(map(torch.equal, found, again))
    for i, one in enumerate(found):
        for other in found[:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_bits_do_not_depend_on_the_state_of_torch(backend, dtype):
    torch.manual_seed(1)
    found = outcomes(dtype)[0]
    state = torch.get_rng_state()
    assert torch.equal(outcomes(dtype)[0], found)
    assert torch.equal(torch.get_rng_state(), state)


def test_bits_do_not_depend_on_threads_or_alignment(backend):
    threads = torch.get_num_threads()
    found, size = [], 300_011 if backend == "cpu" else 66_011
    try:
        for number, offset in ((1, 0), (2, 0), (2, 3)):
            torch.set_num_threads(number)
            model = nn.ParameterList([torch.ones(size + offset)[offset:], torch.ones(5)])
            ema = EMA(model, 0.7, dtype=torch.bfloat16, rounding="stochastic")
            for parameter in model:
                parameter.data.fill_(1.0078125)
            ema.update()
            found.append(torch.cat(list(averages(ema).values())))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def correlation(one, other):
    return torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1].item()


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_bits_look_independent(backend, dtype):
    several = {
        "elements": lambda n: outcomes(dtype, elements=COUNT + 8)[0][n : COUNT + n],
        "tensors": lambda n: outcomes(dtype, tensors=3)[n],
        "steps": lambda n: outcomes(dtype, step=n + 1)[0],
        "far steps": lambda n: outcomes(dtype, step=8 * n + 1)[0],
        "averages": lambda n: outcomes(dtype, count=3, index=n)[0],
        "seeds": lambda n: outcomes(dtype, seed=n)[0],
    }
    for what, get in several.items():
        for n in (1, 2):
            assert abs(correlation(get(0), get(n))) < 4 / math.sqrt(COUNT), f"{what} {n} apart"


def lowbias32(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("number", [0, 2**32 - 3, 2**32, 5 * 2**32 + 7])
def test_bits_of_any_element(number):
    """Counters of 64 bits, as csrc/lerp.h has them: those of the kernel are compared with these above and below."""
    key, values = 0x0123456789ABCDEF, torch.full((6,), 1 + 0.4 * 2**-7)
    found = reference.round_stochastically(values, torch.bfloat16, key, number)
    for i in range(6):
        low, high = (number + i) % 2**32, (number + i) >> 32
        random = lowbias32((lowbias32(low ^ key % 2**32) + (key >> 32) + high * 0x9E3779B9) % 2**32)
        up = (random >> 16) + (values[i].view(torch.int32).item() & 0xFFFF) >= 2**16
        assert found[i] == 1 + up * 2**-7


# ---- Unbiased


@pytest.mark.parametrize("dtype", HALF, ids=name)
@pytest.mark.parametrize("decay", [0.2, 0.5, 0.7, 0.99])
def test_unbiased(backend, dtype, decay):
    seeds = range(3)
    for what, low, high in neighbours(dtype):
        up = 0
        for seed in seeds:
            average = rounded([torch.full((COUNT,), low)], [torch.full((COUNT,), high)], decay, dtype=dtype, seed=seed)[
                0
            ].float()
            assert ((average == low) | (average == high)).all(), f"{what}: neither neighbour"
            up += (average == high).sum().item()
        number, share = len(seeds) * COUNT, 1 - decay
        sigma = math.sqrt(share * decay / number)
        assert abs(up / number - share) < 4 * sigma, f"{what}: {up / number} rounded away from 0, not {share}"


@pytest.mark.parametrize("dtype", HALF, ids=name)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, *HALF], ids=name)
def test_mean_over_many_seeds_is_the_unrounded_value(backend, dtype, model_dtype):
    torch.manual_seed(0)
    old, new = torch.randn(200).to(dtype), torch.randn(200).to(model_dtype)
    draws = torch.stack(
        [rounded([old.float()], [new.float()], 0.9, dtype=dtype, seed=seed)[0].double() for seed in range(200)]
    )
    exact = 0.9 * old.double() + 0.1 * new.double()
    sigma = draws.std(0) / math.sqrt(len(draws))
    apart = (draws.mean(0) - exact).abs()
    ulp = torch.maximum(exact.abs() * torch.finfo(dtype).eps, torch.tensor(1e-9))
    assert (apart <= 5 * sigma + 0.02 * ulp).all()
    assert ((draws - exact).abs() <= 1.001 * ulp).all(), "further than the next value"


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_values_that_fit_stay(backend, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float()
    for seed in range(3):
        assert same_bits(rounded([every], [every], 0.9, dtype=dtype, seed=seed)[0], every.to(dtype))
        halves = rounded([torch.ones(COUNT)], [torch.full((COUNT,), 3.0)], 0.5, dtype=dtype, seed=seed)[0]
        assert (halves == 2).all()


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_copies_and_stays_are_not_rounded_by_chance(backend, dtype):
    old, new = torch.randn(COUNT), torch.randn(COUNT)
    assert same_bits(rounded([old], [new], 0.0, dtype=dtype)[0], new.to(dtype))
    assert same_bits(rounded([old], [new], 1.0, dtype=dtype)[0], old.to(dtype))


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_infinite_and_nan(backend, dtype):
    inf, nan = torch.inf, torch.nan
    old = torch.tensor([inf, -inf, 1.0, 1.0, 1.0, nan, inf, 1.0])
    new = torch.tensor([1.0, 1.0, inf, -inf, nan, 1.0, inf, 1.5])
    if backend == "torch":  # where both are Inf, nearest rounding may give NaN, as torch.lerp does
        old[6] = new[6] = 1.0
    model = nn.ParameterList([old.clone()])
    nearest = EMA(model, 0.7, dtype=dtype)
    model[0].data.copy_(new)
    nearest.update()
    expected = averages(nearest)["0"].float()
    for seed in range(5):
        found = rounded([old], [new], 0.7, dtype=dtype, seed=seed)[0].float()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        assert torch.equal(found[found.isinf()], expected[expected.isinf()])


def test_a_nan_is_never_rounded_into_infinity():
    # A NaN whose payload lies in the bits that are cut off, and one that a carry would make a number.
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x007FFFFF, -1], dtype=torch.int64).to(torch.int32)
    for dtype in HALF:
        for seed in range(20):
            found = reference.round_stochastically(nans.view(torch.float32), dtype, seed * 2**31 + seed, 0)
            assert found.isnan().all()


# ---- The same bits from the kernel and from PyTorch


def without_extension(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(_native, "load", lambda: None)
        return call()


def three_steps(tensors, dtype, model_dtype=torch.float32, tie=False):
    """Averages of values in [1, 2) that move by quarters: arithmetic that is exact in float32."""
    model = nn.ParameterList([tensor.clone(memory_format=torch.preserve_format) for tensor in tensors])
    if tie:
        model[1] = model[0]
    ema = EMA(model.to(model_dtype), [0.75, 0.25], dtype=dtype, rounding="stochastic", seed=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            new = 1 + torch.rand(parameter.shape, generator=generator)
            parameter.data.copy_(new.bfloat16())
        ema.update()
    return [tensor for k in range(2) for tensor in averages(ema, k).values()]


@pytest.mark.skipif(_native.load() is None, reason="no native extension")
@pytest.mark.parametrize("dtype", HALF, ids=name)
@pytest.mark.parametrize(
    ("kind", "tie"),
    [
        ("plain", False),
        pytest.param("plain", True),
        pytest.param("strided", False),
    ],
)
def test_kernel_and_pytorch_agree(monkeypatch, dtype, kind, tie):
    tensors = [torch.ones(70, 9), torch.ones(70, 9), torch.ones(0, 3), torch.ones(()), torch.ones(66_001)]
    if kind == "strided":
        tensors[0], tensors[1] = torch.ones(9, 70).t(), torch.ones(70, 3, 3, 3).to(memory_format=torch.channels_last)
    for model_dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors[-1] = tensors[-1][: 66_001 if model_dtype == torch.float32 else 100]  # one block of PyTorch's, or two
        native = three_steps(tensors, dtype, model_dtype, tie)
        pure = without_extension(
            monkeypatch, lambda model_dtype=model_dtype: three_steps(tensors, dtype, model_dtype, tie)
        )
        assert all(map(same_bits, native, pure))


@pytest.mark.skipif(_native.load() is None, reason="no native extension")
@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_kernel_and_pytorch_agree_but_for_last_bits(monkeypatch, dtype):
    # PyTorch computes in float64: rarely the value before the rounding is another one.
    torch.manual_seed(0)
    old, new = [torch.randn(100_000)], [torch.randn(100_000)]
    native = rounded(old, new, 0.999, dtype=dtype)[0]
    pure = without_extension(monkeypatch, lambda: rounded(old, new, 0.999, dtype=dtype)[0])
    assert (native != pure).double().mean() < 1e-2


# ---- What it is for


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_moves_where_nearest_stands_still(backend, dtype):
    decay, steps = 0.999, 10_000
    if backend == "torch":
        decay, steps = 0.99, 700
        if dtype == torch.float16:
            pytest.skip("its steps would not round away at that decay")
    torch.manual_seed(0)
    model = nn.ParameterList([torch.rand(256) + 1])
    wide = EMA(model, decay)
    nearest = EMA(model, decay, dtype=dtype)
    stochastic = EMA(model, decay, dtype=dtype, rounding="stochastic")
    start = model[0].detach().clone()
    model[0].data.mul_(1.1)
    for _ in range(steps):
        for ema in (wide, nearest, stochastic):
            ema.update()
    way = (averages(wide)["0"] - start).norm()
    left = {
        ema: ((averages(ema)["0"].float() - averages(wide)["0"]).norm() / way).item() for ema in (nearest, stochastic)
    }
    assert left[nearest] > 0.9
    assert left[stochastic] < 0.05
    assert nearest.distance()["still"] > 0.95


@pytest.mark.parametrize("dtype", HALF, ids=name)
def test_follows_a_model_that_wanders(backend, dtype):
    """Within a few percent of the float32 average, of the way that the model went."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.rand(2048) + 1])
    start = model[0].detach().clone()
    wide, stochastic = EMA(model, 0.99), EMA(model, 0.99, dtype=dtype, rounding="stochastic")
    for _ in range(300):
        model[0].data.add_(0.002 + 0.01 * torch.randn(2048))
        wide.update(), stochastic.update()
    apart = averages(stochastic)["0"].double() - averages(wide)["0"].double()
    way = (averages(wide)["0"].double() - start.double()).mean()
    assert apart.mean().abs() < 0.01 * way, "biased"
    assert apart.square().mean().sqrt() < 0.05 * way + torch.finfo(dtype).eps


def test_only_real_averages_are_rounded(backend):
    model = nn.ParameterList([torch.randn(50, dtype=torch.complex64), torch.randn(50)])
    ema, plain = (EMA(model, 0.9, dtype=torch.bfloat16, rounding=rounding) for rounding in ("stochastic", "nearest"))
    assert averages(ema)["0"].dtype == torch.complex64
    for parameter in model:
        parameter.data.mul_(1.5)
    ema.update(), plain.update()
    assert same_bits(averages(ema)["0"], averages(plain)["0"])
    assert not same_bits(averages(ema)["1"], averages(plain)["1"])
