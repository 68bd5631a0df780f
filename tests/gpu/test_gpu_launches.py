"""What a call costs on a GPU: one kernel, no copy, no wait, no allocation."""

import gpu_checks
import pytest
import torch
from gpu_checks import DEVICE, check_steady, mixed_modules, profile
from oracle import check_step, same_bits
from step_checks import clones, residual_network

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls


@pytest.mark.parametrize("decay", [0.99, "tensor"])
@pytest.mark.parametrize("count", [1, 449, 2000])
@pytest.mark.parametrize("way", ["modules", "binding", "dicts", "lists"])
def test_one_kernel_and_nothing_else(way, count, decay, idle_calls):
    ema, model = mixed_modules(count, DEVICE)
    decay = torch.tensor(0.99, device=DEVICE) if decay == "tensor" else decay
    if way == "binding":
        binding = fused_ema.bind(ema, model)
        about = binding.describe()
        assert (about["backend"], about["launches_per_update"]) == ("cuda", 1)
        assert about["tensors"] == count + 2 * len(range(0, count, 4))
        return check_steady(lambda: binding.update(decay), idle_calls)
    if way == "dicts":
        ema, model = (dict(side.named_parameters()) for side in (ema, model))
    elif way == "lists":
        ema, model = (list(side.parameters()) for side in (ema, model))
    check_steady(lambda: fused_ema.update(ema, model, decay), idle_calls)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_one_kernel_with_buffers(buffers, idle_calls):
    ema, model = (residual_network()[0].to(DEVICE) for _ in range(2))
    check_steady(lambda: fused_ema.update(ema, model, 0.99, buffers=buffers), idle_calls)


@pytest.mark.parametrize("op", [fused_ema.copy_, fused_ema.swap_])
def test_one_kernel_to_copy_and_to_swap(op, idle_calls):
    ema, model = (residual_network()[0].to(DEVICE) for _ in range(2))
    check_steady(lambda: op(ema, model), idle_calls)


def test_one_kernel_for_strided_and_large_tensors(idle_calls):
    ema = [torch.randn(300, 500, device=DEVICE).t(), torch.randn(5_000_001, device=DEVICE)[1:]]
    model = [torch.randn(500, 300, device=DEVICE), torch.randn(5_000_000, device=DEVICE).bfloat16()]
    check_steady(lambda: fused_ema.update(ema, model, 0.99), idle_calls)


@pytest.mark.usefixtures("idle_calls")  # checks that the profiler counts
def test_no_kernel_at_decay_one():
    ema, model = mixed_modules(20, DEVICE)
    fused_ema.update(ema, model, 0.5)
    on_device, _ = profile(lambda: fused_ema.update(ema, model, 1.0), 3)
    assert not on_device


def test_a_device_decay_of_one_writes_nothing():
    ema, model = mixed_modules(50, DEVICE)
    old = clones(ema.state_dict().values())
    for dtype in (torch.float32, torch.float64):
        fused_ema.update(ema, model, torch.tensor(1.0, dtype=dtype, device=DEVICE))
        assert all(map(same_bits, ema.state_dict().values(), old))
    fused_ema.update(ema, model, 0.5)
    assert not any(map(same_bits, ema.parameters(), model.parameters()))
    assert all(map(same_bits, ema.buffers(), model.buffers()))


def test_no_memory_for_the_tables():
    """They take more than a megabyte, for which the allocator has to ask the device."""
    averages, parameters = torch.zeros(20_000, 4, device=DEVICE), torch.ones(20_000, 4, device=DEVICE)
    ema, model = averages.unbind(), parameters.unbind()
    torch.cuda.empty_cache()
    share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fused_ema.update(ema, model, 0.5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert averages.eq(0).all()
    assert averages._version == 0
    fused_ema.update(ema, model, 0.5)
    assert averages.eq(0.5).all()


def test_new_addresses_are_seen():
    ema, model = mixed_modules(50, DEVICE)
    for _ in range(3):
        fused_ema.update(ema, model, 0.9)
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)
        old = clones(ema.parameters())
        fused_ema.update(ema, model, 0.9)
        check_step(old, list(model.parameters()), list(ema.parameters()), 0.9, bitwise=True)
