"""Makes the first allocation of a call fail, then the second, and so on, through allocations.cpp, which is preloaded.

Each failure has to raise an exception and leave every byte and version as before, and the same call then has to
succeed. Prints how many allocations failed in each call.
"""

import copy
import ctypes
import itertools
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracle
from conftest import all_averages, bits, forget_plans, same_bits, tensors_of, versions

import fused_ema
from fused_ema.runners import extension as _native

preloaded = ctypes.CDLL(None)
preloaded.look_at.argtypes = preloaded.spare.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
preloaded.fail_at.argtypes, preloaded.until_failure.restype = [ctypes.c_long], ctypes.c_long


def with_failure(n, call):
    """Lets the n-th allocation of `call` fail. Returns whether there was one, and whether the call raised."""
    preloaded.fail_at(n)
    raised = True
    try:
        call()
        raised = False
    except MemoryError:
        pass
    except RuntimeError as error:
        if "memory" not in str(error) and "alloc" not in str(error):
            raise
    finally:
        reached = preloaded.until_failure() == 0
        preloaded.fail_at(0)
    assert reached or not raised, "an error without a failure"
    return reached, raised


def sweep(what, prepare, *, swaps=False):
    """`prepare` returns the call, what it must not change where it raises, and a check of its result."""
    for n in itertools.count(1):
        call, untouched, check = prepare()
        before, versions_before = bits(*untouched), versions(*untouched)
        reached, raised = with_failure(n, call)
        if raised:
            assert same_bits(before, *untouched), f"{what}: written, though allocation {n} failed"
            assert swaps or versions(*untouched) == versions_before, (
                f"{what}: other versions, though allocation {n} failed"
            )
            call()
        check()  # also where the call succeeded without the memory
        if not reached:
            print(f"{what}: {n - 1} allocations")
            assert n > 2, "no allocation was seen"
            return


def look_at(library):
    """Makes only allocations inside the extension fail. Those by which pybind11 creates and registers an object are
    spared, because a failure there would end the process."""
    maps = [line for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if line.endswith(library)]
    addresses = [int(each, 16) for line in maps for each in line.split()[0].split("-")]
    preloaded.look_at(min(addresses), max(addresses))
    listed = subprocess.run(["nm", "-SC", library], check=True, capture_output=True, text=True).stdout
    pattern = r"^(\w+) (\w+) \w .*(?:::init_instance|make_new_instance|pybind11_object_new)\b"
    functions = re.findall(pattern, listed, re.M)
    assert functions
    for begin, size in functions:
        preloaded.spare(min(addresses) + int(begin, 16), min(addresses) + int(begin, 16) + int(size, 16))


def modules(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[2].weight.t().contiguous().t())  # strided, so that it gets a layout record
    ema = copy.deepcopy(model).float()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    return ema, model.to(dtype)


def updated(ema, model, decay=0.9):
    old = [tensor.detach().clone() for tensor in ema.parameters()]

    def check():
        theirs = [tensor.detach() for tensor in model.parameters()]
        oracle.check_step(old, theirs, [tensor.detach() for tensor in ema.parameters()], decay, bitwise=True)

    return check


def planning(dtype, kind):
    def prepare():
        forget_plans()
        ema, model = modules(dtype)
        sources = [list(side.parameters()) if kind == "lists" else side for side in (ema, model)]
        return lambda: fused_ema.update(*sources, 0.9), (ema, model), updated(ema, model)

    return prepare


def replacing():
    ema, model = modules(torch.float32)
    handle = fused_ema.bind(ema, model)
    handle.update(1.0)
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    return lambda: handle.update(0.9), (ema, model), updated(ema, model)


def managing():
    _, model = modules(torch.bfloat16)
    manager = fused_ema.EMA(model, [0.9, 0.5])
    model[0].weight = nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16))
    averages = all_averages(manager)
    old = [{name: tensor.clone() for name, tensor in average.items()} for average in averages]
    step = manager.step

    def check():
        assert manager.step == step + 1
        model_now = dict(model.named_parameters())
        for before, now, decay in zip(old, all_averages(manager), (0.9, 0.5), strict=True):
            theirs = [model_now[name].detach() for name in before]
            oracle.check_step([*before.values()], theirs, [now[name] for name in before], decay, bitwise=True)

    return manager.update, (model, *averages), check


def swapping(dtype, replaced):
    def prepare():
        _, model = modules(dtype)
        manager = fused_ema.EMA(model, [0.9, 0.5])
        averages = all_averages(manager)
        with torch.no_grad():
            for tensor in tensors_of(averages[1]):
                tensor.add_(1)
        raw = [tensor.detach().clone() for tensor in model.parameters()]
        true = bits(*averages)
        ran = []

        def call():
            with manager.swapped(1):
                ran.append([tensor.detach().clone() for tensor in model.parameters()])
                if replaced:
                    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))

        def check():
            assert same_bits(true, *averages)
            assert all(map(oracle.same_bits, raw, (tensor.detach() for tensor in model.parameters())))
            assert manager.describe()["swapped"] is None
            averaged = [average.to(dtype) for average in averages[1].values()]
            assert all(map(oracle.same_bits, ran[-1], averaged))

        return call, averages, check

    return prepare


if __name__ == "__main__":
    extension = _native.load()
    assert extension, _native.why_not()
    look_at(extension.__file__)
    torch.set_num_threads(1)
    for each in (planning, swapping):  # once without failures, since some memory is allocated at the first use and kept
        each(torch.float32, "modules")()[0]()
    managing()[0]()
    sweep("update of modules", planning(torch.float32, "modules"))
    sweep("update of modules, cast", planning(torch.bfloat16, "modules"))
    sweep("update of lists", planning(torch.float32, "lists"))
    sweep("a bound handle, with a replaced tensor", replacing)
    sweep("EMA.update, with a replaced tensor", managing)
    sweep("EMA.swapped", swapping(torch.float32, False), swaps=True)
    sweep("EMA.swapped, values in scratch memory", swapping(torch.bfloat16, False), swaps=True)
    sweep("EMA.swapped, tensors replaced", swapping(torch.float32, True), swaps=True)
    print("done")
