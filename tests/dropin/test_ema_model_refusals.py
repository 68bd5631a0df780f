"""fused_ema.dropin.EMAModel: what it refuses, and parameters that DeepSpeed has sharded."""

import copy
import sys
import types

import pytest
import torch
from checkpoint_checks import same
from conftest import refused
from small_unet import clones, each_foreach, moved, numbers, trained
from torch import nn

from fused_ema.dropin import EMAModel

# ---- Refusals


def fewer(model):
    return list(model.parameters())[:-1], "as many as shadow_params"


def reordered(model):
    return list(model.parameters())[::-1], "parameters[0]: expected shape"


def that_would_be_broadcast(model):
    listed = list(model.parameters())
    return [
        nn.Parameter(torch.zeros(1)) if x.dim() == 1 else x for x in listed
    ], "expected shape (4,), as shadow_params"


def without_values(model):
    return model.to("meta").parameters(), "on the meta device"


each_refusal = pytest.mark.parametrize(
    "found", [fewer, reordered, that_would_be_broadcast, without_values], ids=lambda f: f.__name__
)


@each_foreach
@each_refusal
def test_a_step_that_is_refused_writes_and_counts_nothing(backend, foreach, found):
    model, ours = trained(EMAModel, foreach=foreach)
    before = numbers(ours)
    parameters, words = found(copy.deepcopy(model))
    refused(ValueError, lambda: ours.step(parameters), ours.shadow_params, names=[words])
    assert numbers(ours) == before
    ours.step(model.parameters())
    assert ours.optimization_step == 6


@each_foreach
@pytest.mark.parametrize("found", [fewer, reordered, that_would_be_broadcast], ids=lambda f: f.__name__)
def test_a_copy_that_is_refused_writes_nothing(foreach, found):
    model, ours = trained(EMAModel, foreach=foreach)
    other = copy.deepcopy(model)
    parameters = found(other)[0]
    ours.store(model.parameters())
    for call in (ours.store, ours.copy_to, ours.restore):
        refused(ValueError, lambda call=call: call(iter(parameters)), parameters, ours.temp_stored_params)
    ours.copy_to(other.parameters())
    ours.restore(other.parameters())
    assert same(other.parameters(), model.parameters())


def test_averages_that_are_the_parameters_are_refused():
    model, ours = trained(EMAModel)
    ours.shadow_params = [parameter.data for parameter in model.parameters()]
    refused(ValueError, lambda: ours.step(model.parameters()), ours.shadow_params, names=["expected memory of its own"])


def test_special_classes_are_refused():
    ours = EMAModel([nn.Parameter(torch.eye(3).to_sparse())])
    with pytest.raises(TypeError, match=r"parameters\[0\]: expected a dense tensor, found layout torch.sparse_coo"):
        ours.step([nn.Parameter(torch.eye(3).to_sparse())])
    assert ours.optimization_step == 0


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan")])
def test_decays_outside_0_and_1_are_refused(decay):
    model, ours = trained(EMAModel)
    ours.get_decay = lambda _: decay
    before = numbers(ours)
    refused(ValueError, lambda: ours.step(moved(model).parameters()), ours.shadow_params, names=["expected a value in"])
    assert numbers(ours) == before


# ---- DeepSpeed's ZeRO-3


class Gathered:
    """Stands in for deepspeed.zero.GatheredParameters: parameters have their values inside the block alone."""

    def __init__(self, parameters, modifier_rank):
        assert modifier_rank is None
        self.parameters = parameters

    def __enter__(self):
        for each in self.parameters:
            each.data = each.whole

    def __exit__(self, *_):
        for each in self.parameters:
            each.data = torch.empty(0)


def test_parameters_that_zero_3_has_sharded_are_gathered(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "deepspeed", types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=Gathered))
    )
    model, ours = trained(EMAModel)
    _, expected = trained(EMAModel)
    expected.step(clones(moved(model).parameters())), expected.step(model.parameters())
    ours.step(clones(model.parameters()))
    for each in model.parameters():
        each.whole, each.ds_numel, each.data = each.detach().clone(), each.numel(), torch.empty(0)
    ours.step(model.parameters())
    assert same(ours.shadow_params, expected.shadow_params)
    assert not any(each.numel() for each in model.parameters())
    for call in (ours.store, ours.copy_to):
        refused(
            ValueError, lambda call=call: call(model.parameters()), names=["within deepspeed.zero.GatheredParameters"]
        )
    with Gathered(list(model.parameters()), None):
        ours.step(model.parameters())
        ours.copy_to(model.parameters())
    assert ours.optimization_step == 8
