"""Pairs that two runners share: PyTorch's own operations, and NVRTC's kernels on the stand-in for the driver."""

import oracle
import pytest
import stand_in
import torch
from conftest import bits, same_bits

from fused_ema.pairs.checks import Action
from fused_ema.runners import extension, foreach, nvrtc
from fused_ema.runners.base import Call, Job
from fused_ema.runners.several import Several
from fused_ema.runners.watch import SlotWatch

TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.fixture
def driver(monkeypatch):
    return stand_in.install(monkeypatch)


def share(types, other=None):
    """Averages, model, and what PyTorch's operations and another runner made of them, pair by pair in turn."""
    torch.manual_seed(0)
    ema, model = ([torch.randn(20, 5).to(pair[side]) for pair in types * 2] for side in (0, 1))
    ema, model = [*ema, torch.arange(3)], [*model, torch.arange(3) + 7]
    actions = [Action.AVERAGE] * 6 + [Action.COPY]
    job = Job([f"[{i}]" for i in range(7)], ema, model, actions, 1, [0] * 7)
    watch = (extension.load().CompiledWatch if other else SlotWatch)([], [ema, model])
    runners = [foreach.Foreach(), other or nvrtc.Nvrtc()]
    return ema, model, Several(job, watch, [runners[i % 2] for i in range(7)])


@pytest.fixture
def shared(driver):
    return share(TYPES)


@pytest.fixture
def of_one_type(driver):
    """Without scratch memory, of which a device has one: elsewhere two runners share no device."""
    return share([(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)])


def test_each_pair_is_updated_once(shared, driver):
    ema, model, pairs = shared
    old = [tensor.clone() for tensor in ema]
    versions = [tensor._version for tensor in ema]
    before = driver.launches()
    assert pairs.run(Call("update", (0.9,)))
    assert driver.launches() == before + 1
    oracle.check_step(old[:6], model[:6], ema[:6], 0.9, bitwise=False)
    assert torch.equal(ema[6], model[6])
    assert [tensor._version for tensor in ema] == [version + 1 for version in versions]
    assert pairs.run(Call("update", (0.9,)), ema, model)
    assert pairs.launches() == 1 + (1 + 3 + 2 + 1)  # one kernel, and PyTorch's operations on four pairs


@pytest.mark.parametrize("replaced", range(7))
@pytest.mark.parametrize("given", [False, True])
def test_nothing_is_written_where_one_of_them_no_longer_fits(shared, replaced, given):
    ema, model, pairs = shared
    model[replaced] = model[replaced].clone()
    before = bits(ema, model)
    assert not pairs.current()
    assert not (pairs.run(Call("update", (0.9,)), ema, model) if given else pairs.run(Call("update", (0.9,))))
    assert same_bits(before, ema, model)


def test_a_swap_is_undone(of_one_type):
    ema, model, pairs = of_one_type
    before = bits(ema, model)
    assert pairs.run(Call("swap"))
    assert pairs.exchanged()
    assert torch.equal(model[0], before[0].view(torch.float32).view(20, 5))
    assert pairs.run(Call("restore"))
    assert not pairs.exchanged()
    assert same_bits(before, ema, model)


def test_a_swap_that_failed_halfway_is_undone(of_one_type, driver):
    ema, model, pairs = of_one_type
    before = bits(ema, model)
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="cuLaunchKernel"):
        pairs.run(Call("swap"))
    driver.fail("", 0)
    assert pairs.exchanged()
    assert pairs.run(Call("restore"))
    assert same_bits(before, ema, model)


def test_only_what_was_swapped_is_restored():
    if extension.load() is None:
        pytest.skip(f"no native extension: {extension.why_not()}")
    ema, model, pairs = share([(torch.float32, torch.float32)] * 3, extension.Extension())
    before = bits(ema, model)
    first, _ = pairs._parts
    assert first.run(Call("swap"))
    assert not same_bits(before, ema, model)
    assert pairs.run(Call("restore"))
    assert same_bits(before, ema, model)
