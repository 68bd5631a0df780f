"""Post-hoc averages: the mathematics against other ways to compute it, reconstruction against direct averaging, and
snapshots that are complete or not there."""

import copy
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import fused_ema
from fused_ema import posthoc
from fused_ema.posthoc import profile_error, reconstruct, save_snapshot, snapshots, solve_weights
from fused_ema.schedules import constant, gamma_of, power_function, sigma_rel_of, to_state

safetensors_torch = pytest.importorskip("safetensors.torch")

BASE = (0.05, 0.10)  # the paper's choice
TARGETS = (0.03, 0.04, 0.07, 0.15, 0.20, 0.25)


class Stub:
    """As much of a manager as a snapshot needs."""

    def __init__(self, updates, *averages, schedules=BASE, step=None):
        self._loaded_updates, self._run_id = 0, "stub"
        self.state = {
            "step": updates if step is None else step,
            "updates": updates,
            "update_after_step": 0,
            "schedules": [
                each if isinstance(each, (dict, str)) else to_state(power_function(each)) for each in schedules
            ],
            "averages": list(averages),
        }

    def state_dict(self):
        return self.state


def both(tensor):
    return {"w": tensor}, {"w": tensor + 1}


def even(count, total=1.0):
    """times, gammas: `count` snapshots of BASE, evenly spread."""
    times = [total * (i + 1) / count for i in range(count) for _ in BASE]
    return times, [gamma_of(sigma_rel) for sigma_rel in BASE] * count


def shares(times, gammas, total):
    """What each of `total` updates has in each average, one column each: from the decays, not from a formula."""
    columns = np.zeros((total, len(times)))
    for k, (time, gamma) in enumerate(zip(times, gammas, strict=True)):
        after = 1.0
        for i in range(int(time), 0, -1):
            decay = (1 - 1 / i) ** (gamma + 1)
            columns[i - 1, k] = (1 - decay) * after
            after *= decay
    return columns


# ---- The mathematics


@pytest.mark.parametrize("ta", [1.0, 7.0, 1000.0])
@pytest.mark.parametrize("tb", [1.0, 7.5, 990.0])
@pytest.mark.parametrize(("ga", "gb"), [(16.97, 6.94), (6.94, 16.97), (3.0, 3.0), (0.5, 40.0)])
def test_inner_products_are_the_integrals(ta, tb, ga, gb):
    nodes, factors = np.polynomial.legendre.leggauss(100)
    s = (nodes + 1) / 2 * min(ta, tb)
    product = (ga + 1) * s**ga / ta ** (ga + 1) * (gb + 1) * s**gb / tb ** (gb + 1)
    tensors = (torch.tensor(each, dtype=torch.float64) for each in (ta, ga, tb, gb))
    assert float(posthoc._inner(*tensors)) == pytest.approx((product * factors).sum() * min(ta, tb) / 2, rel=1e-7)


@pytest.mark.parametrize("count", [2, 8, 16])
@pytest.mark.parametrize("sigma_rel", TARGETS)
def test_weights_and_error_are_those_of_the_profiles_themselves(count, sigma_rel):
    # Least squares with the profiles, sampled at 8192 updates, as columns: no inner products, no normal equations.
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
    # The rows are ours, measured; the test above says that they are right.
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


def test_the_wanted_average_among_the_snapshots_is_taken_as_it_is():
    times, gammas = even(64, 6400)
    for k in (0, 31, 64, 126, 127):
        weights = solve_weights(times, gammas, times[k], gammas[k])
        assert weights.dtype == torch.float64
        assert weights.tolist() == [float(i == k) for i in range(128)]
        assert profile_error(times, gammas, times[k], gammas[k]) < 1e-7
    # Without the shortcut, least squares find it too: it only removes the rounding.
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
    # Repeated and nearly equal times; float64 solutions of the system as it stands reach 1e10 and more here.
    times = times + [max(times) - min(each, max(times) - 1) for each in near] + times[:3]
    both_times, gammas = [t for t in times for _ in BASE], [gamma_of(sigma_rel) for sigma_rel in BASE] * len(times)
    weights = solve_weights(both_times, gammas, max(times), gamma_of(sigma_rel))
    assert weights.sum().item() == pytest.approx(1, abs=1e-9)
    assert weights.abs().sum() < 1000
    assert profile_error(both_times, gammas, max(times), gamma_of(sigma_rel)) < 2


def test_how_singular_it_gets():
    times, gammas = even(256)
    a, *_ = posthoc._system(*posthoc._profiles(times, gammas), *posthoc._profiles([1.0], [1.0]))
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


# ---- Reconstruction, against direct averaging in float64

STEPS, SIZE = 1024, 2048


def trajectory(kind):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(STEPS, SIZE, dtype=torch.float64, generator=generator)
    if kind == "noise":
        return noise + 3
    trend = torch.linspace(0, 3, STEPS, dtype=torch.float64)[:, None] ** 0.5
    return noise.cumsum(0) / STEPS**0.5 + trend * noise[0] + 0.1 * noise.flip(0)


@pytest.fixture(scope="module", params=["noise", "walk"])
def run(request, tmp_path_factory):
    """The weights at each update, their averages for all of BASE and TARGETS after each, and 64 snapshots of BASE."""
    theta = trajectory(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    sigma_rels = BASE + TARGETS
    exponents = torch.tensor([gamma_of(each) + 1 for each in sigma_rels], dtype=torch.float64)[:, None]
    averages = torch.zeros(len(sigma_rels), SIZE, dtype=torch.float64)
    direct = {}
    for n in range(1, STEPS + 1):
        averages.lerp_(theta[n - 1].expand_as(averages), 1 - (1 - 1 / n) ** exponents)
        if n % 16 == 0:
            direct[n] = dict(zip(sigma_rels, averages.clone(), strict=True))
            save_snapshot(folder, Stub(n, *({"w": averages[k].view(2, -1)} for k in range(2))))
    return request.param, theta, direct, folder


@pytest.mark.parametrize("sigma_rel", TARGETS)
@pytest.mark.parametrize("every", [1, 8])  # all 64 snapshots, or 8 of them
@pytest.mark.parametrize("time", [STEPS, STEPS // 2])
def test_reconstruction_is_the_direct_average(run, tmp_path, sigma_rel, every, time):
    kind, theta, direct, folder = run
    for each in snapshots(folder)[every - 1 :: every]:
        (tmp_path / each.path.name).symlink_to(each.path)
    used = [each for each in snapshots(tmp_path) if each.updates <= time]
    assert len(used) == time // 16 // every
    times, gammas = [each.updates for each in used for _ in BASE], [gamma_of(each) for each in BASE] * len(used)
    expected_error = profile_error(times, gammas, time, gamma_of(sigma_rel))
    if expected_error > 0.25:
        with pytest.warns(UserWarning, match="error of"):
            found = reconstruct(tmp_path, sigma_rel, updates=time, dtype=torch.float64)["w"]
    else:
        found = reconstruct(tmp_path, sigma_rel, updates=time, dtype=torch.float64)["w"]
    assert found.shape == (2, SIZE // 2)
    wanted = direct[time][sigma_rel]
    error = found.view(-1) - wanted

    # Cauchy and Schwarz: no larger for any weights.
    norm = math.sqrt((gamma_of(sigma_rel) + 1) ** 2 / (2 * gamma_of(sigma_rel) + 1) / time)
    spread = (theta[:time] - theta[:time].mean(0)).square().sum(0).sqrt()
    assert (error.abs() <= expected_error * norm * spread + 1e-12).all()
    if kind == "noise":  # then profile_error is the error relative to the noise, within the sampling of both
        relative = (error.square().mean() / (wanted - 3).square().mean()).sqrt().item()
        assert relative == pytest.approx(expected_error, rel=0.1)
    else:  # and slow changes are met better, relative to how far they go
        relative = (error.square().mean() / theta[:time].var(0).mean()).sqrt().item()
        assert relative < 0.6 * expected_error


def test_an_average_of_the_snapshots_comes_back_bitwise(run):
    _, _, direct, folder = run
    for sigma_rel in BASE:
        for time in (16, 512, STEPS):
            found = reconstruct(folder, sigma_rel, updates=time, dtype=torch.float64)["w"].view(-1)
            assert torch.equal(found, direct[time][sigma_rel])


def test_snapshots_in_order(run):
    folder = run[3]
    found = snapshots(folder)
    assert [each.updates for each in found] == list(range(16, STEPS + 1, 16))
    assert found[0] == (folder / "ema-0000000016.safetensors", 16, 16, BASE)


def test_updates_between_and_outside(run):
    folder = run[3]
    with pytest.raises(ValueError, match=f"updates: expected 16 to {STEPS}, .* found {STEPS + 1}"):
        reconstruct(folder, 0.07, updates=STEPS + 1)
    with pytest.raises(ValueError, match="expected 16 to"):
        reconstruct(folder, 0.07, updates=15)
    with pytest.warns(UserWarning, match=r"sigma_rel 0.07 after 1016 updates .* error of \d\d%"):
        reconstruct(folder, 0.07, updates=STEPS - 8)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_snapshots_in_fewer_bits(run, tmp_path, stored):
    _, _, direct, folder = run
    for time in range(64, STEPS + 1, 64):
        save_snapshot(tmp_path, Stub(time, *({"w": direct[time][each]} for each in BASE)), dtype=stored)
    content = safetensors_torch.load_file(snapshots(tmp_path)[-1].path)
    assert {each.dtype for each in content.values()} == {stored}
    exact = tmp_path / "exact"
    for each in snapshots(folder)[3::4]:
        exact.mkdir(exist_ok=True)
        (exact / each.path.name).symlink_to(each.path)
    found, wanted = (reconstruct(each, 0.07, dtype=torch.float64)["w"].view(-1) for each in (tmp_path, exact))
    largest = max(direct[time][each].abs().max() for time in direct for each in BASE)
    weights = solve_weights(*even(16, STEPS), STEPS, gamma_of(0.07))
    bound = torch.finfo(stored).eps / 2 * largest * weights.abs().sum()
    assert 0 < (found - wanted).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_dtype_is_one_cast(run, dtype):
    folder = run[3]
    found = reconstruct(folder, 0.07, dtype=dtype)["w"]
    assert found.dtype == dtype
    assert torch.equal(found, reconstruct(folder, 0.07, dtype=torch.float64)["w"].to(dtype))
    assert reconstruct(folder, 0.07)["w"].dtype == torch.float32


def test_arguments_out_of_range(run):
    folder = run[3]
    with pytest.raises(ValueError, match="sigma_rel"):
        reconstruct(folder, 0.3)
    with pytest.raises(ValueError, match="dtype: expected float64"):
        reconstruct(folder, 0.07, dtype=torch.int32)


# ---- What is stored


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 4, generator=generator)
    return {
        "last in the alphabet": base.clone(),
        "a/b.c": torch.randn((), generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "expanded": torch.randn(1, 3, generator=generator).expand(5, 3),
        "overlapping 1": base[:4],
        "overlapping 2": base[2:],
        "same memory, other shape": base.view(-1),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0, 3),
        "double": torch.randn(3, generator=generator).double(),
        "bfloat16": torch.randn(3, generator=generator).bfloat16(),
        "complex64": torch.randn(3, 2, dtype=torch.complex64, generator=generator),
        "complex128": torch.randn((), dtype=torch.complex128, generator=generator),
        "conjugate": torch.randn(3, dtype=torch.complex64, generator=generator).conj(),
        "complex empty": torch.zeros(0, dtype=torch.complex64),
    }


def test_every_kind_of_tensor(tmp_path, tensors):
    save_snapshot(tmp_path, Stub(10, tensors, {name: tensor * 2 for name, tensor in tensors.items()}))
    save_snapshot(tmp_path, Stub(20, {name: tensor * 4 for name, tensor in tensors.items()}, tensors))
    for sigma_rel, updates, factor in ((0.05, 10, 1), (0.10, 10, 2), (0.05, 20, 4), (0.10, 20, 1)):
        found = reconstruct(tmp_path, sigma_rel, updates=updates, dtype=torch.float64)
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            assert found[name].dtype == wide
            assert torch.equal(found[name], (tensor * factor).to(wide)), name
    for dtype in (torch.float16, torch.float32):
        complexes = [each for each in reconstruct(tmp_path, 0.07, dtype=dtype).values() if each.is_complex()]
        assert [each.dtype for each in complexes] == [torch.complex64] * 4
    combined = reconstruct(tmp_path, 0.07, dtype=torch.float64)
    weights = solve_weights(*even(2, 20), 20, gamma_of(0.07))
    factor = (weights * torch.tensor([1.0, 2, 4, 1], dtype=torch.float64)).sum()
    for name in ("complex64", "complex128", "transposed"):
        assert (combined[name] - tensors[name].to(combined[name].dtype) * factor).abs().max() < 1e-14


def test_ties_are_stored_once_and_come_back_under_all_names(tmp_path):
    w, v = torch.arange(1000.0), torch.arange(1000.0) * 2
    path = save_snapshot(tmp_path, Stub(10, {"a": w, "b": w, "c": w.clone()}, {"a": v, "b": v, "c": v.clone()}))
    assert sorted(safetensors_torch.load_file(path)) == ["0/a", "0/c", "1/a", "1/c"]
    assert path.stat().st_size < 4 * 4000 + 1000
    # Tied in one average only: not tied. Untied in a later snapshot.
    save_snapshot(tmp_path, Stub(20, {"a": w, "b": w, "c": w}, {"a": v, "b": v + 1, "c": v}))
    assert {name: each[1].item() for name, each in reconstruct(tmp_path, 0.10).items()} == {"a": 2, "b": 3, "c": 2}
    weights = solve_weights(*even(2, 20), 20, gamma_of(0.07))
    found = reconstruct(tmp_path, 0.07, dtype=torch.float64)
    assert (found["b"] - found["a"]).tolist() == pytest.approx([weights[3].item()] * 1000, abs=1e-9)
    assert torch.equal(found["a"], found["c"])


def test_empty_tensors_are_not_tied(tmp_path):
    tensors = {"a": torch.ones(0, 3), "b": torch.ones(4, 0), "c": torch.ones(1)}
    save_snapshot(tmp_path, Stub(3, tensors, tensors))
    assert {name: each.shape for name, each in reconstruct(tmp_path, 0.1).items()} == {
        name: each.shape for name, each in tensors.items()
    }


def test_averages_of_one_file_with_other_shapes_are_refused(tmp_path):
    path = save_snapshot(tmp_path, Stub(3, *both(torch.ones(2))))
    with posthoc.safetensors().safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"0/w": torch.ones(2), "1/w": torch.ones(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"'1/w': expected shape \(2,\), found \(3,\)"):
        reconstruct(tmp_path, 0.10)


def test_only_power_functions_are_kept(tmp_path):
    w = torch.ones(2)
    schedules = [to_state(constant(0.9)), to_state(power_function(0.07)), "<lambda>", to_state(power_function(0.2))]
    ema = Stub(5, *({"w": w * k} for k in range(4)), schedules=schedules, step=23)
    path = save_snapshot(str(tmp_path / "new" / "folder"), ema)
    assert path == tmp_path / "new" / "folder" / "ema-0000000005.safetensors"
    assert snapshots(path.parent) == [(path, 23, 5, (0.07, 0.2))]
    assert {name: each.tolist() for name, each in safetensors_torch.load_file(path).items()} == {
        "0/w": [1, 1],
        "1/w": [3, 3],
    }
    with pytest.raises(ValueError, match=r"power_function, found \[.*'constant'.*, 'lambda'\]"):
        save_snapshot(tmp_path, Stub(5, {"w": w}, {"w": w}, schedules=[to_state(constant(0.9)), "lambda"]))


def test_sigma_rels_to_the_last_bit(tmp_path):
    sigma_rels = (0.1 + 2**-54, sigma_rel_of(7.3), 1 / 3 * 0.3)
    save_snapshot(tmp_path, Stub(5, *[{"w": torch.ones(1)}] * 3, schedules=sigma_rels))
    assert snapshots(tmp_path)[0].sigma_rels == sigma_rels


def test_one_snapshot_among_ones_with_inf(tmp_path):
    good, bad = torch.ones(2), torch.full((2,), math.inf)
    save_snapshot(tmp_path, Stub(10, {"w": bad}, {"w": bad}))
    save_snapshot(tmp_path, Stub(20, {"w": good}, {"w": bad}))
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1]


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="expected 1 update or more before a snapshot, found 0"):
        save_snapshot(tmp_path, Stub(0, *both(torch.ones(1))))
    with pytest.raises(ValueError, match="dtype: expected float64"):
        save_snapshot(tmp_path, Stub(1, *both(torch.ones(1))), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"ema\['w'\]: expected values within 65504"):
        save_snapshot(tmp_path, Stub(1, *both(torch.tensor([1.0, 1e5]))), dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_snapshot(tmp_path, Stub(1, *both(torch.tensor([math.inf, math.nan]))), dtype=torch.float16)  # was so before


def test_a_later_write_to_the_averages_does_not_reach_the_snapshot(tmp_path):
    w = torch.ones(3)
    save_snapshot(tmp_path, Stub(1, {"w": w}, {"w": w}))
    before = reconstruct(tmp_path, 0.05)["w"]
    before.add_(1)
    w.add_(5)
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1, 1]


# ---- Other files, and broken ones


def test_other_files_are_ignored(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    for name in ("ema-12.safetensors", "model.safetensors", f".{path.name}.00ff.tmp", ".tmpXyZ", f"{path.name}.bak"):
        (tmp_path / name).write_bytes(b"no")
    (tmp_path / "ema-0000000008.safetensors").mkdir()
    safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / "ema-0000000009.safetensors")  # not one of ours
    assert [each.path for each in snapshots(tmp_path)] == [path]
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1]


def test_no_snapshots(tmp_path):
    assert snapshots(tmp_path) == []
    with pytest.raises(ValueError, match=f"{tmp_path}: expected snapshots, found none"):
        reconstruct(tmp_path, 0.05)
    with pytest.raises(FileNotFoundError):
        snapshots(tmp_path / "nowhere")


@pytest.mark.parametrize("part", [0, 4, 8, 0.1, 0.5, -1, "longer", "noise", "no JSON", "no key"])
def test_broken_files_are_named(tmp_path, part):
    save_snapshot(tmp_path, Stub(7, *both(torch.ones(50))))
    path = save_snapshot(tmp_path, Stub(8, *both(torch.ones(50))))
    content = path.read_bytes()
    if part in ("no JSON", "no key"):
        metadata = {posthoc._MARK: "1", **dict.fromkeys(posthoc._KEYS, "{" if part == "no JSON" else "1")}
        if part == "no key":
            del metadata["tensors"]
        safetensors_torch.save_file({"0/w": torch.ones(1)}, path, metadata)
    elif part == "longer":
        path.write_bytes(content + b"0")
    elif part == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    else:
        path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    for function in (snapshots, lambda folder: reconstruct(folder, 0.07)):
        with pytest.raises(ValueError, match=f"{path}: truncated or corrupt"):
            function(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("step", "-1", "step: expected a whole number, 0 or more, found -1"),
        ("updates", '"7"', "updates: expected a whole number, 1 or more, found '7'"),
        ("updates", "1" + "0" * 400, "updates: expected a whole number"),
        ("sigma_rels", "null", "sigma_rels: expected a list of numbers, found None"),
        ("sigma_rels", '["x"]', "sigma_rel: expected a number, found str"),
        ("sigma_rels", "[NaN]", "sigma_rel: expected a value in"),
        ("tensors", "3", "tensors: expected names by name, found 3"),
        ("tensors", '{"w": 3}', "tensors: expected names by name"),
        ("complex", '["v"]', "complex: expected a list of names among the tensors', found"),
        ("complex", '["w"]', "'0/w': expected shape .2, 3., and 2 for complex numbers in the end, found .2, 3."),
        ("step", "[" * 100_000, "recursion"),
        ("step", "9" * 5000, "digits"),
    ],
)
def test_metadata_of_another_kind_are_named(tmp_path, key, value, named):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2, 3))))
    with posthoc.safetensors().safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors_torch.save_file(tensors, path, {**metadata, key: value})
    with pytest.raises(ValueError, match=f"{path}: .*{named}"):
        reconstruct(tmp_path, 0.07)


def test_averages_of_one_file_that_differ_in_shape_are_named(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, {"w": torch.ones(2)}, {"w": torch.ones(3)}))
    with pytest.raises(ValueError, match=rf"{path}: '1/w': expected shape \(2,\), found \(3,\)"):
        reconstruct(tmp_path, 0.07)


def test_another_format_is_named(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    safetensors_torch.save_file({"w": torch.ones(1)}, path, {posthoc._MARK: "2"})
    with pytest.raises(ValueError, match=f"{path}: expected format 1, found 2"):
        snapshots(tmp_path)


def test_differing_snapshots_are_refused_with_all_differences(tmp_path):
    one = {"same": torch.ones(2), "shape": torch.ones(2, 3), "gone": torch.ones(1), "kind": torch.ones(2, 2)}
    other = {"same": torch.ones(2), "shape": torch.ones(3, 2), "new": torch.ones(1), "kind": torch.ones(2) * 1j}
    save_snapshot(tmp_path, Stub(7, one, one))
    path = save_snapshot(tmp_path, Stub(8, other, other))
    with pytest.raises(ValueError, match="other tensors than in ema-0000000007") as raised:
        reconstruct(tmp_path, 0.07)
    assert str(path) in str(raised.value)
    for difference in (
        "'shape': expected shape [2, 3], found shape [3, 2]",
        "'gone': expected shape [1], found none",
        "'new': expected none, found shape [1]",
        "'kind': expected shape [2, 2], found complex, shape [2, 2]",
    ):
        assert difference in str(raised.value)
    assert "'same'" not in str(raised.value)


def test_without_safetensors(tmp_path, monkeypatch):
    save_snapshot(tmp_path, Stub(7, *both(torch.ones(2))))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    calls = [lambda: save_snapshot(tmp_path, Stub(8, *both(torch.ones(2)))), lambda: snapshots(tmp_path)]
    for call in [*calls, lambda: reconstruct(tmp_path, 0.05)]:
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()


def test_the_module_imports_without_safetensors():
    code = "import sys; sys.modules['safetensors'] = None; import fused_ema.posthoc as p"
    code += "; print(p.solve_weights([1], [3], 2, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "tensor([1.], dtype=torch.float64)\n"), done.stderr


# ---- Atomic writes


# ---- The manager itself


@pytest.mark.parametrize("options", [{}, {"update_every": 3, "update_after_step": 10}], ids=["plain", "sparse"])
def test_end_to_end(tmp_path, options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model[0].tied = model[2].weight
    kept = fused_ema.EMA(model, decay=[power_function(0.05), power_function(0.10), 0.99], **options)
    direct = fused_ema.EMA(model, decay=[power_function(each) for each in TARGETS], **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, 1201):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        kept.update()
        direct.update()
        if step % 30 == 0 and kept.updates:
            save_snapshot(tmp_path, kept)
    found = snapshots(tmp_path)
    assert found[-1][1:] == (1200, kept.updates, BASE)
    assert kept.updates == (1200 if not options else (1200 - 10) // 3)
    with kept.swapped(1):
        assert torch.equal(reconstruct(tmp_path, 0.10)["0.weight"], model[0].weight)
    times, gammas = [each.updates for each in found for _ in BASE], [gamma_of(each) for each in BASE] * len(found)
    for k, sigma_rel in enumerate(TARGETS):
        averages = reconstruct(tmp_path, sigma_rel)
        wanted = direct.state_dict()["averages"][k]
        assert averages.keys() == wanted.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
        error = profile_error(times, gammas, kept.updates, gamma_of(sigma_rel))
        for name, parameter in model.named_parameters():
            # The noise in the average is far below what the weights have moved since the start, some 0.1.
            assert (averages[name] - wanted[name]).abs().max() < 0.1 * error + 1e-5 * parameter.abs().max()
    model.load_state_dict(reconstruct(tmp_path, 0.15), strict=False)


def saved_after(folder, ema, updates):
    while ema.updates < updates:
        ema.update()
    return save_snapshot(folder, ema)


@pytest.mark.parametrize("restarted_at", [1, 3, 7])
def test_snapshots_of_another_run_are_named(tmp_path, restarted_at):
    ema = fused_ema.EMA(nn.Linear(2, 2), power_function(0.1))
    saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 5)
    again = fused_ema.EMA(ema.model, ema.schedules)
    with pytest.warns(UserWarning, match="ema-0000000002.*ema-0000000005"):
        saved_after(tmp_path, again, restarted_at)


def test_snapshots_of_this_run_are_not(tmp_path):
    ema = fused_ema.EMA(nn.Linear(2, 2), power_function(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 2), saved_after(tmp_path, ema, 5)
        for updates in (6, 7):
            copied = copy.deepcopy(ema)
            saved_after(tmp_path, copied, updates)
        resumed = fused_ema.EMA(ema.model, ema.schedules)
        resumed.load_state_dict(copied.state_dict())
        saved_after(tmp_path, resumed, 8)
    resumed.load_state_dict(ema.state_dict())  # of 5 updates
    with pytest.warns(UserWarning, match=r"\['ema-0000000006.safetensors', 'ema-0000000008.safetensors'\]"):
        saved_after(tmp_path, resumed, 7)  # in the place of the other


def one_snapshot(folder, weight=1.0):
    model = nn.Linear(2, 2)
    model.weight.data.fill_(weight)
    ema = fused_ema.EMA(model, power_function(0.1))
    ema.update()
    return save_snapshot(folder, ema)


def test_a_snapshot_under_another_name_is_refused(tmp_path):
    path = one_snapshot(tmp_path)
    path.rename(path.with_name("ema-0000000007.safetensors"))
    with pytest.raises(ValueError, match="expected one of 1 updates by its name"):
        snapshots(tmp_path)


def test_reconstruct_in_a_type_that_does_not_hold_it(tmp_path):
    one_snapshot(tmp_path, 1e6)
    with pytest.raises(ValueError, match=r"dtype: expected one that holds 1e\+06 of 'weight', found torch.float16"):
        reconstruct(tmp_path, 0.1, dtype=torch.float16)
    assert reconstruct(tmp_path, 0.1, dtype=torch.bfloat16)["weight"].isfinite().all()


@pytest.mark.parametrize("updates", [1.5, "1", True])
def test_updates_of_reconstruct_are_a_whole_number(tmp_path, updates):
    one_snapshot(tmp_path)
    with pytest.raises(ValueError, match="updates: expected a whole number"):
        reconstruct(tmp_path, 0.1, updates=updates)


def test_a_snapshot_of_integers_is_refused(tmp_path):
    path = one_snapshot(tmp_path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({key: value.to(torch.int32) for key, value in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match="expected a floating type, found int32"):
        reconstruct(tmp_path, 0.1)
