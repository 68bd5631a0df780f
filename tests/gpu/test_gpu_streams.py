"""An update runs on the current stream, in its order, and its tables live as long as it does."""

import copy
import gc

import gpu_checks
import numpy as np
import torch
from gpu_checks import A_WHILE, DEVICE, mixed_modules
from oracle import check_step, same_bits, value_pair, values
from step_checks import clones

import fused_ema

pytestmark = gpu_checks.MARKS
kernel = gpu_checks.kernel


def test_runs_on_the_current_stream():
    """The update waits for earlier work on its own stream while the default stream reads the old average."""
    ema, model = torch.zeros(100_000, device=DEVICE), torch.ones(100_000, device=DEVICE)
    fused_ema.update([ema], [model], 0.5)
    ema.clone()  # so that no call below is the first of its kind, which loads code
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
    """One stream writes the model late, another updates the average, and the first one reads it."""
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
    """The tables of a plan that is dropped at once are not reused before its launches have read them."""
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
