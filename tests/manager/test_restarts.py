"""Averages that begin again (EMA.reset), and averages that are copied back into the model (Switch EMA)."""

import copy

import pytest
import torch
from conftest import all_averages, averages, clones, equal, net, parameters, refused, same_values, tensors_of, trained
from torch import nn

from fused_ema import EMA, schedules


def nudge(model):
    with torch.no_grad():
        for tensor in tensors_of(model):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))


def copies(model, dtype=torch.float32):
    return {name: tensor.detach().to(dtype) for name, tensor in parameters(model).items()}


def run(ema, seed, steps=5):
    """Trains the model alike for each seed; the averages after each step."""
    torch.manual_seed(seed)
    found = []
    for _ in range(steps):
        nudge(ema.model)
        ema.update()
        found.append([clones(each) for each in all_averages(ema)])
    return found


OPTIONS = {
    "plain": {},
    "several": {"decay": [0.5, schedules.inverse_power(0.99), schedules.power_function(0.1)]},
    "every 2 after 3": {"decay": schedules.tf_warmup(0.9), "update_every": 2, "update_after_step": 3},
    "buffers": {"buffers": "average", "dtype": torch.float64},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3},
    "skip": {"nonfinite": "skip"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_reset_manager_goes_on_as_a_new_one(backend, options):
    model = net()
    ema = EMA(model, **options)
    run(ema, 0)
    places = [tensor.data_ptr() for each in all_averages(ema) for tensor in each.values()]
    ema.reset()
    new = EMA(copy.deepcopy(model), **options)
    assert (ema.step, ema.updates, ema.decay) == (0, 0, new.decay)
    assert places == [tensor.data_ptr() for each in all_averages(ema) for tensor in each.values()]
    for mine, theirs in zip(all_averages(ema), all_averages(new), strict=True):
        same_values(mine, theirs)
    for mine, theirs in zip(run(ema, 1), run(new, 1), strict=True):
        assert all(map(equal, mine, theirs))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_step_is_kept_where_asked(backend, options):
    model = net()
    ema = EMA(model, **options)
    run(ema, 0)
    before = ema.step, ema.updates, ema.decay
    ema.reset(keep_step=True)
    assert (ema.step, ema.updates, ema.decay) == before
    for own in all_averages(ema):
        assert equal({n: own[n] for n in parameters(model)}, copies(model, options.get("dtype", torch.float32)))
    fresh = EMA(copy.deepcopy(model), **options)
    state = fresh.state_dict()  # the copies, at that step: what a checkpoint would hold
    fresh.load_state_dict({**state, "step": before[0], "updates": before[1], "decays": ema.state_dict()["decays"]})
    for mine, theirs in zip(run(ema, 1), run(fresh, 1), strict=True):
        assert all(map(equal, mine, theirs))


def test_begin_and_reset(backend):
    """begin() does nothing once there is a history, and reset() ends the history."""
    ema = trained(net())
    ema.reset()
    nudge(ema.model)
    assert ema.begin(), "there is no history since the reset"
    assert equal(averages(ema), copies(ema.model))
    ema.update()
    assert not ema.begin()
    loaded = EMA(net(), 0.5)
    loaded.load_state_dict(ema.state_dict())
    assert not loaded.begin()
    loaded.reset()
    assert equal(averages(loaded), copies(loaded.model))
    assert loaded.begin()
    kept = trained(net())
    kept.reset(keep_step=True)
    assert not kept.begin(), "a step of more than 0 is a history"


def test_reset_ends_what_one_nan_has_spoiled(backend):
    ema = trained(net())
    with torch.no_grad():
        ema.model[0].weight[0, 0] = torch.nan
        ema.update()
        ema.model[0].weight[0, 0] = 0.0
    assert ema.distance()["nonfinite_average"] == 1
    ema.reset()
    assert ema.distance() == {"relative": 0.0, "still": 0.0, "nonfinite_model": 0, "nonfinite_average": 0}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("keep_step", [False, True])
def test_an_attached_optimizer_stays_attached(backend, overlap, keep_step, recwarn):
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, overlap=overlap, save=True)

    def step():
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    ema.reset(keep_step=keep_step)
    assert equal(averages(ema), copies(model))
    expected = averages(ema)
    for _ in range(2):
        expected = clones(expected)
        step()
        for name, parameter in parameters(model).items():
            expected[name].lerp_(parameter.detach(), 0.5)  # exact at 0.5, up to one rounding that both make
        assert equal(averages(ema), expected)
    assert ema.step == 2 + 3 * keep_step
    with ema.swapped():
        pass
    assert optimizer.state_dict()["fused_ema"]["step"] == ema.step
    assert not recwarn


def test_it_is_refused_inside_swapped(backend):
    model = net()
    ema, other = trained(model), EMA(model, 0.5)
    state = clones(averages(ema))
    with ema.swapped():
        for each in (ema, other):
            refused(RuntimeError, each.reset, model, names=["EMA.reset() was called inside", "leave"])
    assert equal(averages(ema), state)
    assert ema.step == 1
    ema.reset()  # as the error says


def test_a_model_that_has_changed_is_refused_and_nothing_is_lost(backend):
    ema = trained(net())
    state = clones(averages(ema))
    ema.model[0] = nn.Linear(3, 5)
    refused(ValueError, ema.reset, *averages(ema).values(), names=["'0.weight'", "ema.reselect()"])
    assert ema.step == 1
    assert equal(averages(ema), state)
    ema.reselect()  # as the error says
    ema.reset()
    assert equal(averages(ema), copies(ema.model))


def test_it_takes_its_argument_by_name_alone():
    with pytest.raises(TypeError):
        EMA(net()).reset(True)


def test_a_dict_of_tensors(backend):
    weights = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    ema = EMA(weights, 0.5)
    weights["a"] += 4
    ema.update()
    weights["a"] += 4
    ema.reset()
    assert averages(ema)["a"].tolist() == [8.0] * 3


# ---- Switch EMA: docs/guide.md has these lines


def switching(dtype, steps=8, every=4):
    """A model trained with the three lines; what the optimizer and the averages held right after each copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    ema = EMA(model, 0.75)
    for step in range(1, steps + 1):
        model(torch.randn(4, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        before = copy.deepcopy(optimizer.state_dict()["state"])
        if step % every == 0:
            ema.copy_to()
            yield model, optimizer, ema, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_gets_the_average_and_the_optimizer_goes_on(backend, dtype):
    count = 0
    for model, optimizer, ema, before in switching(dtype):
        count += 1
        same_values(parameters(model), {name: tensor.to(dtype) for name, tensor in averages(ema).items()})
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        assert stepped == {id(tensor) for tensor in model.parameters()}, "written in place"
        after = optimizer.state_dict()["state"]
        for i, state in before.items():
            same_values(state, after[i])
        assert ema.step == 4 * count, "a copy is no step"
        moved = clones(averages(ema))
        restarted = copy.deepcopy(ema)
        restarted.update()
        if dtype == torch.float32:
            assert equal(averages(restarted), moved), "an average that equals the model stays as it is"
        else:  # the model was rounded, and the average takes a quarter of that in: half an ulp of bfloat16 at most
            for name, tensor in averages(restarted).items():
                assert ((tensor - moved[name]).abs() <= 0.25 * 2.0**-8 * moved[name].abs() * (1 + 2**-8)).all()
    assert count == 2


def test_attached_and_overlapped_it_waits_for_the_update(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, overlap=True)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        ema.copy_to()
        assert equal(averages(ema), copies(model))
    assert ema.step == 3


def test_with_master_weights_the_masters_get_the_average(backend):
    """An optimizer with float32 copies of its own writes them back at its next step: so they are what is averaged, and
    what gets the average."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    masters = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(list(masters.values()), 0.1)
    ema = EMA(masters, 0.5)

    def step():
        model(torch.randn(4, 3, dtype=torch.bfloat16)).square().mean().backward()
        for name, tensor in model.named_parameters():
            masters[name].grad, tensor.grad = tensor.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor.copy_(masters[name])
        ema.update()

    for _ in range(3):
        step()
    ema.copy_to(), ema.copy_to(model)
    same_values(masters, averages(ema))
    same_values(parameters(model), {name: tensor.bfloat16() for name, tensor in averages(ema).items()})
    start = clones(masters)
    step()
    for name, tensor in masters.items():
        same_values({name: tensor}, {name: torch.add(start[name], tensor.grad, alpha=-0.1)})
    same_values(parameters(model), {name: tensor.bfloat16() for name, tensor in masters.items()})
