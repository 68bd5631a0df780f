"""The drop-in for torch's AveragedModel follows tensors that are replaced, counts, and runs anywhere."""

import copy
import gc
import weakref

import averaged_models
import pytest
import torch
from averaged_models import FUNCTIONS, MEANS, shaken, used
from conftest import bits, net, same_bits, tensors_of
from torch import nn

import fused_ema
from fused_ema.dropin import averaged_model as module

fused_alone = averaged_models.fused_alone

# ---- Tensors that are replaced


@pytest.mark.parametrize("side", ["average", "model"])
@pytest.mark.parametrize("how", ["data", "assign", "module", "cast"])
def test_replaced_tensors_are_followed(backend, fused_alone, side, how):
    model, averaged = used()
    changed = averaged.module if side == "average" else model
    if how == "data":
        changed[0].weight.data = torch.randn(4, 3)
    elif how == "assign":
        changed.load_state_dict(shaken(net()).state_dict(), assign=True)
    elif how == "module":
        changed[0] = nn.Linear(3, 4)
    else:
        changed.to(torch.float64 if side == "average" else torch.bfloat16)
    expected = copy.deepcopy(averaged.module)
    fused_ema.update(expected, shaken(model), 0.5)
    averaged.update_parameters(model)
    assert same_bits(bits(expected), averaged.module)


def test_another_model(backend, fused_alone):
    model, averaged = used()
    expected = copy.deepcopy(averaged.module)
    other = shaken(copy.deepcopy(model))
    averaged.update_parameters(other)
    fused_ema.update(expected, other, 0.5)
    assert same_bits(bits(expected), averaged.module)


def test_the_model_is_not_kept_alive(backend):
    model, averaged = used()
    tensor, model = weakref.ref(model[0].weight), weakref.ref(model)
    gc.collect()
    assert model() is tensor() is None
    assert averaged.n_averaged == 3


# ---- The count


@pytest.fixture
def far(monkeypatch):
    """Counts as on a GPU: reading the counter is to be avoided."""
    monkeypatch.setattr(module, "_waits", lambda counter: True)


def reads(call):
    """How often a call reads a number from a tensor."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        call()
    return sum(event.name == "aten::item" for event in profiled.events())


def three(model, averaged):
    for _ in range(3):
        averaged.update_parameters(model)


@pytest.mark.parametrize("function", [FUNCTIONS["ours"](0.5), {}], ids=["moving average", "mean"])
def test_the_counter_is_read_once(backend, far, function):
    model, averaged = used(updates=0, **function)
    assert reads(lambda: three(model, averaged)) == 1
    assert reads(lambda: three(model, averaged)) == 0
    assert averaged.n_averaged == 6


@pytest.mark.parametrize("how", ["fill", "load", "assign", "replace", "to", "deepcopy"])
def test_a_counter_that_is_written_is_read_again(backend, far, how):
    model, averaged = used(**MEANS["none"]())
    other = fused_ema.AveragedModel(model)
    if how == "fill":
        averaged.n_averaged.fill_(0)
    elif how in ("load", "assign"):
        averaged.load_state_dict(other.state_dict(), assign=how == "assign")
    elif how == "replace":
        averaged.n_averaged = torch.tensor(0)
    elif how == "to":
        averaged.to(torch.float64)
    else:
        averaged = copy.deepcopy(averaged)
        averaged.n_averaged.fill_(0)
    kept = how == "to"
    averaged.update_parameters(shaken(model))
    assert averaged.n_averaged == (4 if kept else 1)
    assert same_bits(bits(model), averaged.module) != kept


def test_counters_of_inference_mode(backend, far):
    with torch.inference_mode():
        model, averaged = used(**MEANS["none"]())
        assert reads(lambda: three(model, averaged)) == 3
        assert averaged.n_averaged == 6


# ---- Where it is called


def test_inside_a_compiled_function(fused_alone):
    model, averaged = used()
    expected = copy.deepcopy(averaged.module)

    @torch.compile(backend="eager")
    def step():
        with torch.no_grad():
            model[0].weight.add_(1)
        averaged.update_parameters(model)

    for _ in range(3):
        step()
        fused_ema.update(expected, model, 0.5)
    assert same_bits(bits(expected), averaged.module)
    assert averaged.n_averaged == 6


def test_inside_autocast_and_with_grad(backend):
    model, averaged = used(nn.Linear(3, 4))
    x = torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = averaged(x)
        averaged.update_parameters(shaken(model))
        assert not torch.equal(averaged(x), before)  # no cast of the old values is left
    assert not any(tensor.grad_fn for tensor in tensors_of(averaged))
