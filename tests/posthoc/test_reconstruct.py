"""Reconstruction compared with direct averaging, and what is refused."""

import math

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from snapshot_stub import BASE, TARGETS, Stub, even
from torch import nn

import fused_ema
from fused_ema.posthoc import profile_error, reconstruct, save_snapshot, snapshots, solve_weights
from fused_ema.schedules import gamma_of, power_function

safetensors_torch = pytest.importorskip("safetensors.torch")

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

    # The Cauchy-Schwarz inequality bounds the error for any weights.
    norm = math.sqrt((gamma_of(sigma_rel) + 1) ** 2 / (2 * gamma_of(sigma_rel) + 1) / time)
    spread = (theta[:time] - theta[:time].mean(0)).square().sum(0).sqrt()
    assert (error.abs() <= expected_error * norm * spread + 1e-12).all()
    if kind == "noise":  # profile_error is then the error relative to the noise, up to sampling
        relative = (error.square().mean() / (wanted - 3).square().mean()).sqrt().item()
        assert relative == pytest.approx(expected_error, rel=0.1)
    else:  # weights that change slowly are reconstructed better
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


def test_inf_in_snapshots_without_weight_is_ignored(tmp_path):
    good, bad = torch.ones(2), torch.full((2,), math.inf)
    save_snapshot(tmp_path, Stub(10, {"w": bad}, {"w": bad}))
    save_snapshot(tmp_path, Stub(20, {"w": good}, {"w": bad}))
    assert reconstruct(tmp_path, 0.05)["w"].tolist() == [1, 1]


def test_averages_of_one_file_with_different_shapes_are_refused(tmp_path):
    path = save_snapshot(tmp_path, Stub(7, {"w": torch.ones(2)}, {"w": torch.ones(3)}))
    with pytest.raises(ValueError, match=rf"{path}: '1/w': expected shape \(2,\), found \(3,\)"):
        reconstruct(tmp_path, 0.07)


def test_differing_snapshots_are_refused_with_all_differences(tmp_path):
    one = {"same": torch.ones(2), "shape": torch.ones(2, 3), "gone": torch.ones(1), "kind": torch.ones(2, 2)}
    other = {"same": torch.ones(2), "shape": torch.ones(3, 2), "new": torch.ones(1), "kind": torch.ones(2) * 1j}
    save_snapshot(tmp_path, Stub(7, one, one))
    path = save_snapshot(tmp_path, Stub(8, other, other))
    with pytest.raises(ValueError, match="the tensors differ from those in ema-0000000007") as raised:
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
            # The noise in the average is far smaller than the distance of about 0.1 that the weights have moved.
            assert (averages[name] - wanted[name]).abs().max() < 0.1 * error + 1e-5 * parameter.abs().max()
    model.load_state_dict(reconstruct(tmp_path, 0.15, model=model))


def one_snapshot(folder, weight=1.0):
    model = nn.Linear(2, 2)
    model.weight.data.fill_(weight)
    ema = fused_ema.EMA(model, power_function(0.1))
    ema.update()
    return save_snapshot(folder, ema)


def test_values_too_large_for_dtype_are_refused(tmp_path):
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
