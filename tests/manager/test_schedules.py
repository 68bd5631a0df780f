"""Decay schedules: their formulas in 300 digits, refusals, and what a checkpoint keeps of them."""

import copy
import dataclasses
import io
import json
import math
import pickle
import struct
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fused_ema import schedules
from fused_ema.schedules import (
    as_schedule,
    constant,
    cosine,
    exponential_ramp,
    from_state,
    gamma_of,
    growing_half_life,
    half_life,
    inverse_power,
    power_function,
    sigma_rel_of,
    tf_warmup,
    to_state,
)

same_examples = settings(derandomize=True, max_examples=150, deadline=None)
EPS = 2.0**-52
WIDEST = math.sqrt(1 / 12)

units = st.sampled_from([0.0, 0.5, 0.9999, 1.0]) | st.floats(0, 1)
positives = st.floats(1e-3, 1e6) | st.floats(1e-100, 1e100)
widths = st.sampled_from([0.05, 0.1, WIDEST]) | st.floats(1e-5, WIDEST)
updates = st.integers(1, 20) | st.integers(1, 10**7) | st.integers(1, 2**62)
starts = st.integers(0, 10) | st.integers(0, 10**6)


@st.composite
def inverse_powers(draw):
    low, high = sorted([draw(units), draw(units)])
    return inverse_power(high, draw(positives), draw(positives), low, draw(starts))


@st.composite
def cosines(draw):
    low, high = sorted([draw(units), draw(units)])
    return cosine(draw(st.integers(1, 10) | st.integers(1, 10**7)), low, high)


KINDS = {
    constant: st.builds(constant, units),
    inverse_power: inverse_powers(),
    tf_warmup: st.builds(tf_warmup, units),
    exponential_ramp: st.builds(exponential_ramp, units, positives),
    half_life: st.builds(half_life, positives, positives),
    power_function: st.builds(power_function, widths),
    growing_half_life: st.builds(growing_half_life, positives),
    cosine: cosines(),
}
any_schedule = st.one_of(*KINDS.values())
ONE_OF_EACH = [
    constant(0.999),
    inverse_power(0.9999, 2.0, 0.75, 0.25, 100),
    tf_warmup(0.9999),
    exponential_ramp(0.9999, 500.0),
    half_life(500_000.0, 2048.0),
    power_function(0.1),
    growing_half_life(0.05),
    cosine(1000, 0.9, 0.9999),
]
each_schedule = pytest.mark.parametrize("schedule", ONE_OF_EACH, ids=lambda each: type(each).__name__)


def formula(s, n):
    """The decay at update n by the documented formulas, as a decimal."""
    one = Decimal(1)
    match s:
        case constant():
            return Decimal(s.D)
        case inverse_power():
            steps = max(0, n - s.start - 1)
            if steps == 0:
                return Decimal(0)
            grown = one - (-Decimal(s.power) * (one + steps / Decimal(s.gamma)).ln()).exp()
            return max(min(grown, Decimal(s.D)), Decimal(s.min))
        case tf_warmup():
            return min(Decimal(s.D), Decimal(1 + n) / Decimal(10 + n))
        case exponential_ramp():
            return Decimal(s.D) * (one - (-n / Decimal(s.tau)).exp())
        case half_life():
            return (-Decimal(s.interval) / Decimal(s.h) * Decimal(2).ln()).exp()
        case power_function():
            exponent = Decimal(s.gamma) + 1
            return (exponent * (one - one / n).ln()).exp() if n > 1 else Decimal(0)
        case growing_half_life():
            return (-one / (Decimal(s.fraction) * n) * Decimal(2).ln()).exp()
        case cosine():
            low, high = Decimal(s.min), Decimal(s.D)
            return high - (high - low) * (1 + cosine_of((n - 1) / Decimal(s.total))) / 2 if n <= s.total else high


def cosine_of(half_turns):
    """cos(pi·x) for x in [0, 1], as a decimal: the power series, with pi by Machin's formula."""

    def arctan_of_inverse(x):
        total = term = Decimal(1) / x
        for k in range(3, 2000, 2):
            term /= -x * x
            total += term / k
        return total

    angle = 4 * (4 * arctan_of_inverse(Decimal(5)) - arctan_of_inverse(Decimal(239))) * half_turns
    total = term = Decimal(1)
    for k in range(2, 400, 2):
        term *= -angle * angle / (k * (k - 1))
        total += term
    return total


# The values
# ----------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(st.data(), updates)
@same_examples
def test_formula(kind, data, n):
    schedule = data.draw(KINDS[kind])
    found = schedule(n)
    assert type(found) is float
    with localcontext() as context:
        context.prec = 300  # 1 - (1 + x)^-p needs that many for x and p of 1e-100
        expected = formula(schedule, n)
        slack = 4 * Decimal(EPS) * (1 + abs(expected.ln())) if expected else 0  # e^y: an error of y·eps is one of e^y
        assert abs(Decimal(found) - expected) <= expected * slack + Decimal("1e-300"), (found, float(expected))


# The plain formulas lose digits here: 1 - (1 + x)^-p and 1 - e^-x at a small x, (1 - 1/n)^(gamma + 1) at a large n.
@pytest.mark.parametrize(
    ("schedule", "n", "expected"),
    [
        (inverse_power(1.0, gamma=1e20, power=1.0), 2, 1e-20),
        (exponential_ramp(1.0, tau=1e20), 3, 3e-20),
        (power_function(1e-8), 10**20, 1 - (gamma_of(1e-8) + 1) * 1e-20),
        (power_function(1e-8), 10**10, math.exp(-(gamma_of(1e-8) + 1) * (1e-10 + 0.5e-20))),
        (half_life(1e18), 1, 1.0),
        (half_life(1e15), 1, 1 - math.log(2) * 1e-15),
    ],
)
def test_digits_kept(schedule, n, expected):
    assert schedule(n) == pytest.approx(expected, rel=4 * EPS, abs=0)


@given(any_schedule, updates, updates)
@same_examples
def test_bounded_and_never_falling(schedule, n, m):
    first, second = schedule(min(n, m)), schedule(max(n, m))
    assert 0.0 <= first <= 1.0
    assert 0.0 <= second <= 1.0
    assert first <= second * (1 + 4 * EPS)  # the C library's log1p and exp may fall by a rounding


@given(st.floats(0, 1) | st.sampled_from([-0.0, 5e-324, 1 - 2**-53]), updates)
@same_examples
def test_constant_returns_the_bits_it_was_given(decay, n):
    assert struct.pack("d", constant(decay)(n)) == struct.pack("d", decay)


def test_notable_values():
    warm = inverse_power(0.9999, start=5, min=0.5)
    assert [warm(n) for n in (1, 5, 6)] == [0.0, 0.0, 0.0], "copies, in spite of min"
    assert warm(7) == 0.5, "1 - 2**(-2/3) = 0.37 is below min"
    assert warm(10**12) == 0.9999
    # As timm's docstring has it: 0.999 at 31.6K steps, 0.9999 at 1M steps.
    assert inverse_power(1.0)(31_624) == pytest.approx(0.999, abs=1e-7)
    assert inverse_power(1.0)(1_000_001) == pytest.approx(0.9999, abs=1e-9)
    assert [tf_warmup(0.5)(n) for n in (1, 7, 8, 9)] == [2 / 11, 8 / 17, 0.5, 0.5]
    assert exponential_ramp(0.9999)(2000) == pytest.approx(0.9999 * (1 - 1 / math.e), rel=4 * EPS)
    assert [half_life(1)(1), half_life(1, 2)(9), half_life(4, 2)(1) ** 2] == [0.5, 0.25, pytest.approx(0.5, rel=EPS)]
    assert half_life(500_000, 2048)(1) ** (500_000 / 2048) == pytest.approx(0.5, rel=1e-13)
    assert power_function(0.05)(1) == 0.0
    assert growing_half_life()(1) == pytest.approx(2**-20, rel=4 * EPS), "hardly more than a copy"
    assert [growing_half_life(0.25)(n) for n in (4, 2)] == [0.5, 0.25]
    assert growing_half_life(1e-4)(1) == 0.0, "an underflow is no error"
    assert [cosine(100)(n) for n in (1, 101, 10**9)] == [0.996, 1.0, 1.0]
    assert cosine(100, 0.5, 0.9)(51) == pytest.approx(0.7, rel=2 * EPS)
    assert [cosine(1, 0.5)(n) for n in (1, 2)] == [0.5, 1.0]
    assert cosine(10**6)(10**6) < 1.0, "the last of them still moves"
    # As Karras et al. have it: 16.97 and 6.94 for widths of 5% and 10%.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("schedule", [inverse_power(1.0, power=1.0), power_function(WIDEST)])
def test_plain_mean(schedule):
    assert [schedule(n) for n in range(1, 500)] == pytest.approx([1 - 1 / n for n in range(1, 500)], rel=2 * EPS)


def test_per_step():
    assert [type(each).__name__ for each in ONE_OF_EACH if not each.per_step] == [
        "power_function",
        "growing_half_life",
    ]
    # The flag says that one decay over k steps equals k decays over one step.
    assert half_life(1000, 64)(1) == pytest.approx(half_life(1000, 8)(1) ** 8, rel=16 * EPS)


# The power function
# ------------------


@given(widths)
@example(1 / math.sqrt(12))  # one unit in the last place above sqrt(1/12)
@example(math.sqrt(3) / 6)
@example(1e-300)
@same_examples
def test_gamma_is_the_largest_root_correctly_rounded(sigma_rel):
    gamma = gamma_of(sigma_rel)
    t = 1 / Fraction(sigma_rel) ** 2

    def cubic(x):
        return x**3 + 7 * x**2 + (16 - t) * x + (12 - t)

    above = (Fraction(gamma) + Fraction(math.nextafter(gamma, math.inf))) / 2
    below = (Fraction(gamma) + Fraction(math.nextafter(gamma, -math.inf))) / 2
    # cubic(0) = 12 - t <= 0 and it is convex from there on: it has one root there, which is its largest.
    assert gamma >= 0.0
    assert cubic(above) >= 0
    assert cubic(below) <= 0 or gamma == 0.0
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=2 * EPS)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28])
def test_gamma_as_in_the_paper(sigma_rel):
    t = sigma_rel**-2
    assert gamma_of(sigma_rel) == pytest.approx(np.roots([1, 7, 16 - t, 12 - t]).real.max(), rel=1e-9)


@given(st.floats(0, 1e6))
@same_examples
def test_gamma_there_and_back(gamma):
    # sigma_rel changes by 1/6 of what gamma + 1 does at gamma 0, so a rounding of it is six of gamma's.
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=8 * EPS, abs=12 * EPS)


def test_sigma_rel_of():
    assert sigma_rel_of(0.0) == pytest.approx(12**-0.5, rel=EPS)
    assert sigma_rel_of(1) == pytest.approx(18**-0.5, rel=EPS)
    assert sigma_rel_of(1e300) == pytest.approx(1e-300, rel=EPS), "without an overflow on the way"


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, WIDEST])
def test_power_function_profile(sigma_rel):
    schedule, n = power_function(sigma_rel), 120
    average = torch.full((n,), 1e300, dtype=torch.float64)
    for t in range(1, n + 1):  # each model is another unit vector, so the average holds their weights
        average = average * schedule(t) + (1 - schedule(t)) * torch.eye(n, dtype=torch.float64)[t - 1]
    edges = (torch.arange(n + 1, dtype=torch.float64) / n) ** (gamma_of(sigma_rel) + 1)
    torch.testing.assert_close(average, edges.diff(), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, WIDEST])
def test_power_function_is_as_wide_as_it_says(sigma_rel):
    schedule, n = power_function(sigma_rel), 20_000
    mean = square = 0.0
    for t in range(1, n + 1):  # the averages of t and t² with these decays
        decay = schedule(t)
        mean = decay * mean + (1 - decay) * t
        square = decay * square + (1 - decay) * t * t
    assert math.sqrt(square - mean**2) / n == pytest.approx(sigma_rel, rel=1e-6)


def test_gamma_is_solved_once(monkeypatch):
    schedule, expected = power_function(0.1), power_function(0.1)(7)
    assert schedule(7) == expected
    monkeypatch.setattr(schedules, "gamma_of", None)
    assert schedule(7) == expected
    assert pickle.loads(pickle.dumps(schedule))(7) == expected


# Refusals
# --------

NAN, INF = math.nan, math.inf
UNIT, POSITIVE = "[0, 1]", "a finite value > 0"


@pytest.mark.parametrize(
    ("name", "make", "wrong", "expected"),
    [
        ("D", constant, (-1e-9, 1.0000001, 2, NAN, INF, -INF, 10**400), UNIT),
        ("D", inverse_power, (-0.1, 1.1, NAN), UNIT),
        ("D", tf_warmup, (-0.1, 1.1, NAN), UNIT),
        ("D", exponential_ramp, (-0.1, 1.1, NAN), UNIT),
        ("min", lambda x: inverse_power(0.9, min=x), (-0.1, 1.1, NAN), UNIT),
        ("min", lambda x: inverse_power(0.9, min=x), (0.91, 1.0), "[0, D], where D is 0.9"),
        ("gamma", lambda x: inverse_power(0.9, gamma=x), (0, -1.0, NAN, INF, 10**400), POSITIVE),
        ("power", lambda x: inverse_power(0.9, power=x), (0.0, -1.0, NAN, INF), POSITIVE),
        ("start", lambda x: inverse_power(0.9, start=x), (-1, 1.5, 5.0, NAN, INF), "an integer >= 0"),
        ("tau", lambda x: exponential_ramp(0.9, tau=x), (0.0, -1.0, NAN, INF), POSITIVE),
        ("h", half_life, (0, -1.0, NAN, INF), POSITIVE),
        ("interval", lambda x: half_life(1.0, interval=x), (0, -1.0, NAN, INF), POSITIVE),
        ("fraction", growing_half_life, (0, -1.0, NAN, INF), POSITIVE),
        ("total", cosine, (0, -1, 1.5, 5.0, NAN, INF), "an integer >= 1"),
        ("min", lambda x: cosine(5, x), (-0.1, 1.1, NAN), UNIT),
        ("min", lambda x: cosine(5, x, 0.9), (0.91, 1.0), "[0, D], where D is 0.9"),
        ("D", lambda x: cosine(5, 0.5, x), (-0.1, 1.1, NAN), UNIT),
        ("sigma_rel", power_function, (0.0, -0.1, 0.2887, 0.3, 1.0, NAN, INF, 5e-324), "(0, 1/sqrt(12) = 0.2887]"),
        ("sigma_rel", gamma_of, (0.0, -0.1, 0.2887, NAN, INF), "(0, 1/sqrt(12) = 0.2887]"),
        ("gamma", sigma_rel_of, (-0.1, -1.0, NAN, INF), "a finite value >= 0"),
        ("decay", as_schedule, (-0.1, 1.1, NAN, 2), UNIT),
    ],
)
def test_values_refused(name, make, wrong, expected):
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: ") as caught:
            make(value)
        assert expected in str(caught.value)
        assert f"found {'inf' if value == 10**400 else value}" in str(caught.value)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], torch.tensor(0.5), 0.5j, np.array([0.5])], ids=repr)
def test_types_refused(value):
    makers = {
        "D": constant,
        "start": lambda x: inverse_power(0.9, start=x),
        "h": half_life,
        "sigma_rel": power_function,
        "gamma": sigma_rel_of,
        "decay": as_schedule,
    }
    for name, make in makers.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a number.*, found {type(value).__name__}"):
            make(value)


@each_schedule
def test_updates_before_the_first_refused(schedule):
    for n in (0, -1, -(10**20)):
        with pytest.raises(ValueError, match=f"^n: .*found {n}$"):
            schedule(n)
    for n in (1.0, NAN, "1", None):
        with pytest.raises(TypeError):
            schedule(n)


# Objects
# -------


@given(any_schedule, updates)
@same_examples
def test_copies_are_equal(schedule, n):
    decay = schedule(n)
    copies = [pickle.loads(pickle.dumps(schedule, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    copies += [copy.copy(schedule), copy.deepcopy(schedule), eval(repr(schedule), vars(schedules))]
    copies += [from_state(json.loads(json.dumps(to_state(schedule))))]
    for each in copies:
        assert type(each) is type(schedule)
        assert each == schedule
        assert hash(each) == hash(schedule)
        assert each(n) == decay


@given(any_schedule, any_schedule)
@same_examples
def test_equal_only_with_equal_arguments(one, other):
    assume(repr(one) != repr(other) and "-0.0" not in repr(one) + repr(other))
    assert one != other


@each_schedule
def test_frozen(schedule):
    field = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 0.5)


def test_numbers_are_kept_as_plain_ones():
    schedule = inverse_power(np.float32(0.75), np.int64(2), 1, Fraction(1, 4), np.int32(3))
    assert schedule == inverse_power(0.75, 2.0, 1.0, 0.25, 3)
    assert repr(schedule) == "inverse_power(D=0.75, gamma=2.0, power=1.0, min=0.25, start=3)"
    assert [type(value) for value in vars(schedule).values()] == [float] * 4 + [int]
    assert inverse_power(0.9, start=2**60 + 1).start == 2**60 + 1, "not by way of a float"


@each_schedule
def test_update_numbers_of_numpy_and_torch(schedule):
    for n in (np.int64(200), np.int32(200), torch.tensor(200)):
        assert schedule(n) == schedule(200)
        assert type(schedule(n)) is float


def test_as_schedule():
    for number in (0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert as_schedule(number) == constant(0.5)
        assert type(as_schedule(number).D) is float
    assert [as_schedule(0), as_schedule(1), as_schedule(np.int64(1))] == [constant(0.0), constant(1.0), constant(1.0)]
    for schedule in (*ONE_OF_EACH, lambda n: 0.5, math.sqrt):
        assert as_schedule(schedule) is schedule
    with pytest.raises(TypeError, match=r"^decay: .*found the class inverse_power; call it first"):
        as_schedule(inverse_power)


# State
# -----


def test_states():
    assert to_state(inverse_power(0.9999, start=7)) == {
        "name": "inverse_power",
        "D": 0.9999,
        "gamma": 1.0,
        "power": 2 / 3,
        "min": 0.0,
        "start": 7,
    }
    solved = power_function(0.1)
    solved(5)
    assert to_state(solved) == {"name": "power_function", "sigma_rel": 0.1}, "arguments alone, not what is cached"


@each_schedule
def test_states_pass_weights_only(schedule):
    file = io.BytesIO()
    torch.save(to_state(schedule), file)
    file.seek(0)
    assert from_state(torch.load(file, weights_only=True)) == schedule


def test_other_callables_are_kept_as_text():
    class constant(schedules.constant):  # not what from_state would make of the name
        pass

    for each in (lambda n: 0.5, math.sqrt, constant(0.5)):
        assert to_state(each) == repr(each)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("<function decay at 0x7f>", ["constant", "power_function", "<function decay at 0x7f>"]),
        ({}, ["constant", "{}"]),
        (None, ["constant", "None"]),
        ({"D": 0.5}, ["name", "constant", "{'D': 0.5}"]),
        ({"name": "linear", "D": 0.5}, ["constant", "'linear'"]),
        ({"name": ["constant"], "D": 0.5}, ["constant", "['constant']"]),
        ({"name": "constant"}, ["constant", "expected ['D'], found []"]),
        ({"name": "half_life", "h": 1.0}, ["half_life", "expected ['h', 'interval'], found ['h']"]),
        ({"name": "constant", "D": 0.5, "tau": 1.0}, ["constant", "expected ['D'], found ['D', 'tau']"]),
        ({"name": "constant", "D": 0.5, 3: 1.0}, ["constant", "expected ['D'], found ['3', 'D']"]),
        ({"name": "power_function", "sigma_rel": 0.1, "gamma": 6.9}, ["power_function", "gamma"]),
        ({"name": "constant", "D": 1.5}, ["constant", "D: ", "1.5"]),
        ({"name": "constant", "D": "0.5"}, ["constant", "D: ", "str"]),
        ({"name": "half_life", "h": None, "interval": 1.0}, ["half_life", "h: ", "NoneType"]),
    ],
)
def test_states_refused(state, words):
    with pytest.raises(ValueError, match=r"^schedule") as caught:
        from_state(state)
    for word in words:
        assert word in str(caught.value)
