"""What goes wrong from outside, at each moment it can: memory runs out, a launch fails, Ctrl-C, a full disk."""

import copy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import bits, interrupted_at, same_bits, versions
from oracle import check_step
from torch import nn

import fused_ema
from fused_ema import EMA, functional
from fused_ema.plan import Plan

FAULTS = Path(__file__).with_name("faults")
WAYS = ["function", "bound", "lists", "manager", "manager, stochastic"]


@pytest.mark.skipif(sys.platform != "linux", reason="it takes the dynamic linker of Linux")
def test_memory_runs_out_at_each_allocation(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ not found: what makes allocations fail is compiled")
    library = tmp_path / "allocations.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, FAULTS / "allocations.cpp", "-o", library, "-ldl"], check=True)
    command = [sys.executable, FAULTS / "allocations.py"]
    done = subprocess.run(["env", f"LD_PRELOAD={library}", *command], capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr[-5000:]


class Step:
    """One update in a way of its own, of what is new at each time."""

    def __init__(self, way):
        torch.manual_seed(0)
        functional._module_plans.clear()
        functional._list_plans.clear()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
        self.ema = copy.deepcopy(self.model).float()
        dtype, rounding = (torch.bfloat16, "stochastic") if "stochastic" in way else (torch.float32, "nearest")
        self.manager = EMA(self.model, [0.9, 0.5], dtype=dtype, rounding=rounding)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(1)
        self.handle = fused_ema.bind(self.ema, self.model)
        self.model[0].weight = nn.Parameter(self.model[0].weight.detach() * 2)  # so that plans are made anew
        self.is_manager, self.rounding = "manager" in way, rounding
        lists = [list(side.parameters()) for side in (self.ema, self.model)]
        self.call = {
            "function": lambda: fused_ema.update(self.ema, self.model, 0.9),
            "bound": lambda: self.handle.update(0.9),
            "lists": lambda: fused_ema.update(*lists, 0.9),
        }.get(way, self.manager.update)

    def averages(self):
        """Of each, its tensors in the model's order."""
        if not self.is_manager:
            return [[tensor.detach() for tensor in self.ema.parameters()]]
        return [[*average.values()] for average in self.manager.state_dict()["averages"]]

    def check(self, old):
        model = [tensor.detach() for tensor in self.model.parameters()]
        if self.rounding == "nearest":
            for before, after, decay in zip(old, self.averages(), (0.9, 0.5), strict=False):
                check_step(before, model, after, decay, bitwise=False)


def copies(lists):
    return [[tensor.clone() for tensor in each] for each in lists]


def flat(lists):
    return [tensor for each in lists for tensor in each]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # moments at which Ctrl-C is lost
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_at_each_moment(backend, way):
    """All tensors are averaged or none is; by PyTorch, which takes one after the other, each is what it was or what it
    is to be. The next update is right in any case."""
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
        if backend == "cpu":
            assert any(all(map(torch.equal, flat(now), flat(state))) for state in (start, end)), moment
        for each, before, after in zip(*map(flat, (now, start, end)), strict=True):
            assert torch.equal(each, before) or torch.equal(each, after), f"moment {moment}: half of a tensor"
        assert step_now == 0 or step.is_manager
        old = copies(now)
        step.call()
        step.check(old)
        assert step.manager.step == step_now + step.is_manager
        moment += 1
    assert moment > 30


@pytest.mark.parametrize("way", WAYS)
def test_a_launch_that_fails(backend, way, monkeypatch):
    """No step is counted, and no plan is kept that counts as run."""
    step = Step(way)
    before, count = bits(*flat(step.averages())), versions(step.model, step.ema)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patched:
        patched.setattr(Plan, "run", fail)
        patched.setattr(Plan, "run_call", fail)
        with pytest.raises(RuntimeError, match="launch failure"):
            step.call()
    assert same_bits(before, *flat(step.averages()))
    assert versions(step.model, step.ema) == count
    assert step.manager.step == 0
    old = copies(step.averages())
    step.call()
    step.check(old)


FULL = """
    import resource, signal, sys
    import torch
    from torch import nn
    from fused_ema import EMA, schedules
    from fused_ema.checkpoints import save_safetensors
    from fused_ema.posthoc import save_snapshot

    folder, name = sys.argv[1:]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    model = nn.Linear(100, 100)
    ema = EMA(model, schedules.power_function(0.1))
    ema.update()
    def save():
        if name == "snapshot":
            save_snapshot(folder, ema)
        else:
            save_safetensors(f"{folder}/model.safetensors", ema)

    save()
    with torch.no_grad():
        model.weight.zero_()
    size = 4 * sum(tensor.numel() for tensor in model.parameters())
    for limit in (0, 1, 8, 200, size // 2, size - 1, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save()
        except Exception as error:
            print(type(error).__name__)
        else:
            sys.exit(f"nothing was said of {limit} bytes for {size}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("name", ["snapshot", "safetensors"])
def test_a_full_disk(tmp_path, name):
    """Files that may not grow, as on a disk without room: an error, the file of before, and no leftover."""
    from safetensors.torch import load_file

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path), name], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 7
    [path] = tmp_path.iterdir()
    assert any(tensor.any() for key, tensor in load_file(path).items() if "weight" in key)
