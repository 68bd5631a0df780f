"""HAZARDS 19, 28 (on the CPU), 30, 33, 36 to 40: what goes wrong around the averages, and what the manager does."""

import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import clones, net, refused
from oracle import same_bits
from torch import nn
from torch.nn.utils import parametrizations

from fused_ema import EMA, plan
from fused_ema.schedules import tf_warmup


def averages(ema, index=0):
    return ema.state_dict()["averages"][index]


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def equal(left, right):
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def nudge(model):
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype))


def trained(model=None, decay=0.5, **options):
    ema = EMA(net() if model is None else model, decay, **options)
    nudge(ema.model)
    ema.update()
    return ema


# ---- 19: parametrized and uninitialised modules


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_19_parametrized(backend, parametrize):
    model = nn.Sequential(parametrize(nn.Linear(3, 4)), nn.Linear(4, 2)).eval()
    ema = trained(model)
    raw, true, x = model(torch.ones(2, 3)), clones(averages(ema)), torch.ones(2, 3)
    assert true.keys() == parameters(model).keys()
    with ema.swapped():
        assert equal(clones(parameters(model)), true)
        assert not torch.equal(model(x), raw)
    assert torch.equal(model(x), raw)


def test_19_model_that_deepcopy_refuses(backend):
    model = net()
    model.cache = model(torch.ones(4, 3))  # no leaf of the graph
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    ema = trained(model)
    with ema.swapped():
        pass
    assert ema.step == 1


def test_19_uninitialised_is_refused_until_it_is_not(backend):
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises((ValueError, RuntimeError), match=r"uninitiali[sz]ed|lazy"):
        EMA(model)
    without = EMA(model, select=lambda n, p: n.startswith("1."))
    assert list(averages(without)) == ["1.weight", "1.bias"]
    model(torch.ones(2, 3))
    ema = EMA(model)
    ema.update(), without.update()
    assert averages(ema)["0.weight"].shape == (4, 3)


def test_19_refusal_names_the_tensor(backend):
    with pytest.raises((ValueError, RuntimeError), match=r"0\.weight"):
        EMA(nn.Sequential(nn.LazyLinear(4)))


def test_20_refusal_names_the_tensor(backend):
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"0\.weight.*float8"):
        EMA(model)


# ---- 28: streams


def test_28_overlap_without_streams_is_plain(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema, twin = EMA(model, 0.9), EMA(model, 0.9)
    handle = ema.attach(optimizer, overlap=True)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        twin.update()
        assert equal(averages(ema), averages(twin))
    handle.remove()
    assert ema.step == 3
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


def test_28_an_update_that_is_refused_leaves_nothing_under_way(backend):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = EMA(model, 0.9)
    handle = ema.attach(optimizer, overlap=True)
    removed, model[0].bias = model[0].bias, None
    true = clones(averages(ema))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.bias"):
            optimizer.step()
    assert (ema.step, equal(averages(ema), true)) == (0, True)
    model[0].bias = removed
    optimizer.step()
    handle.remove()
    assert ema.step == 1


# ---- 30: pickles and checkpoints


def test_30_pickled_and_saved(backend):
    ema = trained(decay=[0.9, tf_warmup(0.99)])
    other = pickle.loads(pickle.dumps(ema))
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    third = EMA(other.model, [0.5, 0.5])
    third.load_state_dict(state)
    for each in (ema, other, third):
        torch.manual_seed(1)
        if each is not third:  # which shares the model of the second
            nudge(each.model)
        each.update()
    for k in range(2):
        assert equal(averages(ema, k), averages(other, k))
        assert equal(averages(ema, k), averages(third, k))


def test_30_what_can_not_be_pickled_still_saves(backend):
    ema = trained(decay=lambda n: 0.5)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(ema)
    torch.save(ema.state_dict(), file := io.BytesIO())
    file.seek(0)
    torch.load(file, weights_only=True)
    with ema.swapped(), pytest.raises(RuntimeError, match="swap"):
        pickle.dumps(ema)


# ---- 33: averages in 16 bits


@pytest.fixture
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(plan, "_warned", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_33_float32_by_default(backend, not_warned_yet, dtype):
    model = nn.Linear(20, 20).to(dtype)
    ema = EMA(model, 0.999)
    start = clones(averages(ema))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            ema.update()
    for name, tensor in averages(ema).items():
        assert tensor.dtype == torch.float32
        assert ((tensor != start[name]) | (start[name] == 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_33_one_warning(backend, not_warned_yet, dtype):
    coarse = 1 - torch.finfo(dtype).eps
    fine, still = EMA(net(), 1 - 5 * torch.finfo(dtype).eps, dtype=dtype), EMA(net(), [0.0, coarse], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine.update()
    with pytest.warns(UserWarning, match="stand still") as caught:
        still.update()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still.update()
        EMA(net(), coarse, dtype=dtype).update()


def test_33_warning_beside_a_decay_of_one(backend, not_warned_yet):
    with pytest.warns(UserWarning, match="stand still"):
        EMA(net(), [1.0, 0.9999], dtype=torch.bfloat16).update()


def test_33_stochastic_rounding_does_not_warn(backend, not_warned_yet):
    ema = EMA(net(), 0.99999, dtype=torch.bfloat16, rounding="stochastic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update()


def test_33_stochastic_rounding_on_request_alone(backend):
    with pytest.raises(ValueError, match="stochastic"):
        EMA(net(), rounding="stochastic")


# ---- 36: steps that were skipped


@pytest.mark.parametrize("fused", [False, True])
def test_36_skipped_step(backend, fused):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=fused)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = clones(averages(ema))
    for factor, taken in ((torch.inf, 0), (1.0, 1), (torch.nan, 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert ema.step == taken
        assert equal(averages(ema), before) == (taken == 0)
    assert all(tensor.isfinite().all() for tensor in averages(ema).values())


def test_36_decay_of_one_by_hand(backend):
    # For who steps by hand: the average is not even touched.
    ema = trained(decay=lambda n: 0.5 if n < 3 else 1.0)
    ema.update()
    saved = averages(ema)
    before, counters = clones(saved), [tensor._version for tensor in saved.values()]
    nudge(ema.model)
    ema.update()
    assert equal(saved, before)
    if backend == "cpu":
        assert [tensor._version for tensor in saved.values()] == counters
    assert ema.step == 3


# ---- 37: exceptions and Ctrl-C during an evaluation (at any moment: test_ema_swap.py)


def evaluated(dtype, error):
    ema = trained(net().to(dtype))
    raw, true = clones(parameters(ema.model)), clones(averages(ema))
    with pytest.raises(error) if error else contextlib.nullcontext(), ema.swapped() as model:
        assert not equal(clones(parameters(model)), raw)
        if error:
            raise error
    assert equal(clones(parameters(ema.model)), raw)
    assert equal(averages(ema), true)
    ema.update()
    assert not equal(averages(ema), true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_37_an_evaluation_that_ends_well(backend, dtype):
    evaluated(dtype, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_37_training_goes_on_with_its_own_weights(backend, dtype, error):
    evaluated(dtype, error)


# ---- 38: saving and updating while swapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_38_saved_while_swapped(backend, dtype):
    ema = trained(net().to(dtype), [0.5, 0.9])
    expected, averaged = copy.deepcopy(ema.state_dict()), copy.deepcopy(ema.averaged_state_dict(1))
    with ema.swapped(1):
        state, both = ema.state_dict(), ema.averaged_state_dict(1)
        assert all(equal(state["averages"][k], expected["averages"][k]) for k in range(2))
        assert equal(both, averaged)
    assert all(equal(state["averages"][k], expected["averages"][k]) for k in range(2))
    assert equal(both, averaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_38_updated_while_swapped(backend, dtype):
    ema = trained(net().to(dtype))
    with ema.swapped():
        for call in (ema.update, ema.copy_to, ema.distance, ema.swapped().__enter__):
            refused(RuntimeError, call, ema.model, names=["swapped"])
        refused(RuntimeError, lambda: ema.load_state_dict(ema.state_dict()), ema.model, names=["swapped"])
    assert ema.step == 1
    ema.update()


# ---- 39: going on from a checkpoint


@pytest.mark.parametrize(
    "options",
    [
        {"decay": tf_warmup(0.999)},
        {"decay": [0.9, tf_warmup(0.99)], "update_every": 2, "update_after_step": 1},
        {"decay": 0.9, "dtype": torch.bfloat16, "rounding": "stochastic"},
    ],
)
def test_39_goes_on_bitwise(backend, options):
    ema = EMA(net(), **options)
    for _ in range(3):
        nudge(ema.model)
        ema.update()
    torch.save({"model": ema.model.state_dict(), "ema": ema.state_dict()}, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = EMA(net(), **options)
    other.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["ema"])
    for _ in range(4):
        for each in (ema, other):
            torch.manual_seed(ema.step if each is ema else ema.step - 1)
            nudge(each.model)
            each.update()
    assert equal(clones(parameters(ema.model)), clones(parameters(other.model)))
    assert (ema.step, ema.decay, ema.updates) == (other.step, other.decay, other.updates)
    assert all(equal(averages(ema, k), averages(other, k)) for k in range(len(ema.schedules)))


def test_39_checkpoint_of_something_else_is_refused(backend):
    ema, other = trained(), trained(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    for state in (other.state_dict(), ema.model.state_dict(), {**ema.state_dict(), "averages": [{}]}):
        refused(ValueError, lambda state=state: ema.load_state_dict(state), averages(ema), names=["state"])
    assert ema.step == 1


# ---- 40: failures on the way


class Failing:
    """Makes every call of `owner.name` raise `error`, until it is mended."""

    def __init__(self, monkeypatch, owner, name, error):
        self.calls, self.patch = 0, monkeypatch.context()

        def fail(*args, **options):
            self.calls += 1
            raise error

        with_context = self.patch.__enter__()
        with_context.setattr(owner, name, fail)

    def mend(self):
        assert self.calls, "did not come that way"
        self.patch.__exit__(None, None, None)


ERRORS = [MemoryError("no memory"), torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: launch failure")]


def test_40_a_new_plan_takes_over(backend):
    ema = trained()
    true = clones(averages(ema))
    ema.model[0].weight = nn.Parameter(torch.randn(4, 3))  # asks for a new plan
    ema.update()
    expected = torch.lerp(true["0.weight"], ema.model[0].weight.detach(), 0.5)
    torch.testing.assert_close(averages(ema)["0.weight"], expected)


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("where", ["__init__", "try_run"])
def test_40_failed_update(backend, monkeypatch, error, where):
    ema = trained()
    true = clones(averages(ema))
    ema.model[0].weight = nn.Parameter(torch.randn(4, 3))  # asks for a new plan
    failing = Failing(monkeypatch, plan.Plan, where, error)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            ema.update()
    assert (ema.step, equal(averages(ema), true)) == (1, True)
    failing.mend()
    ema.update()
    expected = torch.lerp(true["0.weight"], ema.model[0].weight.detach(), 0.5)
    torch.testing.assert_close(averages(ema)["0.weight"], expected)
    assert ema.step == 2


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("where", ["__init__", "try_run", "new_scratch"])
def test_40_failed_exchange(backend, monkeypatch, error, where):
    ema = trained(net().bfloat16())
    raw, true = clones(parameters(ema.model)), clones(averages(ema))
    ema.model[0].weight = nn.Parameter(ema.model[0].weight.detach().clone())
    failing = Failing(monkeypatch, plan.Plan, where, error)
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)), ema.swapped():
            pytest.fail("entered")
    assert equal(clones(parameters(ema.model)), raw)
    assert equal(averages(ema), true)
    failing.mend()
    with ema.swapped():
        assert all(torch.equal(tensor, true[name].bfloat16()) for name, tensor in parameters(ema.model).items())
    assert equal(clones(parameters(ema.model)), raw)
    ema.update()


@pytest.mark.parametrize("error", ERRORS[:2], ids=str)
def test_40_no_memory_for_the_averages(backend, monkeypatch, error):
    model = net()
    before = clones(parameters(model))
    failing = Failing(monkeypatch, torch, "empty", error)
    with pytest.raises(type(error)):
        EMA(model, 0.9)
    failing.mend()
    assert equal(clones(parameters(model)), before)
    EMA(model, 0.9).update()
