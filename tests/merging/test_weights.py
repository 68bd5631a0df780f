"""The weights of checkpoints, against the definitions of their sources."""

import math
from itertools import pairwise

import pytest
import torch

from fused_ema.merging import weights_of
from fused_ema.merging.weights import parsed
from fused_ema.posthoc import profiles
from fused_ema.schedules import gamma_of, power_function

RULES = ["mean", "linear", "ema:0.9", "wsm:linear", "wsm:cosine", "wsm:1-sqrt", "pma:sma", "pma:wma", "pma:ema:0.2"]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("rule", [*RULES, "power:0.1"])
def test_weights_sum_to_one_and_none_is_negative(rule, count):
    found = weights_of(rule, count)
    assert len(found) == count
    assert math.fsum(found) == pytest.approx(1, abs=1e-15 * count)
    assert min(found) >= 0


def test_simple_rules():
    assert weights_of("mean", 4) == weights_of("pma:sma", 4) == weights_of("wsm:linear", 4) == [0.25] * 4
    assert weights_of("linear", 4) == weights_of("pma:wma", 4) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-16)


def folded(values, decays):
    """The average after each checkpoint, step by step."""
    average = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize("times", [None, [10.0, 11.0, 20.0, 21.5, 40.0]])
def test_ema_is_the_recursion(times):
    spans = [b - a for a, b in pairwise(times or range(1, 6))]
    for j in range(5):
        value = folded([float(i == j) for i in range(5)], [0.9**span for span in spans])
        assert weights_of("ema:0.9", 5, times)[j] == pytest.approx(value, abs=1e-15)
    assert weights_of("pma:ema:0.2", 5) == pytest.approx(weights_of("ema:0.8", 5), abs=1e-15)
    assert weights_of("ema:0", 3) == [0, 0, 1]
    assert weights_of("ema:1", 3) == [1, 0, 0]


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: 0.5 + 0.5 * math.cos(math.pi * t)),
        ("1-sqrt", lambda t: 1 - t**0.5),
    ],
)
def test_wsm_gives_the_steps_between_checkpoints_the_decayed_weight(rule, decay):
    # A checkpoint is the first one plus all steps until then, so a step has the weight of all checkpoints after it.
    count = 10
    weights = weights_of(f"wsm:{rule}", count)
    for j in range(1, count):
        assert math.fsum(weights[j:]) == pytest.approx(decay(j / count), abs=1e-14)
    assert weights[0] == pytest.approx(1 - decay(1 / count), abs=1e-15)


def test_power_shares_are_those_of_the_schedule():
    schedule, after = power_function(0.1), 1.0
    found = weights_of("power:0.1", 50)
    for n in range(50, 0, -1):
        decay = schedule(n)
        assert found[n - 1] == pytest.approx((1 - decay) * after, abs=1e-14)
        after *= decay
    # A checkpoint in place of several updates has the shares of all of them.
    coarse = weights_of("power:0.1", 3, [20, 30, 50])
    assert coarse == pytest.approx([sum(found[:20]), sum(found[20:30]), sum(found[30:])], abs=1e-14)
    assert profiles.shares([20, 30, 50], gamma_of(0.1)).dtype == torch.float64


def test_numbers_are_divided_by_their_sum():
    assert weights_of([1, 2, 5], 3) == [0.125, 0.25, 0.625]
    assert weights_of([1, 1, -1], 3) == [1, 1, -1]
    assert weights_of(torch.tensor([1.0, 3.0]), 2) == [0.25, 0.75]
    assert weights_of((0.1,) * 10, 10) == [0.1] * 10


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("median", "expected numbers or one of mean, linear, .*found 'median'"),
        ("ema", "found 'ema'"),
        ("ema:", "found 'ema:'"),
        ("wsm", "wsm:1-sqrt.*found 'wsm'"),
        ("ema:x", "expected a number, found 'x'"),
        ("ema:1.5", r"decay: expected a value in \[0, 1\], found 1.5"),
        ("ema:nan", "found nan"),
        ("power:3", "sigma_rel"),
        ([1, 2], "expected 3, as many as checkpoints, found 2"),
        ([1, math.inf, 1], "expected finite numbers, found inf"),
        ([1, "2", 3], "expected finite numbers, found '2'"),
        ([1, -1, 0], "expected a sum above 0, found 0"),
    ],
)
def test_weights_refuse(weights, message):
    with pytest.raises(ValueError, match=message):
        weights_of(weights, 3)


@pytest.mark.parametrize(
    ("rule", "times", "message"),
    [
        ("mean", [1, 2, 3], "times: expected them with ema or power weights, found weights 'mean'"),
        ([1, 1, 1], [1, 2, 3], "found numbers as weights"),
        ("ema:0.9", [1, 2], "expected 3, as many as checkpoints, found 2"),
        ("ema:0.9", [1, 3, 2], r"rise from above 0, found \[1.0, 3.0, 2.0\]; sort"),
        ("power:0.1", [0, 1, 2], "rise from above 0"),
        ("power:0.1", [1, 2, math.inf], "times: expected finite numbers, found inf"),
        ("power:0.1", "123", "times: expected finite numbers, found '1'"),
    ],
)
def test_times_refuse(rule, times, message):
    with pytest.raises(ValueError, match=message):
        weights_of(rule, 3, times)


def test_what_a_user_types():
    assert parsed("ema:0.9") == "ema:0.9"
    assert parsed("0.2, 0.3,0.5") == [0.2, 0.3, 0.5]
    assert parsed("1e-3,2") == [0.001, 2]
