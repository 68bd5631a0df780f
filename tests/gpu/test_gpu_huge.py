"""Tensors beyond 2^31 elements on a GPU."""

import gc

import gpu_checks
import pytest
import torch
from gpu_checks import DEVICE

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel


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
    """Compares with updates of one chunk at a time, whose bits other tests check."""
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
