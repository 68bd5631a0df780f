"""What the tests of fused_ema.AveragedModel share."""

import pytest
import torch
from conftest import net
from torch.optim import swa_utils

import fused_ema
from fused_ema import _warning

FUNCTIONS = {  # arguments of the constructor that stand for a moving average with the given decay
    "torch's function of lists": lambda decay: {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)},
    "torch's function of tensors": lambda decay: {"avg_fn": swa_utils.get_ema_avg_fn(decay)},
    "ours": lambda decay: {"multi_avg_fn": fused_ema.get_ema_multi_avg_fn(decay)},
}
MEANS = {
    "none": dict,
    "torch's function of lists": lambda: {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "torch's function of tensors": lambda: {"avg_fn": swa_utils.get_swa_avg_fn()},
}


def averaged_model(model, decay=0.5, **options):
    return fused_ema.AveragedModel(model, multi_avg_fn=fused_ema.get_ema_multi_avg_fn(decay), **options)


def shaken(model):
    """The model with other values in parameters and buffers."""
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))
            else:
                tensor.add_(1)
    return model


def used(model=None, updates=3, kind=fused_ema.AveragedModel, **options):
    """A model and an AveragedModel of it after some updates."""
    model = model or net()
    options = options or {"multi_avg_fn": fused_ema.get_ema_multi_avg_fn(0.5)}
    averaged = kind(model, **options)
    for _ in range(updates):
        averaged.update_parameters(shaken(model))
    return model, averaged


@pytest.fixture
def fused_alone(monkeypatch):
    """Lets a call of PyTorch's own update fail."""

    def fail(*_):
        pytest.fail("PyTorch's own code has run")

    monkeypatch.setattr(swa_utils.AveragedModel, "update_parameters", fail)


@pytest.fixture(autouse=True)
def warns_again():
    """What is said once per process is said in each test."""
    _warning._warn_once.cache_clear()
