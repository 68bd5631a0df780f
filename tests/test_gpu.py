"""The CUDA kernel: the numbers of tests/test_numerics.py, the CPU's bits, and what a launch costs and waits for."""

import contextlib
import copy
import gc
import itertools
import os
from collections import Counter

import numpy as np
import pytest
import torch
from oracle import DECAYS, FLOATS, INNER_DECAYS, PAIRS, check_step, reals, same_bits, value_pair, values
from step_checks import (
    COUNTS,
    check_averaged_model,
    check_copy,
    check_count,
    check_device_decay,
    check_layouts,
    check_non_finite,
    check_order_pieces_alignment,
    check_sizes,
    check_swap,
    check_training,
    clones,
    name,
    residual_network,
    transformer,
)
from torch import nn

import fused_ema
from fused_ema import _native

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")]

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def kernel():
    """Skips without a GPU, and without the CUDA kernel unless FUSED_EMA_CUDA=1 asks for it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if reason := _native.cuda_why_not():
        (pytest.fail if os.environ.get("FUSED_EMA_CUDA") == "1" else pytest.skip)(reason)
    assert fused_ema.backend() == fused_ema.backend(DEVICE) == "cuda"
    yield
    torch.cuda.synchronize()  # a fault of this test's kernels is raised here, not in the next test


# ---- The numbers: as on the CPU ------------------------------------------------------------------


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_sizes(pair, decay):
    check_sizes(DEVICE, pair, decay, bitwise=True)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("count", COUNTS)
def test_counts(count, decay):
    check_count(DEVICE, count, decay, bitwise=True)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_layouts(decay):
    check_layouts(DEVICE, decay, bitwise=True)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_nan_and_inf(dtype, decay):
    check_non_finite(DEVICE, dtype, decay)


def test_copy():
    check_copy(DEVICE, fused_ema.copy_)


def test_copy_by_a_device_decay_of_zero():
    """The same exact copies, with the types that an update allows."""
    rng = np.random.default_rng(20)
    pairs = [[values(dtype, 5000, rng).to(DEVICE) for dtype in pair] for pair in PAIRS]
    ema, model = (list(side) for side in zip(*pairs, strict=True))
    old = clones(ema)
    fused_ema.update(ema, model, torch.tensor(0.0, device=DEVICE))
    check_step(old, model, ema, 0.0, bitwise=True)


def test_swap():
    check_swap(DEVICE)


def test_order_pieces_alignment():
    check_order_pieces_alignment(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("decay", DECAYS)
def test_decay_tensor(decay, dtype):
    check_device_decay(DEVICE, decay, dtype, bitwise=True)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("make", [residual_network, transformer])
def test_training(make, buffers, model_dtype):
    check_training(DEVICE, make, buffers, model_dtype)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers):
    check_averaged_model(DEVICE, use_buffers)


# ---- The CPU's bits ------------------------------------------------------------------------------


def random_batch(rng, count):
    """Tensors of random pairs of types, sizes and alignments, in one storage for each type and side."""
    pairs = [PAIRS[i] for i in rng.integers(0, len(PAIRS), count)]
    sizes = np.where(rng.random(count) < 0.02, rng.integers(0, 20_000, count), rng.integers(0, 70, count)).tolist()
    offsets = rng.integers(0, 9, (count, 2)).tolist()
    ends = Counter()
    places = []
    for pair, size, gaps in zip(pairs, sizes, offsets, strict=True):
        for side in (0, 1):
            begin = ends[side, pair[side]] + gaps[side]
            ends[side, pair[side]] = begin + size
            places.append((side, pair[side], begin, begin + size))
    storages = {key: values(key[1], end + 4, rng) for key, end in ends.items()}
    for storage in storages.values():
        reals(storage)[::5] = 0.375  # so that a model equals its average now and then
    return storages, places


def views(storages, places):
    found = [storages[side, dtype][begin:end] for side, dtype, begin, end in places]
    return found[::2], found[1::2]


def check_same_as_cpu(device, batches, count):
    """One launch per batch. Whole storages are compared: nothing beside the tensors is written either."""
    rng = np.random.default_rng(21)
    for batch in range(batches):
        storages, places = random_batch(rng, count)
        here = {key: storage.clone() for key, storage in storages.items()}
        there = {key: storage.to(device, copy=True) for key, storage in storages.items()}
        decay = INNER_DECAYS[batch // 2 % len(INNER_DECAYS)] if batch % 2 else rng.random()
        fused_ema.update(*views(here, places), decay)
        fused_ema.update(*views(there, places), decay)
        for key, storage in storages.items():
            assert same_bits(there[key], here[key]), (key, decay, batch)
            is_model = key[0] == 1
            assert decay > 0.999 or same_bits(here[key], storage) == is_model, key


def test_same_bits_as_the_cpu_over_25000_cases():
    assert fused_ema.backend("cpu") == "cpu"
    check_same_as_cpu(DEVICE, batches=50, count=500)


# ---- Launches, copies, waits ---------------------------------------------------------------------


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
    """Runtime calls of a profile in which nothing runs; and a check that the profiler counts at all."""
    if not torch.cuda.is_available():
        return Counter()
    x = torch.ones(100, device=DEVICE)
    profile(lambda: x.add_(1), 1)  # the first profile of a process loads CUPTI
    on_device, _ = profile(lambda: x.add_(1), 3)
    assert sum(on_device.values()) == 3, f"the profiler does not count kernels here: {on_device}"
    return profile(lambda: None, 1)[1]


def check_steady(call, idle_calls, times=3):
    """Each call is one kernel of ours and nothing else: no copy, no fill, no wait, no allocation."""
    call()  # plans
    call()
    on_device, calls = profile(call, times)
    assert sum(on_device.values()) == times, on_device
    assert all("ema_kernel" in kernel for kernel in on_device), on_device
    assert any("Launch" in key for key in calls), calls  # the runtime's calls are seen
    costly = ("Memcpy", "Memset", "Synchronize", "Malloc", "Free", "HostAlloc", "HostRegister")
    assert not {key: n for key, n in (calls - idle_calls).items() if any(word in key for word in costly)}

    torch.cuda.synchronize()
    before, memory = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.memory_allocated()
    with raises_on_sync():
        for _ in range(10):
            call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.memory_allocated() == memory


@contextlib.contextmanager
def raises_on_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def mixed_modules(count, device):
    """`count` parameters of all pairs of types, and for each fourth a buffer: one of floats, one of integers."""
    rng = np.random.default_rng(22)
    ema, model = nn.Module(), nn.Module()
    for i, (pair, size) in enumerate(zip(itertools.cycle(PAIRS), rng.integers(1, 300, count), strict=False)):
        for module, value in zip((ema, model), value_pair(*pair, int(size), rng), strict=True):
            module.register_parameter(f"weight{i}", nn.Parameter(value.to(device)))
            if i % 4 == 0:
                module.register_buffer(f"mean{i}", torch.from_numpy(rng.normal(size=7)).float().to(device))
                module.register_buffer(f"steps{i}", torch.from_numpy(rng.integers(0, 99, 1)).to(device))
    return ema, model


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


def test_new_addresses_are_seen():
    ema, model = mixed_modules(50, DEVICE)
    for _ in range(3):
        fused_ema.update(ema, model, 0.9)
        for parameter in model.parameters():
            parameter.data = parameter.data.flip(0)
        old = clones(ema.parameters())
        fused_ema.update(ema, model, 0.9)
        check_step(old, list(model.parameters()), list(ema.parameters()), 0.9, bitwise=True)


# ---- Streams -------------------------------------------------------------------------------------

A_WHILE = 400_000_000  # cycles: about 0.2 s


def test_runs_on_the_current_stream():
    """The update waits for what its stream does, and meanwhile the default stream reads the old average."""
    ema, model = torch.zeros(100_000, device=DEVICE), torch.ones(100_000, device=DEVICE)
    fused_ema.update([ema], [model], 0.5)
    ema.clone()  # so that nothing below is the first of its kind, and loads code
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        fused_ema.update([ema], [model], 0.5)
        done = side.record_event()
    seen = ema.clone()
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the update did not wait for its own stream, or the machine is too slow for this test"
    assert seen.eq(0.5).all()
    torch.cuda.synchronize()
    assert ema.eq(0.75).all()


def test_events_order_streams():
    """A model written late on one stream, its average on another, read on the first."""
    rng = np.random.default_rng(23)
    ema, model = (side.to(DEVICE) for side in value_pair(torch.float32, torch.bfloat16, 300_000, rng))
    later, old = values(torch.bfloat16, 300_000, rng).to(DEVICE), ema.clone()
    binding = fused_ema.bind([ema], [model])
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(A_WHILE)
        model.copy_(later)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        binding.update(0.3)
    first.wait_stream(second)
    with torch.cuda.stream(first):
        new = ema.clone()
    torch.cuda.synchronize()
    check_step([old], [later], [new], 0.3, bitwise=True)


def test_plans_end_while_other_streams_still_run_them():
    """The tables of a plan that is dropped at once are not given to others before its launches have read them."""
    rng = np.random.default_rng(24)
    pairs = [value_pair(torch.float32, torch.float32, 500, rng) for _ in range(300)]
    ema, model = ([side.to(DEVICE) for side in one] for one in zip(*pairs, strict=True))
    old = clones(ema)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    binding = fused_ema.bind(ema, model)
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        binding.update(0.3)
    del binding
    gc.collect()
    trash = [torch.full((4096,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(500)]
    torch.cuda.synchronize()
    assert len(trash) == 500
    check_step(old, model, ema, 0.3, bitwise=True)


def test_two_streams_in_turns():
    ema, model = mixed_modules(100, DEVICE)
    expected = copy.deepcopy(ema)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for step in range(20):
        fused_ema.update(expected, model, 0.9)
        streams[step % 2].wait_stream(streams[1 - step % 2])
        with torch.cuda.stream(streams[step % 2]):
            fused_ema.update(ema, model, 0.9)
    torch.cuda.synchronize()
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle_calls")  # checks that the profiler counts
def test_graph_with_a_number():
    ema, model = mixed_modules(200, DEVICE)
    expected = copy.deepcopy(ema)
    fused_ema.update(expected, model, 1e-6)  # plans and uploads
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
        if step < 40:
            fused_ema.update(expected, model, decay.item())
            assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values())), step
        else:
            fused_ema.update(expected, model, decay)
    assert all(map(same_bits, ema.state_dict().values(), expected.state_dict().values()))


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


def test_graph_outlives_its_plan():
    """The captured launch reads its plan's tables, though the plan is gone and its memory could be anyone's."""
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


@pytest.mark.parametrize("planned", ["never", "before the model moved"])
@pytest.mark.parametrize("way", ["modules", "lists", "binding"])
def test_a_stale_plan_in_a_capture_is_refused(way, planned):
    """The error is caught inside the capture, which goes on and replays what else it holds."""
    ema, model = (residual_network()[0].to(DEVICE) for _ in range(2))
    good_ema, good_model = (torch.ones(1000, device=DEVICE) * x for x in (1, 2))
    counter = torch.zeros(1, device=DEVICE)
    fused_ema.update([good_ema], [good_model], 1.0)  # plans, and writes nothing
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
    # Outside of the capture the same call plans anew.
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

    with pytest.raises(RuntimeError, match="expected the tensors that were bound"):
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


# ---- Sizes beyond 32 bits ------------------------------------------------------------------------

HUGE = 2**31 + 18  # even; the other cases leave out its last element
CHUNK = 2**27


def fill(tensor, seed):
    """Values of a flat tensor that refilled() gives again, chunk by chunk."""
    for begin in range(0, len(tensor), CHUNK):
        tensor[begin : begin + CHUNK] = refilled(tensor, begin, seed)


def refilled(tensor, begin, seed):
    generator = torch.Generator(tensor.device).manual_seed(seed + begin)
    size = min(CHUNK, len(tensor) - begin)
    return torch.rand(size, generator=generator, device=tensor.device, dtype=tensor.dtype)


def check_huge(device, numel, layout):
    """Against updates of one chunk at a time, whose bits other tests check."""
    ema = torch.empty(numel, device=device)
    storage = torch.empty(numel + 1, device=device)
    fill(ema, 100)
    fill(storage, 200)
    if layout == "flat":
        averages, model = ema, storage[:-1]
    elif layout == "misaligned":
        averages, model = ema, storage[1:]
    else:
        averages, model = ema.view(-1, 2), storage[:-1].view(2, -1).t()
    fused_ema.update([averages], [model], 0.7)
    in_order = model.reshape(-1) if layout == "strided" else model
    for begin in range(0, numel, CHUNK):
        expected = refilled(ema, begin, 100)
        part = in_order[begin : begin + CHUNK].clone()
        fused_ema.update([expected], [part], 0.7)
        assert torch.equal(ema[begin : begin + CHUNK], expected), begin
    for begin in range(0, len(storage), CHUNK):
        assert torch.equal(storage[begin : begin + CHUNK], refilled(storage, begin, 200)), begin


@pytest.mark.parametrize("layout", ["flat", "misaligned", "strided"])
def test_more_than_2_to_the_31_elements(layout):
    needed = (12 if layout == "strided" else 8) * HUGE + 16 * CHUNK
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    check_huge(DEVICE, HUGE if layout == "strided" else HUGE - 1, layout)
    torch.cuda.empty_cache()


# ---- Devices -------------------------------------------------------------------------------------


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
