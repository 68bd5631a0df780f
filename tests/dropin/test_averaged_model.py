"""The drop-in for torch's AveragedModel: what an update computes, and by which function."""

import copy
import functools
import inspect
import subprocess
import sys
import warnings

import averaged_models
import oracle
import pytest
import torch
from averaged_models import FUNCTIONS, MEANS, averaged_model, shaken, used
from conftest import bits, net, same_bits
from step_checks import check_averaged_model
from torch import nn
from torch.optim import swa_utils

import fused_ema

pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")
fused_alone = averaged_models.fused_alone
warns_again = averaged_models.warns_again


# ---- The class


def test_it_is_a_subclass_with_the_same_constructor():
    ours, theirs = fused_ema.AveragedModel, swa_utils.AveragedModel
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert set(vars(ours(net()))) == set(vars(theirs(net())))
    assert ours.__name__ == theirs.__name__
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    assert torch.equal(ours(model)(x), model(x))


def test_two_functions_are_refused_as_by_torch():
    functions = {**FUNCTIONS["ours"](0.9), **FUNCTIONS["torch's function of tensors"](0.9)}
    with pytest.raises(AssertionError):
        fused_ema.AveragedModel(net(), **functions)


def test_it_is_loaded_when_it_is_asked_for():
    code = """
import sys
import fused_ema
assert "fused_ema.dropin" not in sys.modules
assert fused_ema.AveragedModel.__module__ == "fused_ema"
assert "fused_ema.dropin.averaged_model" in sys.modules
assert not hasattr(fused_ema, "AverageModel")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- What an update computes


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_moving_averages(backend, fused_alone, function, use_buffers):
    model = net()
    averaged = fused_ema.AveragedModel(model, **FUNCTIONS[function](0.9), use_buffers=use_buffers)
    averaged.update_parameters(shaken(model))
    assert same_bits(bits(model), averaged.module)
    expected = copy.deepcopy(model)
    for count in (2, 3, 4):
        averaged.update_parameters(shaken(model))
        fused_ema.update(expected, model, 0.9, buffers="average" if use_buffers else "copy")
        assert same_bits(bits(expected), averaged.module)
        assert averaged.n_averaged == count
    same = torch.equal(averaged.module[1].running_mean, model[1].running_mean)
    assert same != use_buffers
    assert torch.equal(averaged.module[1].num_batches_tracked, model[1].num_batches_tracked)


@pytest.mark.parametrize("function", [FUNCTIONS["torch's function of lists"](0.9), {}], ids=["moving average", "mean"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_an_update_is_one_call(backend, function):
    """Of PyTorch's operations, those that read and raise the counter are all there is."""
    model, averaged = used(**function)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        averaged.update_parameters(model)
    names = {event.name for event in profiled.events() if event.name.startswith("aten::")}
    assert names == {"aten::item", "aten::_local_scalar_dense", "aten::add_"}
    assert fused_ema.bind(averaged.module, model).describe()["launches_per_update"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", MEANS)
def test_means(backend, fused_alone, function, dtype):
    """The mean's exact value, within what the steps may err by; an error of the past shrinks with the decay."""
    model = net().to(dtype)
    averaged = fused_ema.AveragedModel(model, **MEANS[function]())
    total = dict.fromkeys(dict(model.named_parameters()), 0.0)
    allowed = dict.fromkeys(total, 0.0)
    eps = torch.finfo(dtype).eps
    for count in range(1, 21):
        before = {name: value.detach().double().clone() for name, value in averaged.module.named_parameters()}
        averaged.update_parameters(shaken(model))
        for name, value in model.named_parameters():
            new, theirs = averaged.module.get_parameter(name).detach().double(), value.detach().double()
            total[name] = total[name] + theirs
            one_step = eps / 2 * new.abs() + eps / count * (theirs - before[name]).abs() if count > 1 else 0.0
            allowed[name] = allowed[name] * (1 - 1 / count) + one_step
            in_float64 = 40 * 2.0**-53 * total[name].abs()  # of this test's own sums
            assert ((new - total[name] / count).abs() <= 1.001 * (allowed[name] + in_float64)).all(), name
    assert averaged.n_averaged == 20


@pytest.mark.parametrize("pair", oracle.PAIRS, ids=str)
def test_types(backend, fused_alone, pair):
    """One step of an average of each type, which PyTorch's own functions refuse where the two differ."""
    rng = oracle.np.random.default_rng(3)
    model, averaged = nn.Module(), nn.Module()
    ours, theirs = oracle.value_pair(*pair, 999, rng)
    model.weight, averaged.weight = nn.Parameter(theirs), nn.Parameter(ours)
    wrapper = averaged_model(averaged, 0.9)
    wrapper.n_averaged.fill_(1)
    wrapper.update_parameters(model)
    new = wrapper.module.weight.detach()
    oracle.check_step([ours], [theirs], [new], 0.9, bitwise=backend != "torch")


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_training_run_beside_torchs_own(backend, fused_alone, use_buffers, monkeypatch):
    monkeypatch.undo()  # torch's runs too
    check_averaged_model("cpu", use_buffers, kind=fused_ema.AveragedModel)


def test_decay_as_a_tensor(backend, fused_alone):
    model, averaged = used(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(torch.tensor(0.25)))
    expected = copy.deepcopy(averaged.module)
    fused_ema.update(expected, shaken(model), 0.25)
    averaged.update_parameters(model)
    assert same_bits(bits(expected), averaged.module)


@pytest.mark.parametrize("kind", ["tied", "frozen", "spectral norm", "script", "lazy"])
def test_kinds_of_models(backend, fused_alone, kind):
    model = net()
    if kind == "tied":
        model.other = model[0]
    elif kind == "frozen":
        model[0].requires_grad_(False)
    elif kind == "spectral norm":
        nn.utils.parametrizations.spectral_norm(model[0])
    elif kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.jit.script(model)
    else:
        model = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4))
        model(torch.randn(5, 3))
    _, averaged = used(model, updates=2)
    expected = copy.deepcopy(averaged.module)
    fused_ema.update(expected, shaken(model), 0.5)
    averaged.update_parameters(model)
    assert same_bits(bits(expected), averaged.module)
    assert not same_bits(bits(model), averaged.module)


# ---- Functions of the user's own


def quarter(average, parameter, _):
    return average + (parameter - average) / 4


def quarters(averages, parameters, _):
    torch._foreach_lerp_(averages, parameters, 0.25)


@functools.wraps(swa_utils.get_swa_avg_fn())
def wrapped(average, parameter, count):
    return swa_utils.get_swa_avg_fn()(average, parameter, count + 1)


class Quarter:
    def __call__(self, *arguments):
        return quarter(*arguments)


OWN = [{"avg_fn": quarter}, {"avg_fn": wrapped}, {"avg_fn": Quarter()}, {"multi_avg_fn": quarters}]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("own", OWN, ids=["function", "wraps torch's", "object", "function of lists"])
def test_a_function_of_ones_own_is_called_by_torchs_code_and_said_once(own, use_buffers):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) if use_buffers else net()
    ours, theirs = (
        kind(model, **own, use_buffers=use_buffers) for kind in (fused_ema.AveragedModel, swa_utils.AveragedModel)
    )
    with pytest.warns(
        UserWarning, match=r"is a function of your own.*fused_ema.get_ema_multi_avg_fn\(decay\)"
    ) as caught:
        ours.update_parameters(shaken(model))
    assert caught[0].filename == __file__
    theirs.update_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ours.update_parameters(shaken(model))
            theirs.update_parameters(model)
    assert same_bits(bits(theirs), ours)


def test_functions_and_buffers_that_are_set_later(backend, fused_alone):
    model, averaged = used()
    averaged.avg_fn, averaged.multi_avg_fn = swa_utils.get_ema_avg_fn(0.75), None
    averaged.use_buffers = True
    expected = copy.deepcopy(averaged.module)
    fused_ema.update(expected, shaken(model), 0.75, buffers="average")
    averaged.update_parameters(model)
    assert same_bits(bits(expected), averaged.module)
    averaged.multi_avg_fn = swa_utils.get_ema_multi_avg_fn(0.25)  # which torch prefers to avg_fn
    fused_ema.update(expected, shaken(model), 0.25, buffers="average")
    averaged.update_parameters(model)
    assert same_bits(bits(expected), averaged.module)
