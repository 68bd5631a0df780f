"""The drop-in for torch's AveragedModel on a GPU: one launch, no wait, averages in host memory."""

import copy

import gpu_checks
import pytest
import torch
from gpu_checks import DEVICE, all_bits, check_costs_nothing_else, check_steady, profile, raises_on_sync
from step_checks import check_averaged_model, residual_network
from torch.optim import swa_utils

import fused_ema
from fused_ema import _warning

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls


def used(**options):
    model = residual_network()[0].to(DEVICE)
    averaged = fused_ema.AveragedModel(model, **options)
    averaged.update_parameters(model)
    return model, averaged


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_training_run_beside_torchs_own(use_buffers):
    check_averaged_model(DEVICE, use_buffers, kind=fused_ema.AveragedModel)


def test_an_update_is_one_launch(idle_calls):
    model, averaged = used(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))  # its counter is on the CPU
    check_steady(lambda: averaged.update_parameters(model), idle_calls)


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}], ids=["mean", "ema"])
def test_a_counter_on_the_gpu_is_not_waited_for(idle_calls, options):
    model, averaged = used(device=DEVICE, **options)
    call = lambda: averaged.update_parameters(model)  # noqa: E731
    call()
    on_device, calls = profile(call, 3)
    assert sum(count for name, count in on_device.items() if "ema_kernel" in name) == 3, on_device
    assert sum(on_device.values()) == 6, on_device  # and one that counts
    check_costs_nothing_else(calls, idle_calls)
    with raises_on_sync():
        for _ in range(5):
            call()
    assert averaged.n_averaged == 10


def test_a_counter_that_is_written_is_read_again():
    model, averaged = used(device=DEVICE)
    averaged.update_parameters(model)
    averaged.n_averaged.zero_()
    with torch.no_grad():
        model[0].weight.add_(1)
    averaged.update_parameters(model)
    assert averaged.n_averaged == 1
    assert torch.equal(all_bits(averaged.module), all_bits(model))


def test_averages_on_the_host():
    """PyTorch's code moves each tensor, as before."""
    _warning._warn_once.cache_clear()
    options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "device": "cpu"}
    with pytest.warns(UserWarning, match="the averages are on cpu and the model is on cuda:0"):
        model, ours = used(**options)
    theirs = swa_utils.AveragedModel(model, **options)
    theirs.update_parameters(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert torch.equal(all_bits(ours), all_bits(theirs))


def test_copies_go_on_alike():
    model, averaged = used(device=DEVICE)
    again = copy.deepcopy(averaged)
    for each in (averaged, again):
        each.update_parameters(model)
        each.update_parameters(model)
    assert torch.equal(all_bits(averaged), all_bits(again))
