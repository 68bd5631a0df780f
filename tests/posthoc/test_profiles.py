"""The mathematics of post-hoc averages, against other ways to compute it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot_stub import BASE, TARGETS, even

from fused_ema.posthoc import profile_error, profiles, solve_weights
from fused_ema.schedules import gamma_of


def shares(times, gammas, total):
    """The share of each of `total` updates in each average, one column per average, computed from the decays."""
    columns = np.zeros((total, len(times)))
    for k, (time, gamma) in enumerate(zip(times, gammas, strict=True)):
        after = 1.0
        for i in range(int(time), 0, -1):
            decay = (1 - 1 / i) ** (gamma + 1)
            columns[i - 1, k] = (1 - decay) * after
            after *= decay
    return columns


@pytest.mark.parametrize("ta", [1.0, 7.0, 1000.0])
@pytest.mark.parametrize("tb", [1.0, 7.5, 990.0])
@pytest.mark.parametrize(("ga", "gb"), [(16.97, 6.94), (6.94, 16.97), (3.0, 3.0), (0.5, 40.0)])
def test_inner_products_are_the_integrals(ta, tb, ga, gb):
    nodes, factors = np.polynomial.legendre.leggauss(100)
    s = (nodes + 1) / 2 * min(ta, tb)
    product = (ga + 1) * s**ga / ta ** (ga + 1) * (gb + 1) * s**gb / tb ** (gb + 1)
    tensors = (torch.tensor(each, dtype=torch.float64) for each in (ta, ga, tb, gb))
    assert float(profiles.inner_product(*tensors)) == pytest.approx(
        (product * factors).sum() * min(ta, tb) / 2, rel=1e-7
    )


@pytest.mark.parametrize("count", [2, 8, 16])
@pytest.mark.parametrize("sigma_rel", TARGETS)
def test_weights_and_error_match_sampled_profiles(count, sigma_rel):
    # Least squares over the profiles sampled at 8192 updates, without inner products or normal equations.
    total = 8192
    times, gammas = even(count, total)
    columns, wanted = shares(times, gammas, total), shares([total], [gamma_of(sigma_rel)], total)[:, 0]
    x = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    x /= x.sum()
    weights = solve_weights(times, gammas, total, gamma_of(sigma_rel)).numpy()
    assert np.abs(weights - x).max() < 1e-3 * np.abs(x).max()
    error = np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted)
    assert profile_error(times, gammas, total, gamma_of(sigma_rel)) == pytest.approx(error, rel=1e-3)


def test_errors_in_the_papers_setting():
    # The paper keeps 0.05 and 0.10 and finds that few snapshots suffice; EDM2 reconstructs 0.01 to 0.25 from them.
    # The numbers were measured with this package; the test above checks that they are right.
    expected = {  # snapshots: the error for each of TARGETS
        8: [0.1009, 0.0308, 0.0135, 0.0333, 0.0779, 0.182],
        16: [0.0387, 0.0101, 0.00379, 0.00899, 0.0233, 0.0793],
        64: [0.00290, 0.000709, 0.000246, 0.000578, 0.00171, 0.0146],
        256: [0.000183, 0.0000451, 0.0000154, 0.0000362, 0.000113, 0.00268],
    }
    found = {n: [profile_error(*even(n), 1.0, gamma_of(sigma_rel)) for sigma_rel in TARGETS] for n in expected}
    for n, errors in expected.items():
        assert found[n] == pytest.approx(errors, rel=0.02)
    assert all(a > b > c > d for a, b, c, d in zip(*found.values(), strict=True))
    # One average instead of two is far worse.
    times, gammas = even(64)
    assert profile_error(times[::2], gammas[::2], 1.0, gamma_of(0.15)) > 50 * found[64][3]


def test_a_wanted_average_among_the_snapshots_gets_all_the_weight():
    times, gammas = even(64, 6400)
    for k in (0, 31, 64, 126, 127):
        weights = solve_weights(times, gammas, times[k], gammas[k])
        assert weights.dtype == torch.float64
        assert weights.tolist() == [float(i == k) for i in range(128)]
        assert profile_error(times, gammas, times[k], gammas[k]) < 1e-7
    # Least squares find it too; the shortcut only removes the rounding.
    nearly = solve_weights(times, gammas, times[127], gammas[127] * (1 + 1e-13))
    assert (nearly - torch.eye(128, dtype=torch.float64)[127]).abs().max() < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_equal_averages_share_their_weight(sigma_rel):
    times, gammas = even(8, 800)
    once = solve_weights(times, gammas, 800, gamma_of(sigma_rel))
    thrice = solve_weights(times * 3, gammas * 3, 800, gamma_of(sigma_rel)).view(3, 16)
    assert (thrice - once / 3).abs().max() < 1e-9 * once.abs().max()


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    times=st.lists(st.integers(1, 10**6), min_size=1, max_size=12),
    near=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    sigma_rel=st.floats(0.02, 0.28),
)
def test_weights_stay_small_whatever_the_times(times, near, sigma_rel):
    # Times repeat or nearly do; without the cutoff, float64 solutions of the system reach 1e10 and more.
    times = times + [max(times) - min(each, max(times) - 1) for each in near] + times[:3]
    both_times, gammas = [t for t in times for _ in BASE], [gamma_of(sigma_rel) for sigma_rel in BASE] * len(times)
    weights = solve_weights(both_times, gammas, max(times), gamma_of(sigma_rel))
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    assert weights.abs().sum() < 1000
    assert profile_error(both_times, gammas, max(times), gamma_of(sigma_rel)) < 2


def test_singular_values_stay_above_the_cutoff():
    times, gammas = even(256)
    a, *_ = profiles.normal_equations(*profiles.profiles(times, gammas), *profiles.profiles([1.0], [1.0]))
    values = torch.linalg.eigvalsh(a)
    assert values[0] > 1e-8 * values[-1]  # as the docstring says


@pytest.mark.parametrize(
    ("times", "gammas", "message"),
    [
        ([], [], "1 or more"),
        ([1.0], [1.0, 2.0], r"\[1\] and \[2\]"),
        ([1.0, 0.0], [1.0, 1.0], "times > 0"),
        ([1.0, math.nan], [1.0, 1.0], "finite"),
        ([1.0, 1.0], [1.0, -0.1], "gammas >= 0"),
        ([1.0], [300.0], "no average has weight"),  # 1e-6 ** 300
    ],
)
def test_weights_refuse(times, gammas, message):
    for function in (solve_weights, profile_error):
        with pytest.raises(ValueError, match=message):
            function(times, gammas, 1e6, 300.0)
