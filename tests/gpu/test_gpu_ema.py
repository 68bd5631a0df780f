"""The manager on a GPU: the CPU's bits, one launch for all averages, exchanges, averages in host memory."""

import copy

import gpu_checks
import numpy as np
import pytest
import torch
from gpu_checks import A_WHILE, DEVICE, check_costs_nothing_else, check_steady, profile
from oracle import FLOATS, HALF, same_bits, values
from step_checks import name, residual_network
from torch import nn

from fused_ema import EMA, schedules

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel
idle_calls = gpu_checks.idle_calls

SEVERAL = [0.9, schedules.tf_warmup(0.999), 0.25]
DECAYS = pytest.mark.parametrize(
    "decays", [SEVERAL[:1], SEVERAL, [*SEVERAL, 0.0, 1.0, 0.5, 0.75, 0.99]], ids=lambda decays: str(len(decays))
)
ROUNDINGS = [(dtype, "nearest") for dtype in FLOATS] + [(dtype, "stochastic") for dtype in HALF]


def make_model(dtype, device, seed=0):
    """Flat, channels-last and tied parameters, an odd one between them, and one of another type."""
    model = residual_network()[0].to(dtype)
    model[1].to(memory_format=torch.channels_last)
    model.odd = nn.Parameter(torch.empty(8191, dtype=dtype))
    model.large = nn.Parameter(torch.empty(3, 20_001, dtype=dtype))
    model.tied = model.large
    model.other = nn.Parameter(torch.empty(77, dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16))
    shake(model, seed)
    return model.to(device)


@torch.no_grad()
def shake(model, seed, spoil=False):
    """New values, the same on each device; with `spoil`, some that are not finite."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.copy_(values(parameter.dtype, parameter.numel(), rng, 10).view(parameter.shape))
        if spoil:
            drawn = torch.from_numpy(rng.random(tuple(parameter.shape))).to(parameter.device)
            parameter.masked_fill_(drawn < 0.05, torch.nan).masked_fill_(drawn > 0.95, -torch.inf)


def averages(ema):
    """All averages, by index and name."""
    return {(k, key): value for k, each in enumerate(ema.state_dict()["averages"]) for key, value in each.items()}


def assert_same(one, other):
    one, other = averages(one), averages(other)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert same_bits(value, other[key]), key


def check_same_as_cpu(on_device, decays, model_dtype, **options):
    skips = options.get("nonfinite") == "skip"
    here, there = (make_model(model_dtype, on) for on in ("cpu", on_device))
    emas = [EMA(model, decays, **options) for model in (here, there)]
    for step in range(5):
        for model, ema in zip((here, there), emas, strict=True):
            shake(model, step, spoil=skips)
            ema.update()
    assert_same(*emas)
    assert all(value.isfinite().all() for value in averages(emas[1]).values())
    moved = emas[0].averaged_state_dict(0)
    assert not any(same_bits(moved[key], parameter) for key, parameter in here.named_parameters())
    for k in range(len(decays)):
        own = [parameter.clone() for parameter in there.parameters()]
        with emas[0].swapped(k), emas[1].swapped(k):
            assert all(map(same_bits, here.parameters(), there.parameters()))
        assert all(map(same_bits, there.parameters(), own))
    assert_same(*emas)


# ---- The CPU's bits ----


@DECAYS
@pytest.mark.parametrize("model_dtype", FLOATS, ids=name)
@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS, ids=name)
def test_same_bits_as_the_cpu(decays, model_dtype, dtype, rounding):
    check_same_as_cpu(DEVICE, decays, model_dtype, dtype=dtype, rounding=rounding, seed=7)


@DECAYS
@pytest.mark.parametrize("model_dtype", FLOATS, ids=name)
@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS, ids=name)
def test_same_bits_as_the_cpu_where_the_model_is_not_finite(decays, model_dtype, dtype, rounding):
    check_same_as_cpu(DEVICE, decays, model_dtype, dtype=dtype, rounding=rounding, seed=7, nonfinite="skip")


@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS, ids=name)
def test_same_bits_in_host_memory(dtype, rounding):
    check_same_as_cpu(DEVICE, SEVERAL, torch.bfloat16, dtype=dtype, rounding=rounding, device="cpu")


def check_goes_on_elsewhere(device):
    """A state that is loaded on another device continues with the same bits; so does a manager that moves there."""
    options = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}
    models = [make_model(torch.bfloat16, on) for on in (device, "cpu", "cpu")]
    emas = [EMA(model, SEVERAL, **options) for model in models]
    for step in range(8):
        if step == 4:
            emas[1].load_state_dict(copy.deepcopy(emas[0].state_dict()))
            models[2].to(device)
            emas[2].to(device)
        for i, (model, ema) in enumerate(zip(models, emas, strict=True)):
            if i != 1 or step >= 4:
                shake(model, step)
                ema.update()
    assert_same(emas[0], emas[1])
    assert_same(emas[0], emas[2])
    assert {value.device.type for value in averages(emas[2]).values()} == {device}


def test_goes_on_elsewhere():
    check_goes_on_elsewhere(DEVICE)


# ---- Launches, copies, waits ----


@DECAYS
@pytest.mark.parametrize("where", [None, "cpu"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "stochastic")], ids=name)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_one_kernel_for_all_averages(decays, where, dtype, rounding, nonfinite, idle_calls):
    options = {"dtype": dtype, "rounding": rounding, "nonfinite": nonfinite}
    ema = EMA(make_model(torch.bfloat16, DEVICE), decays, **options, device=where)
    assert ema.describe()["backend"] == "cuda"
    assert ema.describe()["launches_per_update"] == 1
    check_steady(ema.update, idle_calls)


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_one_kernel_with_buffers(buffers, idle_calls):
    check_steady(EMA(make_model(torch.float32, DEVICE), SEVERAL, buffers=buffers).update, idle_calls)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=name)
def test_one_kernel_each_way(model_dtype, index, idle_calls):
    """And nothing else, whether the values change places or some of them go to scratch memory."""
    model = make_model(model_dtype, DEVICE)
    ema = EMA(model, SEVERAL)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]

    def there_and_back():
        with ema.swapped(index):
            assert [parameter.data_ptr() for parameter in model.parameters()] == addresses

    there_and_back()
    there_and_back()
    on_device, calls = profile(there_and_back, 3)
    assert sum(on_device.values()) == 6, on_device
    assert all("ema_kernel" in each for each in on_device), on_device
    check_costs_nothing_else(calls, idle_calls)


@pytest.mark.usefixtures("idle_calls")  # checks that the profiler counts
def test_no_kernel_where_nothing_moves():
    ema = EMA(make_model(torch.float32, DEVICE), [1.0, 1.0])
    on_device, _ = profile(ema.update, 3)
    assert not on_device
    assert ema.step == 3


def test_updates_run_on_the_current_stream():
    model = make_model(torch.float32, DEVICE)
    ema, twin = EMA(model, SEVERAL), EMA(model, SEVERAL)
    side = torch.cuda.Stream()
    shake(model, 1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        ema.update()
        done = side.record_event()
    twin.update()
    torch.cuda.current_stream().synchronize()
    assert not done.query(), "the update did not wait for its own stream, or the machine is too slow for this test"
    torch.cuda.synchronize()
    assert_same(ema, twin)


# ---- CUDA graphs ----


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=name)
def test_a_captured_forward_pass_sees_what_is_swapped_in(model_dtype):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)).to(DEVICE, model_dtype).requires_grad_(False)
    x = torch.randn(8, 64, device=DEVICE, dtype=model_dtype)
    ema = EMA(model, 0.5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    for parameter in model.parameters():
        parameter.neg_().mul_(2)
    ema.update()
    graph.replay()
    own = y.clone()
    torch.testing.assert_close(own, model(x))
    with ema.swapped():
        graph.replay()
        average = y.clone()
        torch.testing.assert_close(average, model(x))
    graph.replay()
    assert torch.equal(y, own)
    assert (average - own).abs().max() > 0.1


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=name)
def test_a_captured_update_and_swaps_between_its_replays(model_dtype):
    """The graph reads the addresses it was captured with, which no exchange changes."""
    model = make_model(model_dtype, DEVICE)
    ema, twin = EMA(model, [0.9, 0.25]), EMA(model, [0.9, 0.25])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    for step in range(4):
        shake(model, step)
        graph.replay()
        twin.update()
        with ema.swapped(step % 2), torch.no_grad():
            inside = [parameter.clone() for parameter in model.parameters()]
        with twin.swapped(step % 2):
            assert all(map(same_bits, model.parameters(), inside))
        assert_same(ema, twin)


# ---- Averages in host memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_memory_is_pinned_and_the_device_has_no_copy(dtype):
    """All averages of a model of 32 or 64 MiB are in host memory, and so are its own values while one is in it, if the
    types differ: the device holds only one more table."""
    model = nn.Linear(4096, 4096, device=DEVICE, dtype=dtype)
    own = model.weight.detach().cpu()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ema = EMA(model, SEVERAL, device="cpu")
    for _ in range(3):
        ema.update()
        with ema.swapped(1):
            pass
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert torch.equal(model.weight.detach().cpu(), own)
    for value in averages(ema).values():
        assert value.device.type == "cpu"
        assert value.is_pinned()


def test_the_host_reads_no_average_before_it_is_written():
    model = make_model(torch.float32, DEVICE)
    ema, twin = EMA(model, SEVERAL, device="cpu"), EMA(model, SEVERAL)
    for step, read in enumerate([averages, lambda each: each.averaged_state_dict(1)]):
        shake(model, step)
        torch.cuda.synchronize()
        torch.cuda._sleep(A_WHILE)
        ema.update()
        read(ema)
        assert torch.cuda.current_stream().query(), "still running"
        twin.update()
        assert_same(ema, twin)


# ---- Several devices ----


def split_model():
    model = nn.Sequential(nn.Linear(300, 200).to("cuda:0"), nn.Linear(200, 100).to("cuda:1"))
    return model.append(nn.Linear(100, 10).to("cuda:0"))


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("where", [None, "cpu"])
def test_averages_on_two_devices(where, current, idle_calls):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = {"dtype": torch.bfloat16, "rounding": "stochastic"}
    there = split_model()
    here = copy.deepcopy(there).to("cpu")
    with torch.cuda.device(current):
        emas = [EMA(here, SEVERAL, **options), EMA(there, SEVERAL, **options, device=where)]
        for step in range(4):
            for model, ema in zip((here, there), emas, strict=True):
                shake(model, step)
                ema.update()
        assert torch.cuda.current_device() == current
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert_same(*emas)
    if where is None:
        devices = {key: value.device for key, value in emas[1].state_dict()["averages"][2].items()}
        assert devices == {key: parameter.device for key, parameter in there.named_parameters()}
    assert emas[1].describe()["launches_per_update"] == 2
    on_device, _ = profile(emas[1].update, 3)
    assert sum(on_device.values()) == 6
    own = [parameter.clone() for parameter in there.parameters()]
    with emas[1].swapped(1):
        assert not any(map(same_bits, there.parameters(), own))
    assert all(map(same_bits, there.parameters(), own))
