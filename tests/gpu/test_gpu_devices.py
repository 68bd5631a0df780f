"""Pairs and decays on several devices: refused, or one launch for each."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_checks
import numpy as np
import pytest
import torch
from gpu_checks import DEVICE, check_steady, profile
from oracle import PAIRS, check_step, value_pair
from step_checks import clones

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_across_devices_is_refused(swapped):
    here, there = torch.ones(5), torch.zeros(5, device=DEVICE)
    ema, model = (there, here) if swapped else (here, there)
    same = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    with pytest.raises(ValueError, match=r"ema\['b'\].*expected.*on (cpu|cuda:0).*found.*on (cpu|cuda:0)"):
        fused_ema.update({"a": same[0], "b": ema}, {"a": same[1], "b": model}, 0.5)
    assert same[0].eq(1).all()
    assert here.eq(1).all()
    assert there.eq(0).all()


def test_a_decay_tensor_elsewhere_is_refused():
    ema, model = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    with pytest.raises(ValueError, match=r"decay: .* found one on cpu"):
        fused_ema.update([ema], [model], torch.tensor(0.5))
    here = torch.ones(5), torch.zeros(5)
    with pytest.raises(ValueError, match=r"decay: .* found one on cuda:0"):
        fused_ema.update([here[0]], [here[1]], torch.tensor(0.5, device=DEVICE))
    assert ema.eq(1).all()
    assert here[0].eq(1).all()


def on_cpu(tensors):
    return [tensor.cpu() for tensor in tensors]


def test_cpu_and_cuda_in_one_call(idle_calls):
    rng = np.random.default_rng(25)
    pairs = [value_pair(*pair, 5000, rng) for pair in PAIRS]
    pairs += [tuple(side.to(DEVICE) for side in pair) for pair in pairs]
    ema, model = (list(side) for side in zip(*pairs, strict=True))
    old = clones(ema)
    binding = fused_ema.bind(ema, model)
    assert binding.describe()["launches_per_update"] == 2
    binding.update(0.9)
    check_step(*map(on_cpu, (old, model, ema)), 0.9, bitwise=True)
    check_steady(lambda: binding.update(0.9), idle_calls)


@pytest.mark.parametrize("current", [0, 1])
def test_two_devices(current, idle_calls):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rng = np.random.default_rng(26)
    pairs = [value_pair(*pair, 5000, rng) for pair in PAIRS]
    pairs = [tuple(side.to(f"cuda:{i % 2}") for side in pair) for i, pair in enumerate(pairs)]
    ema, model = (list(side) for side in zip(*pairs, strict=True))
    old = clones(ema)
    with torch.cuda.device(current):
        binding = fused_ema.bind(ema, model)
        binding.update(0.9)
        assert torch.cuda.current_device() == current
    assert binding.describe()["launches_per_update"] == 2
    for device in (0, 1):
        torch.cuda.synchronize(device)
    check_step(*map(on_cpu, (old, model, ema)), 0.9, bitwise=True)
    on_device, _ = profile(lambda: binding.update(0.9), 3)
    assert sum(on_device.values()) == 6
    with pytest.raises(ValueError, match=r"ema\[0\].*cuda:1.*cuda:0"):
        fused_ema.update([torch.ones(3, device="cuda:0")], [torch.ones(3, device="cuda:1")], 0.5)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_fsdp2_on_one_device(where, tmp_path):
    script = Path(__file__).with_name("one_gpu.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NCCL_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, where], capture_output=True, text=True, timeout=100, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sharded as unsharded" in done.stdout
