"""The CUDA kernel's numbers: the checks of test_numerics.py, and a comparison with the CPU bit for bit."""

from collections import Counter

import gpu_checks
import numpy as np
import pytest
import torch
from gpu_checks import DEVICE
from oracle import DECAYS, FLOATS, INNER_DECAYS, PAIRS, check_step, reals, same_bits, values
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

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel


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


# ---- The CPU's bits ----


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
    """One launch per batch. Whole storages are compared, so a write next to a tensor shows too."""
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
