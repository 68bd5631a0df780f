"""The drop-in for diffusers' EMAModel on a GPU: one launch, averages that move to the host and back, pinned ones."""

import gpu_checks
import pytest
import torch
from gpu_checks import DEVICE, profile
from oracle import check_step
from torch import nn

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel


def made():
    """A model whose values move, and its average after some steps."""
    EMAModel = pytest.importorskip("fused_ema.dropin.ema_model", exc_type=ImportError).EMAModel
    model = nn.Sequential(*[nn.Linear(31, 17) for _ in range(5)]).to(DEVICE)
    model[0].weight.requires_grad_(False)
    ema = EMAModel(model.parameters(), 0.9)
    for _ in range(9):
        train(model)
        ema.step(model.parameters())
    return model, ema


@torch.no_grad()
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def checked_step(model, ema):
    train(model)
    old, parameters = ([x.detach().clone() for x in side] for side in (ema.shadow_params, model.parameters()))
    ema.step(model.parameters())
    check_step(old, parameters, ema.shadow_params, ema.cur_decay_value, bitwise=True)


def test_a_step_is_one_launch():
    model, ema = made()
    checked_step(model, ema)
    kernels, calls = profile(lambda: ema.step(model.parameters()), 3)
    assert sum(kernels.values()) == 3
    assert not [name for name in calls if "Memcpy" in name]


def test_averages_on_the_host_between_steps():
    model, ema = made()
    for _ in range(2):
        ema.to("cpu")
        with pytest.raises(
            ValueError, match=r"shadow_params\[0\]: expected a tensor on cuda:0.*call to\(device='cuda:0'\)"
        ):
            ema.step(model.parameters())
        ema.to(DEVICE, non_blocking=True)
        checked_step(model, ema)


def test_averages_in_pinned_memory_are_updated_where_they_are():
    model, ema = made()
    ema.to("cpu")
    ema.pin_memory()
    places = [average.data_ptr() for average in ema.shadow_params]
    for _ in range(2):
        checked_step(model, ema)
    assert [average.data_ptr() for average in ema.shadow_params] == places
    assert all(average.is_pinned() for average in ema.shadow_params)


def test_evaluation():
    model, ema = made()
    raw = [parameter.detach().clone() for parameter in model.parameters()]
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    assert all(map(torch.equal, model.parameters(), ema.shadow_params))
    ema.restore(model.parameters())
    assert all(map(torch.equal, model.parameters(), raw))
