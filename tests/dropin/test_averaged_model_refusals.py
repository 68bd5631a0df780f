"""What the drop-in for torch's AveragedModel refuses, and what it leaves to torch's own code."""

import re

import averaged_models
import pytest
import torch
from averaged_models import FUNCTIONS, used
from conftest import refused
from torch import nn
from torch.optim import swa_utils

import fused_ema

warns_again = averaged_models.warns_again

# ---- Refusals


def renamed(model):
    return nn.ModuleDict({"net": model})


def resized(model):
    model[2] = nn.Linear(4, 3)
    return model


REFUSED = {
    "names": (ValueError, renamed, ["'net.0.weight'", "'0.weight'", "make a new AveragedModel of this one"]),
    "shapes": (ValueError, resized, ["ema['2.weight']", "(3, 4)", "(2, 4)", "make a new AveragedModel of this one"]),
    "wider model": (TypeError, nn.Module.double, ["ema['0.weight']", "float64", "float32"]),
    "other kinds": (TypeError, lambda model: model.to(torch.complex64), ["ema['0.weight']", "float32"]),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("how", REFUSED)
def test_refusals_write_and_count_nothing(backend, how):
    error, change, names = REFUSED[how]
    model, averaged = used()
    model = change(model)
    refused(error, lambda: averaged.update_parameters(model), averaged, model, names=names)
    assert averaged.n_averaged == 3
    if "make a new AveragedModel of this one" in names:  # the advice works
        _, again = used(model)
        assert again.n_averaged == 3


def test_no_refusal_gives_advice_for_other_functions(backend):
    for change in (renamed, resized):
        model, averaged = used()
        with pytest.raises(ValueError, match="pass the model that AveragedModel was made from") as caught:
            averaged.update_parameters(change(model))
        assert "names=" not in str(caught.value)


def test_averages_that_are_the_model(backend):
    model, averaged = used()
    averaged.module = model
    refused(
        ValueError, lambda: averaged.update_parameters(model), averaged, names=["memory of its own", "copy.deepcopy"]
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_decay_that_is_no_number(backend, function):
    model, averaged = used(updates=1, **FUNCTIONS[function](0.5))
    function = averaged.multi_avg_fn or averaged.avg_fn
    if function.__class__ is fused_ema.functional.EMAMultiAvgFn:
        function.decay = float("nan")
    else:
        averaged = fused_ema.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(float("nan")))
        averaged.update_parameters(model)
    refused(ValueError, lambda: averaged.update_parameters(model), averaged, names=["decay", "nan"])


# ---- Other devices (the meta device stands for a GPU)


def test_averages_on_another_device_take_torchs_way(backend):
    model, averaged = used()
    averaged.module.to("meta")
    calls = []
    averaged.multi_avg_fn = fused_ema.get_ema_multi_avg_fn(0.5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(swa_utils.AveragedModel, "update_parameters", lambda *each: calls.append(each))
        with pytest.warns(UserWarning, match="the averages are on meta and the model is on cpu"):
            averaged.update_parameters(model)
        averaged.update_parameters(model)
    assert calls == [(averaged, model)] * 2


@pytest.mark.parametrize("change", [renamed, resized])
def test_averages_on_another_device_must_fit_too(backend, change):
    model, averaged = used()
    averaged.module.to("meta")
    model = change(model)
    with pytest.raises(ValueError, match=re.escape("ema")):
        averaged.update_parameters(model)
    assert averaged.n_averaged == 3
