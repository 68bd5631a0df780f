"""Updates captured in CUDA graphs."""

import copy
import gc

import gpu_checks
import pytest
import torch
from gpu_checks import DEVICE, all_bits, mixed_modules, profile
from oracle import DECAYS, check_step, same_bits
from step_checks import clones, name, residual_network
from torch import nn

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls


@pytest.mark.usefixtures("idle_calls")  # checks that the profiler counts
def test_graph_with_a_number():
    ema, model = mixed_modules(200, DEVICE)
    expected = copy.deepcopy(ema)
    fused_ema.update(expected, model, 1e-6)  # makes the plan and uploads its tables
    fused_ema.update(ema, model, 1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_ema.update(ema, model, 0.9)
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values())), "capturing ran it"
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.75)
        graph.replay()
        fused_ema.update(expected, model, 0.9)
        assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))
    on_device, _ = profile(graph.replay, 3)
    assert sum(n for kernel, n in on_device.items() if "ema_kernel" in kernel) == 3, on_device
    # Some versions of torch fill in the random seed of the graph at each replay.
    assert all("ema_kernel" in kernel or "FillFunctor" in kernel for kernel in on_device), on_device


@pytest.mark.hazard(27, "good")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_graph_with_a_decay_that_changes(dtype):
    ema, model = mixed_modules(200, DEVICE)
    expected = copy.deepcopy(ema)
    decay = torch.tensor(0.5, dtype=dtype, device=DEVICE)
    fused_ema.update(expected, model, decay)
    fused_ema.update(ema, model, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_ema.update(ema, model, decay)
    for step in range(1000):
        decay.fill_(DECAYS[step // 2 % len(DECAYS)] if step % 2 else (1 + step) / (10 + step))
        with torch.no_grad():
            model.weight1.add_(0.01)
        graph.replay()
        fused_ema.update(expected, model, decay.item() if step < 40 else decay)
        assert torch.equal(all_bits(ema), all_bits(expected)), step


def test_graph_of_a_binding_that_was_never_run():
    ema, model = mixed_modules(50, DEVICE)
    expected = copy.deepcopy(ema)
    fused_ema.update(expected, model, 0.9)
    binding = fused_ema.bind(ema, model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        binding.update(0.9)
    graph.replay()
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))


def test_prepare_makes_a_stale_binding_ready():
    ema, model = mixed_modules(50, DEVICE)
    expected = copy.deepcopy(ema)
    binding = fused_ema.bind(ema, model)
    model.weight1 = nn.Parameter(model.weight1.detach() * 2)
    binding.prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        binding.update(0.9)
    graph.replay()
    fused_ema.update(expected, model, 0.9)
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))


def test_graph_outlives_its_plan():
    """The captured launch reads the tables of its plan, even after the plan is gone and its memory could be reused."""
    ema, model = mixed_modules(50, DEVICE)
    expected = copy.deepcopy(ema)
    binding = fused_ema.bind(ema, model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        binding.update(0.9)
    del binding
    gc.collect()
    sizes = [2**power for power in range(9, 18) for _ in range(40)]
    trash = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in sizes]
    graph.replay()
    fused_ema.update(expected, model, 0.9)
    assert len(trash) == len(sizes)
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))


@pytest.mark.hazard(27, "guarded")
@pytest.mark.parametrize("planned", ["never", "before the model moved"])
@pytest.mark.parametrize("way", ["modules", "lists", "binding"])
def test_a_stale_plan_in_a_capture_is_refused(way, planned):
    """The error is caught inside the capture, which goes on and replays what else it holds."""
    ema, model = (residual_network()[0].to(DEVICE) for _ in range(2))
    good_ema, good_model = (torch.ones(1000, device=DEVICE) * x for x in (1, 2))
    counter = torch.zeros(1, device=DEVICE)
    fused_ema.update([good_ema], [good_model], 1.0)  # makes the plan and writes nothing
    sides = (ema, model) if way != "lists" else (list(ema.parameters()), list(model.parameters()))
    binding = fused_ema.bind(*sides)
    if planned != "never":
        fused_ema.update(*sides, 0.9)
        binding.update(0.9)
        model[0].weight.data = model[0].weight.data.clone()
    elif way == "binding":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    torch.cuda.synchronize()
    old = clones(ema.state_dict().values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counter.add_(1)
        with pytest.raises(RuntimeError, match="capture"):
            binding.update(0.9) if way == "binding" else fused_ema.update(*sides, 0.9)
        fused_ema.update([good_ema], [good_model], 0.5)
    graph.replay()
    graph.replay()
    assert good_ema.eq(1.75).all()
    assert all(map(same_bits, ema.state_dict().values(), old))
    # Outside the capture the same call makes a new plan.
    binding.update(0.9) if way == "binding" else fused_ema.update(*sides, 0.9)
    before = dict(zip(ema.state_dict(), old, strict=True))
    after = dict(ema.named_parameters())
    check_step([before[key] for key in after], list(model.parameters()), list(after.values()), 0.9, bitwise=True)
    assert counter.item() == 2


def test_a_refusal_that_leaves_the_capture_ends_it():
    ema, model = (torch.ones(10, device=DEVICE) * x for x in (1, 2))
    x = torch.zeros(1, device=DEVICE)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
            fused_ema.update([ema], [model], 0.5)

    with pytest.raises(RuntimeError, match="can't be uploaded during a CUDA graph capture"):
        capture()
    assert not torch.cuda.is_current_stream_capturing()
    assert ema.eq(1).all()
    fused_ema.update([ema], [model], 0.5)
    assert ema.eq(1.5).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_ema.update([ema], [model], 0.5)
    graph.replay()
    assert ema.eq(1.75).all()
