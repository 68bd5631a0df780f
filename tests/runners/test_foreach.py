"""PyTorch's own operations: which are called, how much memory they take, and what cuts pairs into pieces."""

import itertools
import os
import random
import subprocess
import sys

import oracle
import pytest
import torch
from conftest import bits, forget_plans, interrupted_at, same_bits
from oracle import HALF, INNER_DECAYS, PAIRS, check_step, value_pair
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fused_ema
from fused_ema.pairs.checks import Action
from fused_ema.runners import extension, foreach, groups, in_python, reference
from fused_ema.runners.base import Call, Job
from fused_ema.runners.foreach import Foreach
from fused_ema.runners.pieces import Piece, pieces

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("FUSED_EMA_RUNNER", "foreach")
    forget_plans(), groups._kept.clear()
    yield
    forget_plans(), groups._kept.clear()


@pytest.fixture(params=[64, 1 << 12], ids="{} bytes".format)
def small_scratch(request, monkeypatch):
    """So little scratch memory that the pairs of a test are cut into pieces."""
    monkeypatch.setattr(groups, "SCRATCH_CPU", request.param)
    return request.param


def prepared(ema, model, averages=1, strides=None):
    count = len(ema)
    job = Job([f"[{i}]" for i in range(count)], ema, model, [Action.AVERAGE] * count, averages, strides or [0] * count)
    return Foreach().prepare(job, None)


# ---- What is called ----


def operations(call):
    """PyTorch's operations in a call that the user could have written, with the bytes each of them has allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return [(event.name, max(0, event.cpu_memory_usage)) for event in profiled.events() if event.cpu_parent is None]


@pytest.mark.hazard(52, "good")
def test_pairs_of_one_type_are_one_call():
    ema, model = [torch.randn(3, 5) for _ in range(9)], [torch.randn(3, 5) for _ in range(9)]
    handle = fused_ema.bind(ema, model)
    handle.update(0.9)
    names = [name for name, _ in operations(lambda: handle.update(0.9))]
    assert names == ["aten::_foreach_lerp_"]


def test_buffers_are_copied_in_one_call():
    ema, model = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    handle = fused_ema.bind(ema, model)
    handle.update(0.9)
    names = [name for name, _ in operations(lambda: handle.update(0.9))]
    assert sorted(names) == ["aten::_foreach_copy_", "aten::_foreach_copy_", "aten::_foreach_lerp_"]  # floats, integers


@pytest.mark.parametrize("pair", [*PAIRS, (torch.bfloat16, torch.float32)], ids=str)
def test_no_update_allocates_as_much_as_a_tensor(pair):
    """Elements for which the scratch memory has to be filled several times."""
    ema, model = ([torch.ones(3 << 20, dtype=dtype)] for dtype in pair)
    pairs = prepared(ema, model)
    call = Call("update", (0.9,))
    assert pairs.run(call, ema, model)
    found = operations(lambda: pairs.run(call, ema, model))
    assert found
    assert sum(size for _, size in found) < 4096, found
    assert sum(size for _, size in operations(ema[0].clone)) >= ema[0].nbytes, "the profiler counts allocations"
    assert [memory.nbytes for memory in groups._kept] in ([], [groups.SCRATCH_CPU])
    assert groups.SCRATCH_CPU == 4 << 20


# ---- Pieces ----


LAYOUTS = {
    "flat": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("layouts", [*itertools.product(LAYOUTS, repeat=2)], ids="-".join)
@pytest.mark.parametrize("shape", [(1000,), (7, 11, 13), (1, 90, 9), (500, 1), (2, 2, 2, 2, 2, 20)], ids=str)
def test_pieces_cover_each_element_once(shape, layouts):
    for most in (1, 7, 64, 100, 5000):
        ema, model = (LAYOUTS[layout](torch.zeros(shape)) for layout in layouts)
        found = list(pieces(0, ema, model, most))
        for piece in found:
            assert piece.numel() <= most
            for side in (ema, model):
                part = piece.of(side)
                assert part.shape == piece.shape
                part += 1
        assert ema.eq(1).all()
        assert model.eq(1).all()
        ema.copy_(torch.arange(ema.numel()).view(shape)), model.copy_(ema)
        assert all(torch.equal(piece.of(ema), piece.of(model)) for piece in found)


@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("layouts", [*itertools.product(LAYOUTS, repeat=2)], ids="-".join)
def test_any_piece_is_averaged(small_scratch, layouts, decay):
    rng = np.random.default_rng(0)
    ema, model = [], []
    for pair in [*PAIRS, *oracle.NARROW_PAIRS]:
        e, p = value_pair(*pair, 3 * 5 * 70, rng)
        ema.append(LAYOUTS[layouts[0]](e.view(3, 5, 70)))
        model.append(LAYOUTS[layouts[1]](p.view(3, 5, 70)))
    pairs = prepared(ema, model)
    old, versions = [e.clone() for e in ema], [e._version for e in ema]
    assert pairs.run(Call("update", (decay,)), ema, model)
    check_step(old, model, ema, decay, bitwise=False)
    assert [e._version for e in ema] == [version + 1 for version in versions]


def test_pieces_are_exchanged_and_an_interrupt_between_them_loses_nothing(small_scratch, monkeypatch):
    types = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.complex64, torch.complex64)]
    ema, model = ([torch.randn(5, 300).to(pair[side]) for pair in types] for side in (0, 1))
    pairs = prepared(ema, model)
    before, averages = bits(ema, model), [e.clone() for e in ema]
    scratch = [torch.empty(size, dtype=torch.uint8, device=device) for device, size in pairs.scratch()]
    assert pairs.run(Call("swap", scratch=scratch), ema, model)
    assert all(torch.equal(p, e.to(p.dtype)) for p, e in zip(model, averages, strict=True))
    assert pairs.run(Call("restore", scratch=scratch), ema, model)
    assert same_bits(before, ema, model)

    left = 5
    of = Piece.of

    def stops(piece, tensor):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return of(piece, tensor)

    monkeypatch.setattr(Piece, "of", stops)
    with pytest.raises(KeyboardInterrupt):
        pairs.run(Call("swap", scratch=scratch), ema, model)
    assert pairs.exchanged()
    assert pairs.run(Call("restore", scratch=scratch), ema, model)
    assert not pairs.exchanged()
    assert same_bits(before, ema, model)


@pytest.mark.parametrize("decay", [0.25, 0.75])
@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("key", [(), (5,)], ids=["nearest", "stochastic"])
def test_no_tensor_stays_averaged_in_part(monkeypatch, pair, decay, key):
    """Wherever Ctrl-C arrives, though pairs are averaged piece by piece."""
    monkeypatch.setattr(groups, "SCRATCH_CPU", 64)
    monkeypatch.setattr(reference, "_BLOCK_CPU", 16)
    call = Call("update_stochastic" if key else "update", (decay,), None, key)
    start = [torch.randn(40).to(pair[0]), torch.randn(30).to(pair[0])]
    model = [torch.randn(40).to(pair[1]), torch.randn(30).to(pair[1])]
    whole = [each.clone() for each in start]
    prepared(whole, model).run(call, whole, model)
    moment, interrupts = 1, 0
    while True:
        ema = [each.clone() for each in start]
        pairs = prepared(ema, model)
        if not interrupted_at(moment, lambda e=ema, p=pairs: p.run(call, e, model)):
            break
        interrupts += 1
        for new, old, updated in zip(ema, start, whole, strict=True):
            assert torch.equal(new, old) or torch.equal(new, updated), moment
        moment += 1
    assert interrupts > 20


@pytest.mark.parametrize("size", [100, 3000])
def test_a_swap_raises_each_version_once(small_scratch, size):
    """Autograd then refuses a backward pass through the old values, whatever the tensors' size."""
    ema, model = nn.Linear(size, 1, bias=False), nn.Linear(size, 1, bias=False)
    x = torch.randn(2, size, requires_grad=True)
    y = model(x).sum()
    versions = [side.weight._version for side in (ema, model)]
    fused_ema.swap_(ema, model)
    assert [side.weight._version for side in (ema, model)] == [version + 1 for version in versions] or size < 1000
    assert all(side.weight._version > version for side, version in zip((ema, model), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_error_in_the_middle_averages_nothing_twice(monkeypatch):
    ema, model = [torch.zeros(3), torch.zeros(3)], [torch.ones(3).bfloat16(), torch.ones(3).bfloat16()]
    pairs = prepared(ema, model)
    lerp = torch._foreach_lerp_

    def fails(e, p, weight):
        lerp(e[:1], p[:1], weight)
        raise RuntimeError("another thread has changed the second")

    monkeypatch.setattr(torch, "_foreach_lerp_", fails)
    with pytest.raises(RuntimeError, match="another thread"):
        pairs.run(Call("update", (0.5,)), ema, model)
    assert ema[0].eq(0.5).all()
    assert ema[1].eq(0).all()


def test_an_update_in_a_signal_handler_has_scratch_memory_of_its_own(monkeypatch):
    ema, model = [torch.zeros(9)], [torch.ones(9).bfloat16()]
    others = [torch.full((9,), 100.0)], [torch.full((9,), 100.0).bfloat16()]
    lerp, handled = torch._foreach_lerp_, []

    def interrupted(*arguments):
        if not handled:
            handled.append(1)
            fused_ema.update(*others, 0.9)
        lerp(*arguments)

    fused_ema.update(*others, 0.9)
    monkeypatch.setattr(torch, "_foreach_lerp_", interrupted)
    for _ in range(2):
        ema[0].zero_(), handled.clear()
        fused_ema.update(ema, model, 0.5)
        assert handled
        assert ema[0].eq(0.5).all()


def test_a_fake_call_spoils_no_later_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    groups._kept.clear()
    ema, model = [torch.zeros(9)], [torch.ones(9).bfloat16()]
    handle = fused_ema.bind(ema, model)
    with pytest.raises(Exception, match="FakeTensor"), FakeTensorMode():
        handle._plan.try_run(Call("update", (0.5,)))
    fused_ema.update(ema, model, 0.5)
    assert ema[0].eq(0.5).all()


def test_a_device_decay_rounds_stochastically_too():
    """What a scaler that skips steps on the device gives a manager."""
    ema, model = [torch.ones(4000).bfloat16()], [torch.full((4000,), 1.5)]
    pairs = prepared(ema, model)
    keys, decay = random.Random(0), torch.tensor(0.999, dtype=torch.float64)
    for _ in range(100):
        assert pairs.run(Call("update_stochastic", (1.0,), decay, (keys.getrandbits(64),)), ema, model)
    assert abs(ema[0].double().mean().item() - (1.5 - 0.5 * 0.999**100)) < 1e-3
    before = ema[0].clone()
    for decay, expected in ((1.0, before), (0.0, model[0].bfloat16())):
        assert pairs.run(Call("update_stochastic", (1.0,), torch.tensor(decay), (7,)), ema, model)
        assert torch.equal(ema[0], expected)


def test_one_of_several_averages_takes_its_own_device_decay():
    ema = [torch.zeros(2 * 128)[:100]]
    second, model = ema[0].as_strided((100,), (1,), 128), [torch.ones(100)]
    pairs = prepared(ema, model, averages=2, strides=[128])
    assert pairs.run(Call("update", (1.0,), torch.tensor([0.5, 1.0]), average=1), ema, model)
    assert not second.any()


def test_rare_ways_allocate_no_temporary_of_a_tensors_size():
    model = nn.ParameterList([torch.ones(1500, 1501).bfloat16()[:, :1500]])
    manager = fused_ema.EMA(model, 0.9, dtype=torch.bfloat16, rounding="stochastic")
    handle = fused_ema.bind([torch.zeros(1500, 1501)[:, :1500]], [torch.ones(1500, 1500)])
    decay = torch.tensor(0.9)
    pairs = handle._plan.prepared
    call = Call("update", (1.0,), decay)
    for step in (manager.update, lambda: pairs.run(call)):
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        largest = max(event.cpu_memory_usage for event in profiled.events())
        assert 0 < largest <= 1 << 20 < model[0].nbytes, largest


# ---- Numbers ----


def test_every_decay_keeps_the_bound():
    """Small decays too, where `_foreach_lerp_` alone breaks it."""
    rng = np.random.default_rng(1)
    for decay in [*INNER_DECAYS, 0.1, 0.49, 0.51, *rng.uniform(0, 1, 20), *10.0 ** -rng.uniform(0, 12, 20)]:
        sides = [value_pair(*pair, 3000, rng) for pair in [*PAIRS, *oracle.NARROW_PAIRS]]
        ema, model = map(list, zip(*sides, strict=True))
        old = [e.clone() for e in ema]
        assert prepared(ema, model).run(Call("update", (float(decay),)), ema, model)
        check_step(old, model, ema, float(decay), bitwise=False)


WITHOUT_FMA = """
import sys
sys.path[:0] = sys.argv[1:]
import numpy as np
import oracle, torch, fused_ema
from fused_ema.runners import groups
assert not groups._lerp_is_fused(), torch.backends.cpu.get_cpu_capability()
rng = np.random.default_rng(2)
for decay in (0.1, 0.5, 0.9, 0.9999):
    ema, model = map(list, zip(*(oracle.value_pair(*pair, 3000, rng) for pair in oracle.PAIRS)))
    old = [e.clone() for e in ema]
    fused_ema.update(ema, model, decay)
    oracle.check_step(old, model, ema, decay, bitwise=False)
print("kept")
"""


def test_a_cpu_without_fma_keeps_the_bound():
    folders = [os.path.dirname(oracle.__file__), os.path.dirname(os.path.dirname(fused_ema.__file__))]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FMA, *folders], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "kept\n", done.stderr


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_rounding_gives_the_kernels_bits(dtype, monkeypatch):
    if extension.load() is None:
        pytest.skip(f"no native extension: {extension.why_not()}")
    model = nn.ParameterList([torch.randn(40, 50), torch.randn(7).bfloat16(), torch.randn(9, dtype=torch.float64)])
    managers = []
    for runner in ("foreach", "extension"):
        monkeypatch.setenv("FUSED_EMA_RUNNER", runner)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model:
                parameter.normal_()
        managers.append(fused_ema.EMA(model, 0.99, dtype=dtype, rounding="stochastic"))
        for _ in range(5):
            with torch.no_grad():
                for parameter in model:
                    parameter.normal_()
            managers[-1].update()
    ours, theirs = (manager.state_dict()["averages"][0] for manager in managers)
    assert all(oracle.same_bits(ours[name], theirs[name]) for name in ours)


def test_a_failed_allocation_of_scratch_memory_writes_nothing(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError

    ema, model = [torch.zeros(9), torch.zeros(9)], [torch.ones(9), torch.ones(9).bfloat16()]
    pairs = prepared(ema, model)
    monkeypatch.setattr(foreach, "borrow", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        pairs.run(Call("update", (0.5,)), ema, model)
    assert not any(map(torch.any, ema))


# ---- What the look at tensors costs, and sees ----


@pytest.fixture
def slow_looks(monkeypatch):
    """Counts how often the records of all tensors were compared one by one."""
    seen = []
    record = in_python._record
    monkeypatch.setattr(in_python, "_record", lambda tensor: (seen.append(1), record(tensor))[1])
    return seen


def test_unchanged_tensors_are_seen_by_loops_in_c(slow_looks):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.tied = model[0].weight
    manager = fused_ema.EMA(model, 0.9)
    manager.update(), manager.update()
    slow_looks.clear()
    with torch.no_grad():
        manager.update()
    manager.update()
    assert not slow_looks


@pytest.mark.parametrize("guards", [True, False])
def test_another_mode_is_seen_and_learned(slow_looks, monkeypatch, guards):
    """torch.compile's guards do not fit under autocast, or may be gone; the records then decide."""
    if not guards:
        monkeypatch.setattr(in_python, "_TensorGuards", None)
    ema, model = [torch.zeros(3)], [torch.ones(3)]
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            slow_looks.clear()
            handle.update(0.5)
        assert bool(slow_looks) is not guards
    handle.update(0.5)
    assert ema[0].eq(1 - 0.5**4).all()


def test_a_tensor_that_came_twice_is_seen_to_part():
    first, second = torch.ones(3), torch.ones(3) * 2
    ema = [torch.zeros(3), torch.zeros(3)]
    pairs = prepared([ema[0], ema[0]], [first, first])
    for _ in range(2):
        assert pairs.run(Call("update", (0.5,)), [ema[0], ema[0]], [first, first])
    assert not pairs.run(Call("update", (0.5,)), ema, [first, first])
    assert not pairs.run(Call("update", (0.5,)), [ema[0], ema[0]], [first, second])
    assert not pairs.run(Call("update", (0.5,)), [ema[0], ema[0].view(1, 3)], [first, first.view(1, 3)])
    assert pairs.run(Call("update", (0.5,)), [ema[0], ema[0].detach()], [first, first])


def test_inference_mode_does_not_spoil_the_scratch_memory():
    groups._kept.clear()
    ema, model = [torch.zeros(9)], [torch.ones(9).bfloat16()]
    with torch.inference_mode():
        fused_ema.update(ema, model, 0.5)
    fused_ema.update(ema, model, 0.5)
    assert ema[0].eq(0.75).all()


def test_a_default_device_changes_nothing():
    groups._kept.clear(), groups._lerp_is_fused.cache_clear()
    ema, model = [torch.zeros(9)], [torch.ones(9).bfloat16()]
    with torch.device("meta"):
        fused_ema.update(ema, model, 0.5)
    assert ema[0].eq(0.5).all()
