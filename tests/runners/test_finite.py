"""`EMA(nonfinite="skip")` on each runner: where the model is NaN or infinite, its average stays; all else moves."""

import oracle
import pytest
import torch
from conftest import all_averages
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fused_ema import EMA
from fused_ema.runners.base import Call

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")

SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf])
MODELS = [*oracle.FLOATS, torch.complex64, torch.complex128]
ROUNDINGS = [(dtype, "nearest") for dtype in oracle.FLOATS] + [(dtype, "stochastic") for dtype in oracle.HALF]


def model_of(dtype, rng):
    """Flat, permuted and sparse-in-memory parameters, over several of the CPU's pieces."""
    model = nn.ParameterList([oracle.values(dtype, 3001, rng, 10), oracle.values(dtype, 35, rng, 10).view(5, 7)])
    model.append(oracle.values(dtype, 60, rng, 10).view(4, 15).T)
    model.append(oracle.values(dtype, 60, rng, 10).view(2, 30)[:, ::3])
    return model


@torch.no_grad()
def shake(models, rng, share):
    """New values, the same in both models; then a share of the second's elements is spoiled. Returns which, by tensor,
    of real numbers."""
    spoiled = []
    for one, other in zip(*models, strict=True):
        one.copy_(oracle.values(one.dtype, one.numel(), rng, 10).view(one.shape))
        other.copy_(one)
        reals = torch.view_as_real(other) if other.is_complex() else other
        bad = torch.from_numpy(rng.random(tuple(reals.shape)) < share)
        reals[bad] = SPECIAL[torch.from_numpy(rng.integers(0, 3, int(bad.sum())))].to(reals.dtype)
        spoiled.append(bad)
    return spoiled


def check(found, old, moved, bad, backend, model, decay):
    """`moved`: what the average of the model that was not spoiled has become."""
    found, old, moved, model = (torch.view_as_real(x) if x.is_complex() else x for x in (found, old, moved, model))
    assert oracle.same_bits(found[bad], old[bad])
    if backend == "torch":  # its bits depend on the way
        assert decay in (0, 1) or torch.isfinite(found).all()
        oracle.check_step([old[~bad]], [model[~bad]], [found[~bad]], decay, bitwise=False)
    else:
        assert oracle.same_bits(found[~bad], moved[~bad])


@pytest.mark.hazard(51, "good")
@pytest.mark.parametrize("dtype", MODELS, ids=str)
@pytest.mark.parametrize(("to", "rounding"), ROUNDINGS, ids=str)
def test_what_is_not_finite_is_left_out(backend, dtype, to, rounding):
    """By each of several averages, one of which is a copy and one of which stands still."""
    rng, decays = np.random.default_rng(0), [0.9, 0.0, 0.3, 1.0]
    models = [model_of(dtype, rng) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"dtype": to, "rounding": rounding}
    emas = [EMA(models[0], decays, **options), EMA(models[1], decays, **options, nonfinite="skip")]
    for share in (0.0, 0.1):  # at first all averages are equal
        bad = shake(models, rng, share)
        before = [{name: value.clone() for name, value in each.items()} for each in all_averages(emas[1])]
        for own, others in zip(all_averages(emas[0]), before, strict=True):
            for name, value in own.items():
                value.copy_(others[name])
        for ema in emas:
            ema.update()
        for k, (decay, old) in enumerate(zip(decays, before, strict=True)):
            moved, found = (all_averages(ema)[k] for ema in emas)
            for i, name in enumerate(old):
                by_chance = rounding == "stochastic" and old[name].element_size() == 2
                way = "the same" if by_chance else backend
                check(found[name], old[name], moved[name], bad[i], way, models[0][i].detach(), decay)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999, 1.0])
@pytest.mark.parametrize(("to", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")], ids=str)
def test_a_decay_on_the_device(backend, to, rounding, decay):
    """As a scaler gives it that skips steps on the device."""
    model = nn.ParameterList([torch.randn(500), torch.randn(70).bfloat16()])
    emas = [EMA(model, decay, dtype=to, rounding=rounding, nonfinite="skip") for _ in range(2)]
    with torch.no_grad():
        for parameter in model:
            parameter.mul_(1.5)[::7] = torch.nan
    emas[0].update()
    keys = emas[1].timetable.keys_at(1)
    emas[1]._run(Call(emas[1].timetable.op, (0.5,), torch.tensor([decay], dtype=torch.float64), keys))
    one, other = (ema.state_dict()["averages"][0] for ema in emas)
    assert all(oracle.same_bits(one[name], other[name]) for name in one)
    assert all(value.isfinite().all() for value in one.values())


def test_copies_up_to_update_after_step_leave_it_out_too(backend):
    model = nn.ParameterList([torch.ones(5)])
    ema = EMA(model, 0.5, update_after_step=2, nonfinite="skip")
    for value in (2.0, 3.0, 4.0):
        model[0].data.fill_(value)[2] = torch.inf
        ema.update()
    assert ema.averaged_state_dict()["0"].tolist() == [3.5, 3.5, 1.0, 3.5, 3.5]


def test_a_buffer_that_is_only_copied_is_copied_as_it_is(backend):
    """Of all pairs of a call, those that are averaged alone are looked at."""
    from fused_ema.pairs.pairing import Pairs
    from fused_ema.plan import Plan
    from fused_ema.runners.watch import watch

    ema, model = [torch.ones(3), torch.ones(3)], [torch.tensor([2.0, torch.nan, 2.0]) for _ in range(2)]
    plan = Plan(Pairs(["[0]", "[1]"], ema, model, [True, False]), watch(ema, model))
    assert plan.try_run(Call("update_finite", (0.5,)))
    assert ema[0].tolist() == [1.5, 1.0, 1.5]
    assert oracle.same_bits(ema[1], model[1])


def test_pytorch_alone_allocates_little(monkeypatch):
    monkeypatch.setenv("FUSED_EMA_RUNNER", "foreach")
    model = nn.ParameterList([torch.ones(1500, 1500)])
    ema = EMA(model, 0.9, nonfinite="skip")
    ema.update()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        ema.update()
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert 0 < largest <= 1 << 20 < model[0].nbytes, largest
