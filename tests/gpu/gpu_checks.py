"""What the tests on a GPU share. Each file names the fixtures that it uses: `kernel = gpu_checks.kernel`."""

import contextlib
import itertools
import os
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import forget_plans
from oracle import PAIRS, reals, value_pair
from torch import nn

import fused_ema
from fused_ema.runners import extension as _native
from fused_ema.runners import nvrtc

DEVICE = "cuda"
MARKS = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")]
A_WHILE = 1_000_000_000  # cycles: about 0.5 s


@pytest.fixture(autouse=True, params=["cuda", "nvrtc"])
def kernel(request, monkeypatch):
    """Runs the test on the kernel that nvcc compiled, and on NVRTC's. Skips where there is no GPU or no such kernel,
    unless FUSED_EMA_GPU=1 or FUSED_EMA_CUDA=1 asks for it."""
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("FUSED_EMA_GPU") == "1" else pytest.skip)("no CUDA GPU")
    reason = _native.cuda_why_not() if request.param == "cuda" else nvrtc.Nvrtc().why_not("cuda")
    if reason:
        (pytest.fail if os.environ.get("FUSED_EMA_CUDA") == "1" else pytest.skip)(reason)
    if request.param == "nvrtc":
        forget_plans()
        compiled = _native.Extension.why_not
        monkeypatch.setattr(
            _native.Extension,
            "why_not",
            lambda self, kind: "the NVRTC runner is tested" if kind == "cuda" else compiled(self, kind),
        )
    assert fused_ema.backend() == fused_ema.backend(DEVICE) == request.param
    yield request.param
    torch.cuda.synchronize()  # a fault of this test's kernels is raised here, not in the next test
    forget_plans()


# CUPTI's own work, which the profiler may show among what ran on the device.
OVERHEADS = {
    "Activity Buffer Request",
    "Buffer Flush",
    "Command Buffer Full",
    "Driver Compiler",
    "Instrumentation",
    "Lazy Function Loading",
    "Resource",
    "Runtime Triggered Module Loading",
    "UVM Activity Init",
}


def profile(call, times):
    """Names of what ran on the device, and of the calls to the CUDA runtime, with their numbers."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(times):
            call()
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
    on_device, calls = Counter(), Counter()
    for event in profiler.events():
        if event.name in OVERHEADS:
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            on_device[event.name] += 1
        elif event.name.startswith("cu"):  # cudaLaunchKernel, cuLaunchKernelEx, ...
            calls[event.name] += 1
    return on_device, calls


@pytest.fixture(scope="module")
def idle_calls():
    """The runtime calls of a profile in which nothing runs. Also checks that the profiler counts at all."""
    if not torch.cuda.is_available():
        return Counter()
    x = torch.ones(100, device=DEVICE)
    profile(lambda: x.add_(1), 1)  # the first profile of a process loads CUPTI
    on_device, _ = profile(lambda: x.add_(1), 3)
    assert sum(on_device.values()) == 3, f"the profiler does not count kernels here: {on_device}"
    return profile(lambda: None, 1)[1]


def check_steady(call, idle_calls, times=3):
    """Each call is one kernel of ours and nothing else: no copy, no fill, no wait, no allocation."""
    call()  # makes the plan
    call()
    on_device, calls = profile(call, times)
    assert sum(on_device.values()) == times, on_device
    assert all("ema_kernel" in kernel for kernel in on_device), on_device
    assert any("Launch" in key for key in calls), calls  # the runtime's calls are seen
    check_costs_nothing_else(calls, idle_calls)

    torch.cuda.synchronize()
    before, memory = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_allocated()
    with raises_on_sync():
        for _ in range(10):
            call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.memory_allocated() == memory


def check_costs_nothing_else(calls, idle_calls):
    """No copy, no wait, no allocation among the calls to the CUDA runtime."""
    costly = ("Memcpy", "Memset", "Synchronize", "Malloc", "Free", "HostAlloc", "HostRegister")
    assert not {key: n for key, n in (calls - idle_calls).items() if any(word in key for word in costly)}


@contextlib.contextmanager
def raises_on_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def all_bits(module):
    """All bytes of a module in one tensor on its device, so that one comparison is enough."""
    return torch.cat([reals(tensor).view(torch.uint8) for tensor in module.state_dict().values()])


def mixed_modules(count, device):
    """`count` parameters of all pairs of types, and with every fourth of them a float buffer and an integer one."""
    rng = np.random.default_rng(22)
    ema, model = nn.Module(), nn.Module()
    for i, (pair, size) in enumerate(zip(itertools.cycle(PAIRS), rng.integers(1, 300, count), strict=False)):
        for module, value in zip((ema, model), value_pair(*pair, int(size), rng), strict=True):
            module.register_parameter(f"weight{i}", nn.Parameter(value.to(device)))
            if i % 4 == 0:
                module.register_buffer(f"mean{i}", torch.from_numpy(rng.normal(size=7)).float().to(device))
                module.register_buffer(f"steps{i}", torch.from_numpy(rng.integers(0, 99, 1)).to(device))
    return ema, model
