"""Checks every pair of types, size, count and decay against exact arithmetic, and the kernels bit for bit."""

import math

import numpy as np
import pytest
import torch
from oracle import (
    DECAYS,
    FLOATS,
    PAIRS,
    check_step,
    error_over_bound,
    flat,
    same_bits,
    value_pair,
    values,
)
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
from torch.optim import swa_utils

import fused_ema
from fused_ema.runners import reference

pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")

only_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


# ---- One step: types, sizes, counts, decays ------------------------------------------------------


@pytest.mark.hazard(7, "good")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_sizes(backend, pair, decay):
    check_sizes("cpu", pair, decay, bitwise=backend != "torch")


@pytest.mark.hazard(10, "good")
@pytest.mark.parametrize("decay", [0.3, 0.9999])
@pytest.mark.parametrize("count", COUNTS)
def test_counts(backend, count, decay):
    check_count("cpu", count, decay, bitwise=backend != "torch")


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_the_check_sees_what_is_wrong(pair):
    """The check fails for an element that is off by a few units in the last place, and for a skipped last element."""
    ema, model = value_pair(*pair, 100, np.random.default_rng(3))
    ema[5], model[5], ema[-1], model[-1] = 1, 1.5, 1, 2
    new = ema.clone()
    fused_ema.update([new], [model], 0.9)
    check_step([ema], [model], [new], 0.9, bitwise=False)
    off, skipped = new.clone(), new.clone()
    off[5] *= 1 + 4 * torch.finfo(ema.dtype).eps
    skipped[-1] = ema[-1]
    for wrong in (off, skipped):
        with pytest.raises(AssertionError, match="error over bound"):
            check_step([ema], [model], [wrong], 0.9, bitwise=False)


@pytest.mark.hazard(4, "good")
@pytest.mark.hazard(5, "good")
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_layouts(backend, decay):
    check_layouts("cpu", decay, bitwise=backend != "torch")


# ---- NaN and Inf ---------------------------------------------------------------------------------


@pytest.mark.hazard(32, "good")
@pytest.mark.parametrize("decay", [0.0, 1e-6, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_nan_and_inf(backend, dtype, decay):
    check_non_finite("cpu", dtype, decay, kept=backend == "cpu")


def test_beyond_the_range_of_float16_is_inf(backend):
    ema = torch.ones(3, dtype=torch.float16)
    fused_ema.update([ema], [torch.tensor([1e6, -1e6, 6e4], dtype=torch.bfloat16)], 0.5)
    assert ema.tolist()[:2] == [math.inf, -math.inf]
    assert ema[2].isfinite()


# ---- copy_ and swap_ -----------------------------------------------------------------------------


def test_copy(backend):
    check_copy("cpu", fused_ema.copy_)


def test_swap(backend):
    check_swap("cpu")


# ---- Bits that depend on nothing but the values --------------------------------------------------


@only_cpu
def test_order_pieces_alignment(backend):
    check_order_pieces_alignment("cpu")


@only_cpu
@pytest.mark.parametrize("op", [lambda e, p: fused_ema.update(e, p, 0.99), fused_ema.copy_], ids=["update", "copy_"])
def test_thread_counts(backend, op):
    rng = np.random.default_rng(7)
    pairs = [value_pair(*pair, n, rng) for pair in PAIRS[::2] for n in (70_001, 1, 0, 33_000)]
    ema, model = (list(side) for side in zip(*pairs, strict=True))
    ema += [values(torch.float32, 40_000, rng).view(200, 200).t()]
    model += [values(torch.float32, 40_000, rng).view(200, 200)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(clones(ema))
            op(results[-1], model)
    finally:
        torch.set_num_threads(threads)
    assert not all(map(same_bits, results[0], ema))
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))


# ---- Decay as a tensor ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("decay", DECAYS)
def test_decay_tensor(backend, decay, dtype):
    check_device_decay("cpu", decay, dtype, bitwise=backend != "torch")


# ---- Many steps ----------------------------------------------------------------------------------


def mul_add(ema, model, decay):
    ema.mul_(decay).add_(model, alpha=1 - decay)


@pytest.mark.parametrize(("decay", "times"), [(0.9, 2), (0.999, 3), (0.9999, 10)])
def test_error_after_many_steps_is_a_fraction_of_that_of_mul_add(backend, decay, times):
    steps = 10_000 if backend == "cpu" else 2000
    generator = torch.Generator().manual_seed(10)
    models = [torch.randn(400, generator=generator) * 0.05 + 1 for _ in range(97)]
    ema, naive, true = models[0].clone(), models[0].clone(), models[0].double()
    model = models[0].clone()
    binding = fused_ema.bind([ema], [model])
    for step in range(steps):
        model.copy_(models[step % 97])
        binding.update(decay)
        mul_add(naive, model, decay)
        true.lerp_(model.double(), 1 - decay)
    error, naive_error = ((side.double() - true).square().mean().sqrt() for side in (ema, naive))
    assert error * times < naive_error
    assert error < 2.0**-24 / (1 - decay)  # half an ulp for each of the steps that an average remembers


# ---- Networks ------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """These tests train small networks, whose many short loops would mostly wait for threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("make", [residual_network, transformer])
def test_training(backend, make, buffers, model_dtype):
    check_training("cpu", make, buffers, model_dtype)


# ---- torch.optim.swa_utils -----------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(backend, use_buffers):
    check_averaged_model("cpu", use_buffers)


@pytest.mark.parametrize(
    ("ema_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_averaged_model_takes_one_step_of_the_formula(backend, ema_dtype, dtype):
    network = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)).to(dtype)
    function = fused_ema.get_ema_multi_avg_fn(0.99)
    averaged = swa_utils.AveragedModel(network, multi_avg_fn=function, use_buffers=True).to(ema_dtype)
    averaged.update_parameters(network)
    state = averaged.module.state_dict
    assert all(
        same_bits(average, tensor.to(average.dtype))
        for average, tensor in zip(state().values(), network.state_dict().values(), strict=True)
    )
    old = {name: tensor.clone() for name, tensor in state().items()}
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    try:
        averaged.update_parameters(network)
    except RuntimeError as error:  # raised by older AveragedModels before they call the function
        assert ema_dtype != dtype
        pytest.skip(f"this PyTorch's AveragedModel: {error}")
    moved = [name for name, tensor in old.items() if tensor.is_floating_point()]
    assert len(moved) == 6
    new, theirs = state(), network.state_dict()
    check_step(*([side[name] for name in moved] for side in (old, theirs, new)), 0.99, bitwise=backend != "torch")
    assert new["1.num_batches_tracked"] == 7


def test_the_bound_is_nearly_reached():
    """An error of half an ulp occurs, so the bound can't be tighter."""
    ema, model = value_pair(torch.float32, torch.float32, 20_000, np.random.default_rng(13))
    new = ema.clone()
    fused_ema.update([new], [model], 0.999)
    assert 0.99 < error_over_bound(*map(flat, ([ema], [model], [new])), 0.999, torch.float32).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("decay", DECAYS)
def test_a_decay_that_the_host_does_not_know(decay, dtype):
    """Pure PyTorch, as on a GPU without the kernel."""
    rng = np.random.default_rng(31)
    held = torch.tensor(decay, dtype=dtype)
    pairs = [value_pair(*pair, 999, rng) for pair in PAIRS]
    for average in (True, False):
        new = [ema.clone() for ema, _ in pairs]
        for ema, (_, model) in zip(new, pairs, strict=True):
            reference.update_(ema, model, held, average=average)
        old, model = zip(*pairs, strict=True)
        check_step(old, model, new, held.item() if average or held == 1 else 0.0, bitwise=False)
