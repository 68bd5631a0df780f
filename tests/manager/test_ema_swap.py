"""EMA.swapped: what the model holds within and after the block, whatever happens in it."""

import contextlib
import copy
import os
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent import futures

import pytest
import torch
from conftest import averages, clones, equal, interrupted_at, net, parameters, refused, trained
from oracle import same_bits
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ema import EMA
from fused_ema.manager import swap
from fused_ema.manager.averages import Averages
from fused_ema.plan import Plan
from fused_ema.runners.base import one_at_a_time

TYPES = [torch.float32, torch.bfloat16, torch.float64]  # of the model; float32 averages, but of float64


def addresses(model):
    return {name: (id(tensor), tensor.data_ptr(), tensor.stride()) for name, tensor in parameters(model).items()}


class Whole:
    """What a manager and its model hold, to be compared with what they hold later."""

    def __init__(self, ema):
        self.ema, self.raw, self.where = ema, clones(parameters(ema.model)), addresses(ema.model)
        self.true = [clones(averages(ema, k)) for k in range(len(ema.schedules))]
        for true in self.true:
            assert not equal(true, self.raw)

    def averages_are_true(self):
        return all(equal(averages(self.ema, k), true) for k, true in enumerate(self.true))

    def check(self):
        self.check_values()
        assert addresses(self.ema.model) == self.where

    def check_values(self):
        assert equal(clones(parameters(self.ema.model)), self.raw), "the model was not restored"
        assert self.averages_are_true()
        assert self.ema.describe()["swapped"] is None


@contextlib.contextmanager
def swapped_and_checked(ema, index=0):
    """The block, and that the model holds the average in it."""
    whole = Whole(ema)
    with ema.swapped(index) as model:
        assert model is ema.model
        for name, tensor in parameters(model).items():
            assert same_bits(tensor.detach(), whole.true[index][name].to(tensor.dtype)), name
        assert addresses(model) == whole.where
        yield whole


@pytest.mark.hazard(37, "good")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_swapped(backend, dtype, index):
    ema = trained(net().to(dtype), [0.5, 0.9, 0.99])
    for _ in range(2):
        with swapped_and_checked(ema, index) as whole:
            pass
        whole.check()
    ema.update()
    assert ema.step == 2


@pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_all_mixed(backend, dtype):
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    model = nn.ModuleDict({str(i): nn.Linear(5, 3, dtype=kind) for i, kind in enumerate(kinds)})
    model["complex"] = nn.Linear(2, 3, dtype=torch.complex64)
    ema = trained(model, [0.5, 0.9], dtype=dtype)
    with swapped_and_checked(ema, 1) as whole:
        pass
    whole.check()


@pytest.mark.parametrize("dtype", TYPES)
def test_layouts(backend, dtype):
    def random(*shape):
        return torch.randn(shape).to(dtype)

    tensors = {
        "image": random(3, 8, 5, 7).to(memory_format=torch.channels_last),
        "transposed": random(6, 9).t(),
        "gaps": random(8, 12)[:, 2:7],
        "misaligned": random(50)[3:],
        "empty": random(0, 3),
        "scalar": random(),
        "long": random(300_011),
    }
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor))
    model.tied = model.long
    ema = trained(model, [0.5, 0.9])
    model.to(memory_format=torch.contiguous_format)  # unlike the averages
    edges = {name: tensor._base.clone() for name, tensor in tensors.items() if tensor._base is not None}
    with swapped_and_checked(ema, 1) as whole:
        pass
    whole.check()
    assert all(torch.equal(tensors[name]._base, edge) for name, edge in edges.items())


@pytest.mark.hazard(37, "guarded")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_restored_after_an_exception(backend, dtype, error):
    ema = trained(net().to(dtype))
    raised = error("stop")
    with pytest.raises(error) as caught, swapped_and_checked(ema) as whole:
        raise raised
    assert caught.value is raised
    whole.check()
    ema.update()


def test_special_values_are_restored(backend):
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.ParameterList([torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, 1.0]).to(dtype)])
        model[0].data.view(torch.int16)[0] += 3  # a NaN with a payload
        ema = EMA(model, 0.5)
        before = model[0].detach().clone()
        with ema.swapped():
            pass
        assert same_bits(model[0].detach(), before)


# ---- What is refused while the model is swapped


@pytest.mark.hazard(38, "guarded")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("member", ["update", "load_state_dict", "copy_to", "distance", "to", "swapped"])
def test_refused_while_swapped(backend, dtype, member):
    ema = trained(net().to(dtype))
    saved = copy.deepcopy(ema.state_dict())
    arguments = {"load_state_dict": [saved], "to": ["cpu"]}.get(member, [])
    with swapped_and_checked(ema) as whole:
        enter = getattr(ema, member)(*arguments).__enter__ if member == "swapped" else None
        call = enter or (lambda: getattr(ema, member)(*arguments))
        refused(RuntimeError, call, ema.model, names=[member, "swapped"])
        assert whole.averages_are_true()
        assert ema.step == 1
    whole.check()
    getattr(ema, member)(*arguments)


@pytest.mark.parametrize("dtype", TYPES)
def test_refused_before_the_way_in(backend, dtype):
    ema = trained(net().to(dtype))
    model, whole = ema.model, Whole(ema)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    refused(ValueError, ema.swapped().__enter__, model, averages(ema), names=["'extra'"])
    del model.extra
    whole.check()
    model[0].weight.data = torch.randn(1, 3).to(dtype).expand(4, 3)
    refused(ValueError, ema.swapped().__enter__, model, averages(ema), names=["model['0.weight']", "strides"])
    model[0].weight.data = whole.raw["0.weight"].clone()
    with swapped_and_checked(ema) as whole:
        pass
    whole.check()


# ---- States while swapped


@pytest.mark.hazard(38, "good")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_states_while_swapped(backend, dtype, index):
    ema = trained(net().to(dtype), [0.5, 0.9])
    expected = [copy.deepcopy(ema.averaged_state_dict(k)) for k in range(2)]
    with swapped_and_checked(ema, index) as whole:
        assert whole.averages_are_true()
        taken = [averages(ema, k) for k in range(2)], [ema.averaged_state_dict(k) for k in range(2)]
        for k in range(2):
            assert list(taken[1][k]) == list(ema.model.state_dict())
            assert equal(taken[1][k], expected[k])
        other = net()
        ema.copy_to(other, index)
        assert all(torch.equal(tensor, whole.true[index][n].float()) for n, tensor in parameters(other).items())
    # They hold no memory of the model, which has its own values again.
    assert all(equal(taken[0][k], whole.true[k]) for k in range(2))
    assert all(equal(taken[1][k], expected[k]) for k in range(2))
    whole.check()


def test_states_taken_while_swapped_do_not_move(backend):
    ema = trained(net(), [0.5, 0.9])
    with swapped_and_checked(ema, 1) as whole:
        taken = averages(ema, 1), ema.averaged_state_dict(1)
    ema.update()
    assert equal(taken[0], whole.true[1])
    assert equal({n: taken[1][n] for n in taken[0]}, whole.true[1])


def test_state_while_swapped_takes_a_time_like_the_number_of_tensors(monkeypatch):
    model, calls, get = nn.ParameterList([torch.zeros(2) for _ in range(100)]), [], Averages.get
    ema = EMA(model, 0.5)
    with ema.swapped():
        monkeypatch.setattr(Averages, "get", lambda *args: calls.append(1) or get(*args))
        ema.state_dict()
    assert 100 <= len(calls) <= 500


# ---- Tensors of the model that the block replaces


def replaced(model):
    model[2] = nn.Linear(4, 2).to(model[2].weight.dtype)


CHANGES = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "data": lambda m: setattr(m[0].weight, "data", torch.zeros_like(m[0].weight)),
    "strides": lambda m: setattr(m[0].weight, "data", torch.zeros(3, 4).to(m[0].weight.dtype).t()),
    "assign": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "assign other types": lambda m: m.load_state_dict(net().double().state_dict(), assign=True),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros_like(m[0].weight))),
    "module": replaced,
    "swap_tensors": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(torch.zeros_like(m[0].weight))),
    "new parameter": lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))),
    "new module": lambda m: m.append(nn.Linear(2, 2)),
    "wrapped": lambda m: m.__setitem__(0, nn.DataParallel(m[0])),
    "frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
@pytest.mark.parametrize("change", CHANGES)
def test_replaced_in_the_block(backend, dtype, raises, change):
    ema = trained(net().to(dtype), [0.5, 0.9])
    whole = Whole(ema)
    try:
        with ema.swapped(1) as model:
            CHANGES[change](model)
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert raises
    assert whole.averages_are_true()
    found = {name.replace("module.", ""): tensor for name, tensor in parameters(model).items()}
    for name, tensor in whole.raw.items():
        assert same_bits(found[name].detach(), tensor.to(found[name].dtype)), name
    assert ema.describe()["swapped"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raises", [False, True], ids=["", "raises"])
def test_written_to_in_the_block(backend, dtype, raises):
    # Where the two exchanged values, what the block writes is the average's; it warns. The model is restored.
    ema = trained(net().to(dtype), [0.5, 0.9])
    whole, new = Whole(ema), net().state_dict()["2.weight"]

    @ema.swapped(1)
    def block():
        with torch.no_grad():
            ema.model[2].weight.copy_(new)
        if raises:
            raise ZeroDivisionError

    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(ZeroDivisionError):
        warnings.simplefilter("always")
        block()
    exchanged = dtype == torch.float32
    what = "went into the averages and stay there" if exchanged else "were discarded: the model has its own values back"
    (message,) = (str(warning.message) for warning in caught)
    assert "writes to '2.weight' inside swapped()" in message
    assert message.endswith(what)
    if exchanged:
        assert torch.equal(averages(ema, 1)["2.weight"], new)
        whole.true[1]["2.weight"] = new
    whole.check()


@pytest.mark.parametrize("dtype", TYPES)
def test_reading_in_the_block_does_not_warn(backend, dtype):
    ema = trained(net().eval().to(dtype))
    whole = Whole(ema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.swapped() as model:
            model(torch.randn(4, 3).to(dtype)).sum().backward()
            model.eval()(torch.randn(4, 3).to(dtype))
            copy.deepcopy(model), ema.state_dict(), repr(ema)
    whole.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["assign", "parameter", "module", "data"])
def test_goes_on_with_what_the_block_put_there(backend, dtype, change):
    ema, twin = (trained(net().to(dtype)) for _ in range(2))
    twin.model.load_state_dict(ema.model.state_dict())
    twin.load_state_dict(ema.state_dict())
    with ema.swapped() as model:
        CHANGES[change](model)
    with swapped_and_checked(ema) as whole:
        pass
    whole.check()
    for each in (ema, twin):
        each.update()
    assert equal(averages(ema), averages(twin))


def another_shape(model):
    model[2] = nn.Linear(4, 5)


LOST = {
    "another shape": (another_shape, ["2.weight", "2.bias"]),
    "removed": (lambda m: m[2].register_parameter("bias", None), ["2.bias"]),
    "removed module": (lambda m: m.pop(2), ["2.weight", "2.bias"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", LOST)
def test_lost_in_the_block(backend, dtype, change):
    ema = trained(net().to(dtype), [0.5, 0.9])
    whole, (apply, lost) = Whole(ema), LOST[change]
    before = averages(ema)  # not copies
    model, kept = ema.model, {}

    @ema.swapped()
    def block():
        apply(model)
        kept.update(clones(parameters(model)))

    with pytest.raises(RuntimeError) as caught:
        block()
    assert all(name in str(caught.value) for name in lost)
    assert equal(before, whole.true[0]), "the averages are not whole"
    for name, tensor in parameters(model).items():
        assert same_bits(tensor.detach(), kept[name] if name in lost else whole.raw[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_strides_on_the_same_memory(backend, dtype):
    ema = trained(net().to(dtype))
    whole = Whole(ema)
    with ema.swapped() as model:
        model[0].weight.data = model[0].weight.data.as_strided((4, 3), (1, 4))
    assert model[0].weight.stride() == (1, 4)
    whole.check_values()


def square(dtype):
    return nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "ab"}).to(dtype)


def change_places(model):
    model["a"].weight, model["b"].weight = model["b"].weight, model["a"].weight


def change_data(model):
    model["a"].weight.data, model["b"].weight.data = model["b"].weight.data, model["a"].weight.data


PLACES = {
    "names": change_places,
    "data": change_data,
    "tensors": lambda m: torch.utils.swap_tensors(m["a"].weight, m["b"].weight),
    "one name": lambda m: setattr(m["a"], "weight", nn.Parameter(m["b"].weight.detach().clone())),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("change", PLACES)
def test_tensors_that_change_places_in_the_block(backend, dtype, change):
    ema = trained(square(dtype))
    whole = Whole(ema)
    with ema.swapped() as model:
        PLACES[change](model)
    whole.check_values()


@pytest.mark.parametrize("dtype", TYPES)
def test_tied_in_the_block(backend, dtype):
    ema = trained(square(dtype))
    whole = Whole(ema)
    with pytest.raises(RuntimeError, match=r"tied or replaced 'a.weight'"), ema.swapped() as model:
        model["a"].weight = model["b"].weight
    assert whole.averages_are_true()
    assert same_bits(model["b"].weight.detach(), whole.raw["b.weight"])


@pytest.mark.parametrize("dtype", TYPES)
def test_put_in_the_block_where_another_one_is(backend, dtype):
    ema = trained(square(dtype))
    whole = Whole(ema)
    with ema.swapped() as model:
        model["a"].weight.data = model["b"].weight.data.t()
    whole.check_values()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("early", [False, True], ids=["", "taken before"])
@pytest.mark.parametrize("which", ["averaged_state_dict", "state_dict"])
def test_the_averages_themselves_put_into_the_model(backend, dtype, early, which):
    def state():
        return (
            ema.averaged_state_dict(copy=False) if which == "averaged_state_dict" else ema.state_dict()["averages"][0]
        )

    ema = trained(square(dtype))
    whole, taken = Whole(ema), state()
    with ema.swapped() as model:
        model.load_state_dict(taken if early else state(), assign=True)
    assert whole.averages_are_true()
    for name, tensor in parameters(model).items():
        assert torch.equal(tensor.to(dtype), whole.raw[name])
    ema.update()  # the tensors have their own memory again


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [0, 4], ids=["freed", "cut"])
def test_memory_that_the_block_frees(backend, dtype, size):
    ema = trained(net().to(dtype), [0.5, 0.9])
    whole, model = Whole(ema), ema.model
    exchanged = model[0].weight.dtype == averages(ema)["0.weight"].dtype
    with contextlib.ExitStack() as stack:
        if exchanged:  # the average was there
            stack.enter_context(
                pytest.raises(RuntimeError, match=r"freed the memory of '0.weight', where the averages were")
            )
            whole.true[1]["0.weight"] = whole.raw["0.weight"]
        else:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("error")
        with ema.swapped(1):
            model[0].weight.untyped_storage().resize_(size)
    whole.check_values()
    ema.update()


def freed_data(model):
    new = torch.zeros_like(model[0].weight)
    model[0].weight.data = new
    new.untyped_storage().resize_(0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("change", [freed_data, lambda model: model[0].to("meta")], ids=["freed", "meta"])
def test_tensors_without_memory_put_there_by_the_block(backend, dtype, change):
    ema = trained(net().to(dtype))
    whole = Whole(ema)
    with pytest.raises(RuntimeError, match=r"replaced '0.weight'"), ema.swapped() as model:
        change(model)
    assert whole.averages_are_true()
    assert same_bits(model[2].weight.detach(), whole.raw["2.weight"])


def test_a_kind_of_tensor_that_takes_no_values_is_lost_alone(backend):
    ema = trained(square(torch.float32))
    whole = Whole(ema)
    model = ema.model

    @ema.swapped()
    def block():
        model["a"].weight = nn.Parameter(model["a"].weight.detach().to_sparse_csr())
        model["b"].weight = nn.Parameter(model["b"].weight.detach().clone())

    with pytest.raises(RuntimeError, match=r"replaced 'a.weight'"):
        block()
    assert whole.averages_are_true()
    assert same_bits(model["b"].weight.detach(), whole.raw["b.weight"])


def test_wrappers_of_tensors_put_there_by_the_block(backend):
    ema = trained(square(torch.float32))
    whole = Whole(ema)
    with ema.swapped() as model:
        for child in model.values():
            child.weight = nn.Parameter(TwoTensor(child.weight.detach().clone(), child.weight.detach().clone()))
    assert whole.averages_are_true()
    for name, tensor in parameters(model).items():
        assert same_bits(tensor.detach().b, whole.raw[name])


def test_interrupted_while_it_waits_for_another_thread(backend):
    code = """
        import signal, threading, time, torch
        from torch import nn
        from fused_ema import EMA
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        ema = EMA(nn.Linear(3, 3), 0.5)
        nn.init.ones_(ema.model.weight)
        ema.update()
        slow = EMA(nn.Linear(2, 2), lambda n: time.sleep(1.5) or 0.5)
        thread = threading.Thread(target=slow.update)
        try:
            with ema.swapped():
                thread.start()
                time.sleep(0.1)
                signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            print("interrupted")
        thread.join()
        ema.update()
        assert torch.equal(ema.model.weight, torch.ones(3, 3))
    """
    without = {"FUSED_EMA_EXT": "0", "FUSED_EMA_CUDA": "0"} if backend == "torch" else {}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env={**os.environ, **without}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_averages_that_are_averaged_count_as_swapped(backend):
    ema, target = trained(square(torch.float32)), square(torch.float32)
    target.load_state_dict(ema.averaged_state_dict(copy=False), assign=True)
    second = EMA(target)
    with ema.swapped(), pytest.raises(RuntimeError, match="another manager's swapped"):
        second.update()
    second.update()


def test_another_module_on_the_same_memory_counts_as_swapped(backend):
    ema = trained(net())
    other = copy.deepcopy(ema.model)
    other.load_state_dict(ema.model.state_dict(), assign=True)
    second = EMA(other)
    whole = Whole(ema)
    with ema.swapped():
        for call in (second.update, second.swapped().__enter__, lambda: EMA(other)):
            with pytest.raises(RuntimeError, match="another manager's swapped"):
                call()
    whole.check()
    second.update()


def test_a_swap_waits_for_the_update_of_another_thread(backend):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    begun = threading.Event()

    def schedule(n):
        begun.set()  # between the check and the launch
        with pytest.raises(futures.TimeoutError):
            evaluation.result(0.2)
        return 0.5

    def evaluate():
        assert begun.wait(10)
        with ema.swapped():
            return model.weight.item()

    ema = EMA(model, schedule)
    nn.init.constant_(model.weight, 4.0)
    with futures.ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(evaluate)
        ema.update()
        assert evaluation.result(10) == 2.0
    assert model.weight.item() == 4.0
    assert averages(ema)["weight"].item() == 2.0


def test_nothing_is_kept_of_swaps_that_are_over(backend):
    for _ in range(3):
        with EMA(net()).swapped():
            assert len(swap._under_way) == 1
        assert not swap._under_way


@pytest.mark.parametrize("member", ["update", "load_state_dict", "copy_to", "to", "swapped"])
def test_threads_take_turns(backend, member):
    ema = trained(net())
    whole, state = Whole(ema), copy.deepcopy(ema.state_dict())
    calls = {
        "load_state_dict": lambda: ema.load_state_dict(state),
        "to": lambda: ema.to("cpu"),
        "swapped": lambda: ema.swapped().__enter__(),
    }
    with futures.ThreadPoolExecutor(1) as pool:
        with one_at_a_time():
            running = pool.submit(calls.get(member, getattr(ema, member)))
            with pytest.raises(futures.TimeoutError):
                running.result(0.1)
            whole.check()
        running.result(10)


@pytest.mark.parametrize("change", LOST)
def test_usable_after_a_loss(backend, change):
    ema = trained(net(), [0.5, 0.9])
    whole, (apply, lost) = Whole(ema), LOST[change]
    model, last = ema.model, ema.model[2]
    bias = last.bias
    with pytest.raises(RuntimeError, match=re.escape(lost[0])), ema.swapped():
        apply(model)
    assert whole.averages_are_true()
    refused(ValueError, ema.update, model, averages(ema), names=[lost[0]])
    if len(model) > 2:
        model.pop(2)
    model.append(last)
    last.bias = bias
    whole.check()
    ema.update()


def becomes(value):
    return lambda model: model[0]._parameters.update(weight=value())


def made_for_inference():
    with torch.inference_mode():
        return torch.zeros(4, 3)


WRONG_KINDS = {
    "sparse": becomes(lambda: torch.zeros(4, 3).to_sparse()),
    "expanded": becomes(lambda: torch.zeros(1, 3).expand(4, 3)),
    "for inference": becomes(made_for_inference),
    "uninitialised": lambda model: model.__setitem__(0, nn.LazyLinear(4)),
}


@pytest.mark.parametrize("change", WRONG_KINDS)
def test_usable_after_tensors_of_the_wrong_kind(backend, change):
    ema = trained(net())
    whole, old = Whole(ema), ema.model[0]
    weight = old.weight
    with pytest.raises(RuntimeError), ema.swapped() as model:
        WRONG_KINDS[change](model)
    assert whole.averages_are_true()
    assert ema.describe()["swapped"] is None
    model[0] = old
    old.weight = weight
    whole.check()


def test_a_way_out_that_fits_nothing_is_an_error(monkeypatch):
    """And is tried again."""
    ema = trained(net())
    run, failures = Plan.try_run, [True, True]

    def fails(plan, call, pairs=None):
        if call.op == "restore" and failures:
            return not failures.pop()
        return run(plan, call, pairs)

    monkeypatch.setattr(Plan, "try_run", fails)
    whole = Whole(ema)
    with pytest.raises(RuntimeError, match="the tensors changed while they were paired"), ema.swapped():
        pass
    whole.check()


def test_an_error_that_stays_is_raised(backend):
    ema, calls = trained(net()), []
    whole, model = Whole(ema), ema.model

    def names_that_collide(*args, **options):
        calls.append(1)
        if len(calls) < 50:  # else it would hang
            raise ValueError("one name")
        return nn.Module.named_modules(model, *args, **options)

    @ema.swapped()
    def block():
        CHANGES["data"](model)
        model.named_modules = names_that_collide

    with pytest.raises(ValueError, match="one name"):
        block()
    assert len(calls) < 10
    del model.named_modules
    assert whole.averages_are_true()
    assert ema.describe()["swapped"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refused_after_a_block_that_replaced_tensors(backend, dtype):
    ema = trained(net().to(dtype))
    with ema.swapped() as model:
        CHANGES["assign"](model)
    whole = Whole(ema)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="extra"), ema.swapped():
        pytest.fail("entered")
    del model.extra
    whole.check()


# ---- Memory, compiled models


class Allocated(TorchDispatchMode):
    """Bytes of the storages that PyTorch makes during the block."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.storages[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("count", [1, 3])
def test_memory_set_aside(count):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100)).bfloat16()
    ema = trained(model, [0.5] * count)
    size = sum(tensor.numel() * 2 for tensor in model.parameters())
    with Allocated() as allocated, ema.swapped(count - 1):
        pass
    if ema.describe()["backend"] != "torch":
        assert size <= sum(allocated.storages.values()) <= size + 16 * 4
    ema = trained(model.float(), [0.5] * count)
    with Allocated() as allocated, ema.swapped(count - 1):
        pass
    if ema.describe()["backend"] != "torch":
        assert not any(allocated.storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_is_not_compiled_again(backend, dtype):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 3).to(dtype)
    ema = trained(model)
    raw = compiled(x)
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged)
    with torch.compiler.set_stance("fail_on_recompile"):
        with ema.swapped():
            assert torch.equal(compiled(x), averaged(x))
            assert not torch.equal(compiled(x), raw)
        assert torch.equal(compiled(x), raw)


def test_not_entered_means_not_swapped(backend):
    ema = trained(net())
    whole = Whole(ema)
    for _ in range(2):
        ema.swapped()
    whole.check()


def test_as_a_decorator(backend):
    ema = trained(net())
    whole = Whole(ema)

    @ema.swapped()
    def evaluate():
        return clones(parameters(ema.model))

    assert equal(evaluate(), whole.true[0])
    whole.check()


@pytest.mark.parametrize("member", ["update", "swapped", "copy_to", "distance"])
def test_two_managers_of_one_model(backend, member):
    ema = trained(net())
    other, unrelated = trained(ema.model, 0.1), trained(net())
    whole, whole_other = Whole(ema), Whole(other)

    def use(manager):
        called = getattr(manager, member)()
        if member == "swapped":
            with called:
                pass

    with ema.swapped():
        refused(RuntimeError, lambda: use(other), ema.model, names=[member, "another manager"])
        use(unrelated)
        assert equal(clones(parameters(ema.model)), whole.true[0])
    whole.check(), whole_other.check()
    use(other)


def test_two_managers_of_two_parts(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    one = trained(model, select=lambda name, _: name.startswith("0"))
    other = trained(model, select=lambda name, _: name.startswith("1"))
    whole, whole_other = Whole(one), Whole(other)
    with one.swapped(), other.swapped():
        other_parameters = {name: tensor for name, tensor in parameters(model).items() if name.startswith("1")}
        assert equal(clones(other_parameters), whole_other.true[0])
    whole.check(), whole_other.check()


def test_statistics_measured_in_the_block_stay_with_a_warning(backend):
    ema = trained(net())
    whole = Whole(ema)
    data = [torch.randn(8, 3)]
    wrote = r"writes to '1\.running_mean', '1\.running_var'.* stay there: these buffers are not averaged"
    with pytest.warns(UserWarning, match=wrote), ema.swapped() as model:
        torch.optim.swa_utils.update_bn(data, model)
    assert whole.averages_are_true()
    fresh = copy.deepcopy(ema.model)  # as help() has it
    ema.copy_to(fresh)
    torch.optim.swa_utils.update_bn(data, fresh)
    torch.testing.assert_close(fresh[1].running_mean, fresh[0](data[0]).mean(0))


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("seen_by", ["values", "counter"])
@pytest.mark.parametrize("wrapper", [nn.Sequential, nn.DataParallel], ids=["", "wrapped"])
def test_statistics_that_batch_norm_writes_are_named(backend, buffers, seen_by, wrapper, monkeypatch):
    """F.batch_norm raises no version of theirs. On a device, where values are not compared, the counter shows it."""
    norm = nn.BatchNorm1d(3)
    if seen_by == "values":
        norm.num_batches_tracked = None
    else:
        monkeypatch.setattr(swap, "_compares", lambda tensor: False)
    ema = trained(wrapper(norm), buffers=buffers)
    names = r"'(0\.)?running_mean', '(0\.)?running_var'"
    counter = r", '(0\.)?num_batches_tracked'" if seen_by == "counter" else ""
    expected = {
        "average": [rf"writes to {names} inside swapped\(\) went into the averages and stay there"],
        "copy": [rf"writes to {names}{counter} inside swapped\(\) stay there: these buffers are not averaged"],
    }[buffers]
    if buffers == "average" and counter:
        expected.insert(0, "num_batches_tracked' inside swapped.. stay there: these buffers are not averaged")
    with pytest.warns(UserWarning, match="EMA.swapped: writes to") as caught, ema.swapped():
        norm(torch.randn(8, 3) + 50)
    found = [str(warning.message) for warning in caught]
    assert len(found) == len(expected)
    assert all(re.search(each, message) for each, message in zip(expected, found, strict=True)), found


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_statistics_that_are_only_read_do_not_warn(backend, buffers):
    norm = nn.BatchNorm1d(3)
    norm.running_mean[1] = torch.nan
    norm.running_var[2] = torch.inf
    ema = EMA(norm, 0.5, buffers=buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.swapped():
            norm.eval()(torch.randn(8, 3))
            norm.train()


def test_statistics_whose_memory_the_block_freed_are_not_compared(backend):
    norm = nn.BatchNorm1d(3)
    ema = EMA(norm, 0.5)
    with ema.swapped():
        norm.running_mean.untyped_storage().resize_(0)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_buffer_that_is_not_persistent_is_scratch(backend, buffers, recwarn):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("angles", torch.zeros(4), persistent=False)
            self.register_buffer("unused", None, persistent=False)

        def forward(self, x):
            self.angles.copy_(torch.arange(4))
            return self.linear(x) * self.angles[0]

    ema = trained(Rotary(), buffers=buffers)
    with torch.no_grad(), ema.swapped() as model:
        model(torch.ones(2, 3))
    assert ema.model.angles.tolist() == [0, 1, 2, 3]
    assert not recwarn


def test_autocast_sees_what_the_model_holds(backend):
    ema = trained(nn.Sequential(nn.Linear(3, 2)))
    x = torch.randn(4, 3)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return ema.model(x)

    raw = run()
    with ema.swapped():
        averaged = run()
    assert not torch.equal(raw, averaged)
    with torch.autocast("cpu", torch.bfloat16):  # one context, which keeps 16-bit copies of the weights
        assert torch.equal(ema.model(x), raw)
        with ema.swapped():
            assert torch.equal(ema.model(x), averaged)
        assert torch.equal(ema.model(x), raw)
        ema.copy_to()
        assert torch.equal(ema.model(x), averaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of the averages: exchanged, or in scratch memory
def test_parametrizations_that_are_cached_see_what_the_model_holds(backend, dtype):
    ema = trained(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), dtype=dtype)
    x = torch.randn(4, 3)
    raw = ema.model(x)
    with ema.swapped():
        averaged = ema.model(x)
    assert not torch.equal(raw, averaged)
    with nn.utils.parametrize.cached():
        assert torch.equal(ema.model(x), raw)
        with ema.swapped():
            assert torch.equal(ema.model(x), averaged)
        assert torch.equal(ema.model(x), raw)
        ema.copy_to()
        assert torch.equal(ema.model(x), averaged)


# ---- Ctrl-C at any moment


def replaces_weights(model):
    for layer in model:
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))


def exchanges_weights(model):
    model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [len, replaces_weights, exchanges_weights], ids=["", "replaced", "exchanged"])
def test_interrupted_at_each_moment(backend, dtype, block, every):
    ema = trained(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype), [0.5, 0.9])
    whole = Whole(ema)

    def evaluate():
        with ema.swapped(1) as model:
            block(model)

    moment = 1
    while interrupted_at(moment, evaluate):
        assert ema.describe()["swapped"] is None, f"moment {moment}: still swapped"
        assert whole.averages_are_true(), f"moment {moment}: other averages"
        assert equal(clones(parameters(ema.model)), whole.raw), f"moment {moment}: another model"
        moment += every
    assert moment > 50


INTERRUPTS = """
import random, signal, sys
import torch
from torch import nn
from fused_ema import EMA
from fused_ema.runners import extension as _native

torch.manual_seed(0)
random.seed(0)
signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does, but by a timer

def held(ema):
    averages = [tensor for average in ema.state_dict()["averages"] for tensor in average.values()]
    return [tensor.detach().clone() for tensor in [*ema.model.parameters(), *averages]]

def replace(model):
    for layer in model:
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))

def interrupt(what, dtype, rounds, longest, block=lambda model: None):
    ema = EMA(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).to(dtype), [0.5, 0.9])
    with torch.no_grad():
        for tensor in ema.model.parameters():
            tensor.add_(1)
    ema.update()
    expected = held(ema)
    for n in range(rounds):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, longest))
            while True:
                with ema.swapped(1):
                    block(ema.model)
        except KeyboardInterrupt:
            pass
        if ema.describe()["swapped"] is not None:
            sys.exit(f"{what}: still swapped after interrupt {n}")
        if not all(map(torch.equal, held(ema), expected)):
            sys.exit(f"{what}: other values after interrupt {n}")

if _native.load():
    interrupt("values exchanged", torch.float32, 400, 5e-4)
    interrupt("values in scratch memory", torch.bfloat16, 400, 5e-4)
    interrupt("tensors replaced", torch.float32, 100, 2e-3, replace)
    interrupt("tensors of another type replaced", torch.bfloat16, 100, 2e-3, replace)
    _native.load = lambda: None
interrupt("PyTorch alone", torch.float32, 200, 2e-3)
print("done")
"""


def test_interrupted_at_any_moment():
    done = subprocess.run([sys.executable, "-c", INTERRUPTS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr


# ---- Models whose names change their order, or whose slots can't be watched


def moves_the_first_child_last(model):
    model._modules["0"] = model._modules.pop("0")


def registers_the_weights_anew(model):
    for child in model:
        weight = child.weight
        del child.weight
        child.weight = weight


@pytest.mark.parametrize("reorder", [moves_the_first_child_last, registers_the_weights_anew])
@pytest.mark.parametrize("shapes", [(3, 3, 3), (3, 2, 5)], ids=["equal", "other"])
def test_names_in_another_order_than_when_the_manager_was_made(backend, reorder, shapes):
    one, two, three = shapes
    ema = trained(nn.Sequential(nn.Linear(one, two), nn.Linear(two, three)))
    reorder(ema.model)
    whole = Whole(ema)
    with ema.swapped() as model:
        replaces_weights(model)
        model[1].bias.data = model[1].bias.data.clone()
    whole.check_values()


class NamesLess(nn.Sequential):
    def modules(self):
        yield from ()


@pytest.mark.parametrize("kind", [NamesLess, lambda layer: torch.jit.script(nn.Sequential(layer))])
def test_tensors_replaced_in_a_model_that_can_not_be_watched(backend, kind):
    ema = trained(kind(nn.Linear(3, 2)))
    whole = Whole(ema)
    with ema.swapped() as model:
        model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    whole.check_values()


def test_warnings_point_at_the_block(backend):
    ema = trained(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with pytest.warns(UserWarning, match="these buffers are not averaged") as caught:  # noqa: SIM117
        with ema.swapped() as model:
            model(torch.randn(4, 3))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_warning_that_is_an_error_does_not_hide_what_was_lost(backend):
    ema = trained(nn.Linear(3, 2))

    @ema.swapped()
    def block():
        ema.model.weight.detach().fill_(1)
        ema.model.bias = nn.Parameter(torch.zeros(5))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="replaced 'bias'"):
            block()
