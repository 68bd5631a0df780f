"""PyTorch's own operations on a GPU: their launches, the bound, streams and graphs."""

import gpu_checks
import numpy as np
import pytest
import torch
from conftest import forget_plans
from gpu_checks import DEVICE, profile
from oracle import INNER_DECAYS, PAIRS, check_step, value_pair

import fused_ema

pytestmark = gpu_checks.MARKS


@pytest.fixture(autouse=True)
def foreach(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    monkeypatch.setenv("FUSED_EMA_RUNNER", "foreach")
    forget_plans()
    yield
    torch.cuda.synchronize()
    forget_plans()


def tensors(count, elements, dtype=torch.float32):
    return [torch.randn(elements, device=DEVICE).to(dtype) for _ in range(count)]


@pytest.mark.parametrize(("count", "elements"), [(1, 10), (148, 1000), (2000, 256), (3, 5_000_000)])
def test_the_kernels_are_those_of_foreach_lerp(count, elements):
    ema, model = tensors(count, elements), tensors(count, elements)
    handle = fused_ema.bind(ema, model)
    assert handle.describe()["backend"] == "torch"
    handle.update(0.9), torch._foreach_lerp_(ema, model, 0.1)
    ours, calls = profile(lambda: handle.update(0.9), 3)
    theirs, _ = profile(lambda: torch._foreach_lerp_(ema, model, 0.1), 3)
    assert ours == theirs
    assert sum(ours.values())
    assert not [name for name in calls if "Memcpy" in name]


def test_mixed_pairs_copy_lerp_and_no_more():
    ema, model = tensors(148, 1000), tensors(148, 1000, torch.bfloat16)
    scratch = tensors(148, 1000)
    handle = fused_ema.bind(ema, model)

    def equivalent():
        torch._foreach_copy_(scratch, model)
        torch._foreach_lerp_(ema, scratch, 0.1)

    handle.update(0.9), equivalent()
    ours, _ = profile(lambda: handle.update(0.9), 3)
    theirs, _ = profile(equivalent, 3)
    assert sum(ours.values()) == sum(theirs.values()) > 0


def test_memory_of_an_update_is_bounded():
    ema, model = tensors(1, 200_000_000), tensors(1, 200_000_000, torch.bfloat16)
    handle = fused_ema.bind(ema, model)
    handle.update(0.9)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    handle.update(0.9)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20


def test_every_decay_keeps_the_bound():
    rng = np.random.default_rng(1)
    for decay in [*INNER_DECAYS, 0.1, 0.49, 0.51]:
        sides = [value_pair(*pair, 3000, rng) for pair in PAIRS]
        ema, model = ([side.to(DEVICE) for side in each] for each in zip(*sides, strict=True))
        old = [tensor.clone() for tensor in ema]
        fused_ema.update(ema, model, decay)
        check_step(old, model, ema, decay, bitwise=False)


def test_a_captured_update_replays():
    ema, model = tensors(3, 1000), tensors(3, 1000, torch.bfloat16)
    handle = fused_ema.bind(ema, model)
    handle.update(0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        handle.update(0.9)
    for tensor in model:
        tensor.normal_()
    old = [tensor.clone() for tensor in ema]
    graph.replay()
    torch.cuda.synchronize()
    check_step(old, model, ema, 0.9, bitwise=False)
