"""Failures from outside, at each moment they can happen: memory runs out, a launch fails, Ctrl-C."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import all_averages, bits, forget_plans, interrupted_at, same_bits, versions
from oracle import check_step
from torch import nn

import fused_ema
from fused_ema import EMA
from fused_ema.plan import Plan

FOLDER = Path(__file__).parent
WAYS = ["function", "bound", "lists", "manager", "manager, stochastic"]


@pytest.mark.skipif(sys.platform != "linux", reason="it takes the dynamic linker of Linux")
def test_memory_runs_out_at_each_allocation(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: what makes allocations fail is compiled")
    library = tmp_path / "allocations.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, FOLDER / "allocations.cpp", "-o", library, "-ldl"], check=True)
    command = [sys.executable, FOLDER / "allocations.py"]
    done = subprocess.run(["env", f"LD_PRELOAD={library}", *command], capture_output=True, text=True, timeout=600)
    print(done.stdout)  # how many allocations there were
    assert done.stdout.endswith("done\n"), done.stderr[-5000:]


class Step:
    """One update of new tensors, in one of the ways. There are two: enough to see one averaged and the other not."""

    def __init__(self, way):
        torch.manual_seed(0)
        forget_plans()
        self.model = nn.Linear(3, 2).to(torch.bfloat16)
        self.ema = copy.deepcopy(self.model).float()
        dtype, rounding = (torch.bfloat16, "stochastic") if "stochastic" in way else (torch.float32, "nearest")
        self.manager = EMA(self.model, [0.9, 0.5], dtype=dtype, rounding=rounding)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(1)
        self.handle = fused_ema.bind(self.ema, self.model)
        self.model.weight = nn.Parameter(self.model.weight.detach() * 2)  # for the plan to take in
        self.is_manager, self.rounding = "manager" in way, rounding
        lists = [list(side.parameters()) for side in (self.ema, self.model)]
        self.call = {
            "function": lambda: fused_ema.update(self.ema, self.model, 0.9),
            "bound": lambda: self.handle.update(0.9),
            "lists": lambda: fused_ema.update(*lists, 0.9),
        }.get(way, self.manager.update)

    def averages(self):
        """The tensors of each average, in the model's order."""
        if not self.is_manager:
            return [[tensor.detach() for tensor in self.ema.parameters()]]
        return [[*average.values()] for average in all_averages(self.manager)]

    def check(self, old):
        model = [tensor.detach() for tensor in self.model.parameters()]
        if self.rounding == "nearest":
            for before, after, decay in zip(old, self.averages(), (0.9, 0.5), strict=False):
                check_step(before, model, after, decay, bitwise=False)


def copies(lists):
    return [[tensor.clone() for tensor in each] for each in lists]


def flat(lists):
    return [tensor for each in lists for tensor in each]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in some moments Python drops a Ctrl-C
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_at_each_moment(backend, way):
    """Either all tensors are averaged or none is. In pure PyTorch, which takes one after the other, each tensor has its
    old value or its new one. The next update is right in any case."""
    whole = Step(way)
    start = copies(whole.averages())
    whole.call()
    end = copies(whole.averages())
    moment = 1
    while True:
        step = Step(way)
        if not interrupted_at(moment, step.call):
            break
        now, step_now = step.averages(), step.manager.step
        if backend != "torch":
            assert any(all(map(torch.equal, flat(now), flat(state))) for state in (start, end)), moment
        for each, before, after in zip(*map(flat, (now, start, end)), strict=True):
            assert torch.equal(each, before) or torch.equal(each, after), f"moment {moment}: half of a tensor"
        assert step_now == 0 or (step.is_manager and all(map(torch.equal, flat(now), flat(end)))), moment
        old = copies(now)
        step.call()
        step.check(old)
        assert step.manager.step == step_now + step.is_manager
        moment += 1
    assert moment > 30


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_that_raises(backend, way, monkeypatch):
    """As when a launch fails, no step is counted, and the next call works."""
    step = Step(way)
    before, count = bits(*flat(step.averages())), versions(step.model, step.ema)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patched:
        patched.setattr(Plan, "try_run", fail)
        with pytest.raises(RuntimeError, match="launch failure"):
            step.call()
    assert same_bits(before, *flat(step.averages()))
    assert versions(step.model, step.ema) == count
    assert step.manager.step == 0
    old = copies(step.averages())
    step.call()
    step.check(old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exchange_that_is_interrupted_loses_nothing(backend):
    """Either all pairs are exchanged or none is; in pure PyTorch this holds for each pair."""
    moment = 1
    while True:
        ema, model = ([torch.full((3,), value + k) for k in range(3)] for value in (10.0, 20.0))
        start = [*zip(map(torch.clone, ema), map(torch.clone, model), strict=True)]
        if not interrupted_at(moment, lambda e=ema, m=model: fused_ema.swap_(e, m)):
            break
        states = set()
        for pair, before in zip(zip(ema, model, strict=True), start, strict=True):
            kept, exchanged = (all(map(torch.equal, pair, wanted)) for wanted in (before, before[::-1]))
            assert kept or exchanged, moment
            states.add(kept)
        assert backend == "torch" or len(states) == 1, moment
        moment += 1
    assert moment > 10
