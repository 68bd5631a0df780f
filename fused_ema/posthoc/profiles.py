"""How to combine averages of some lengths into one of another length.

After t updates, a power_function average is the integral over 0 < s <= t of the weights times the profile
p(s) = (gamma + 1)·s^gamma / t^(gamma + 1), where the weights between s = i - 1 and s = i are those of update i. This is
exact: the decays (1 - 1/n)^(gamma + 1) leave update i a share of (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1).
So the coefficients that combine the profiles of the snapshots into the wanted profile also combine the tensors. The
coefficients x that minimize ∫ (Σ x[k]·p[k] - p)² solve A·x = b, where A and b hold inner products of profiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Numbers: TypeAlias = Sequence[float] | Tensor


def solve_weights(times: Numbers, gammas: Numbers, time: float, gamma: float) -> Tensor:
    """The weights for which Σ weights[k]·average[k] is nearest to the wanted average.

    Solves A·x = b in float64, where A[k, l] is the inner product of the profiles k and l, and b[k] that of profile k
    and the wanted one. Then x is scaled to sum to 1, as the shares in an average do. Profiles are scaled to norm 1
    before, and singular values of A below 1e-12 of the largest count as 0: equal averages share their weight, which
    would otherwise be a quotient of rounding errors. (256 snapshots of 0.05 and 0.10, evenly spread, stay above 1e-8.)
    If the wanted average is among the given ones, its weight is exactly 1.

    Args:
        times: the number of updates after which each average was taken, > 0.
        gammas: the exponent of each average's profile, >= 0; see `schedules.gamma_of`.
        time: the number of updates after which the wanted average is taken, > 0.
        gamma: the exponent of its profile, >= 0.

    Returns:
        A float64 weight per average, on the CPU.

    Raises:
        ValueError: times and gammas are empty, differ in length, or are out of range; or no average has weight where
            the wanted one has.
    """
    wanted, given = profiles([time], [gamma]), profiles(times, gammas)
    same = (given[0] == wanted[0]) & (given[1] == wanted[1])
    if same.any():
        return torch.zeros_like(given[0]).index_fill_(0, same.nonzero()[0], 1.0)
    a, b, scale = normal_equations(*given, *wanted)
    x: Tensor = torch.linalg.lstsq(a, b[:, None], rcond=1e-12, driver="gelsd").solution[:, 0] / scale
    if not x.sum() > 0:
        raise ValueError(f"no average has weight where the wanted one, of gamma {gamma} after {time} updates, has it")
    return x / x.sum()


def profile_error(times: Numbers, gammas: Numbers, time: float, gamma: float) -> float:
    """‖Σ x[k]·p[k] - p‖ / ‖p‖, in L2, with x from `solve_weights`; 1e-8 is rounding.

    If the weights were independent noise at each update, this would be the error of the reconstruction relative to the
    noise that is left in the wanted average. Weights that change slowly are reconstructed better than that, relative to
    how far they move. For a folder::

        found = snapshots(folder)
        times = [each.updates for each in found for _ in each.sigma_rels]
        gammas = [gamma_of(sigma_rel) for each in found for sigma_rel in each.sigma_rels]
        profile_error(times, gammas, found[-1].updates, gamma_of(0.15))
    """
    a, b, scale = normal_equations(*profiles(times, gammas), *profiles([time], [gamma]))
    x = solve_weights(times, gammas, time, gamma) * scale
    return math.sqrt(max(0.0, float(x @ a @ x - 2 * (b @ x) + 1)))


def inner_product(time_a: Tensor, gamma_a: Tensor, time_b: Tensor, gamma_b: Tensor) -> Tensor:
    """∫ p_a·p_b over 0 < s <= the earlier time. It may underflow, since profiles can be steep, but not overflow."""
    earlier, later = torch.minimum(time_a, time_b), torch.maximum(time_a, time_b)
    exponent = torch.where(time_a < time_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (earlier / later) ** exponent / later


def normal_equations(t: Tensor, g: Tensor, time: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A and b for profiles scaled to norm 1, and the norms they had before, relative to the wanted profile's."""
    norms, norm = inner_product(t, g, t, g).sqrt(), inner_product(time, gamma, time, gamma).sqrt()
    a = inner_product(t[:, None], g[:, None], t, g) / norms[:, None] / norms
    return a, inner_product(t, g, time, gamma) / norms / norm, norms / norm


def profiles(times: Numbers, gammas: Numbers) -> tuple[Tensor, Tensor]:
    """Times and exponents as two float64 vectors, checked."""
    t, g = (torch.as_tensor(each, dtype=torch.float64, device="cpu") for each in (times, gammas))
    if t.ndim != 1 or t.shape != g.shape or not t.numel():
        raise ValueError(f"expected as many times as gammas, 1 or more, found shapes {[*t.shape]} and {[*g.shape]}")
    if not (t.isfinite() & g.isfinite() & (t > 0) & (g >= 0)).all():
        raise ValueError(f"expected finite times > 0 and gammas >= 0, found {t.tolist()} and {g.tolist()}")
    return t, g
