"""NVRTC's kernels against nvcc's on one GPU, and from an empty cache."""

import gpu_checks
import pytest
import torch
from conftest import forget_plans
from gpu_checks import DEVICE, all_bits, check_steady, mixed_modules

import fused_ema
from fused_ema._build import kernels
from fused_ema.runners import driver
from fused_ema.runners import extension as _native

pytestmark = [*gpu_checks.MARKS, pytest.mark.parametrize("kernel", ["nvrtc"], indirect=True)]
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.3, 0.9999])
def test_same_bits_as_the_compiled_kernel(decay, monkeypatch):
    if reason := _native.cuda_why_not():
        pytest.skip(reason)
    ema, model = mixed_modules(300, DEVICE)
    twin = mixed_modules(300, DEVICE)[0]
    fused_ema.update(ema, model, decay)
    forget_plans()
    monkeypatch.undo()
    assert fused_ema.backend(DEVICE) == "cuda"
    fused_ema.update(twin, model, decay)
    assert torch.equal(all_bits(ema), all_bits(twin))


def test_from_an_empty_cache_and_from_a_full_one(tmp_path, monkeypatch, capsys, idle_calls):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "_images", {})
        driver.gpu.cache_clear()
        ema, model = mixed_modules(20, DEVICE)
        check_steady(lambda e=ema, m=model: fused_ema.update(e, m, 0.9), idle_calls)
        assert ("compiling the CUDA kernel 'update'" in capsys.readouterr().err) == compiled
    assert len([*kernels.kernels_folder().glob("*.bin")]) == 1
