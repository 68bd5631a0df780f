"""The state of EMA: what is in it, that training goes on with the same bits, what is refused; pickles and copies."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import averages, net, refused
from oracle import same_bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ema import EMA, checkpoints
from fused_ema.schedules import constant, exponential_ramp, inverse_power, power_function, tf_warmup

pytestmark = pytest.mark.filterwarnings("ignore:fused_ema. averages in 16 bits")


def nudge(step, *models):
    """Step number `step` of some optimizer, the same for each of the models."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensors in zip(*(model.parameters() for model in models), strict=True):
            change = torch.randn(tensors[0].shape, generator=generator) * 0.1
            for tensor in tensors:
                tensor.add_(change.to(tensor.dtype))


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 33)).to(dtype)


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_states(left, right):
    """Bit for bit, types of containers included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_states(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_states, left, right))
    return same_bits(left, right) if isinstance(left, torch.Tensor) else left == right


OPTIONS = {
    "default": {},
    "several": {"decay": [0.9, tf_warmup(0.99), power_function(0.1)]},
    "every third": {"decay": [inverse_power(0.999), 0.5], "update_every": 3, "update_after_step": 2},
    "stochastic": {"decay": [0.9, 0.99], "dtype": torch.bfloat16, "rounding": "stochastic", "seed": 11},
    "stochastic half": {"decay": 0.9, "dtype": torch.float16, "rounding": "stochastic", "update_every": 2},
    "wide": {"decay": exponential_ramp(0.99, tau=5), "dtype": torch.float64},
}

# ---- What it is


def plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (int, float, str) or (type(value) is torch.Tensor and not value.requires_grad)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain(backend, options):
    model = small()
    ema = EMA(model, **options)
    for step in range(4):
        nudge(step, model)
        ema.update()
    state = ema.state_dict()
    assert type(state) is dict
    assert plain(state)
    assert (state["step"], state["updates"]) == (4, ema.updates)
    assert len(state["averages"]) == len(ema.schedules)
    assert list(state["averages"][0]) == list(dict(model.named_parameters()))
    assert same_states(saved_and_loaded(state), state)


@pytest.mark.hazard(30, "guarded")
def test_own_schedules_do_not_go_in(backend):
    ema = EMA(net(), [lambda n: 0.5, 0.9])
    state = ema.state_dict()
    assert plain(state)
    assert isinstance(state["schedules"][0], str)
    saved_and_loaded(state)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickled(ema)


def test_averages_in_it_are_not_copies(backend):
    model = small()
    ema = EMA(model, [0.5, 0.9])
    states = [averages(ema, k) for k in range(2)]
    nudge(0, model)
    ema.update()
    assert all(same_bits(states[k][name], averages(ema, k)[name]) for k in range(2) for name in states[k])


def size_of_file(state):
    torch.save(state, file := io.BytesIO())
    return file.tell()


def test_file_of_one_average_holds_one():
    model = nn.Linear(100, 100)
    one, three = (EMA(model, [0.5] * count).averaged_state_dict() for count in (1, 3))
    assert size_of_file(three) < 1.1 * size_of_file(one)


def test_file_of_the_state_holds_each_average_once():
    model = nn.Linear(100, 100)
    model.tied = model.weight
    bytes_of = sum(tensor.numel() * 4 for tensor in model.parameters())
    for count in (1, 3):
        assert size_of_file(EMA(model, [0.5] * count).state_dict()) < 1.1 * count * bytes_of


# ---- Going on


def run(ema, first, last):
    for step in range(first, last):
        nudge(step, ema.model)
        ema.update()


@pytest.mark.hazard(39, "good")
@pytest.mark.parametrize("stop", [0, 1, 4, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_goes_on_with_the_same_bits(backend, options, stop):
    ema, dtype = EMA(small(), **options), torch.float32
    run(ema, 0, stop)
    weights, state = saved_and_loaded(ema.model.state_dict()), saved_and_loaded(ema.state_dict())
    run(ema, stop, 11)
    for fresh in (
        options,
        {**options, "decay": [0.123] * len(ema.schedules), "update_every": 7, "update_after_step": 4, "seed": 5},
    ):
        resumed = EMA(small(dtype), **fresh)
        run(resumed, 20, 23)  # what it held before does not matter
        resumed.model.load_state_dict(weights)
        resumed.load_state_dict(state)
        assert same_states(resumed.state_dict(), state)
        assert (resumed.step, resumed.schedules) == (stop, ema.schedules)
        run(resumed, stop, 11)
        assert same_states(resumed.state_dict(), ema.state_dict())
        assert (resumed.step, resumed.updates, resumed.decay) == (11, ema.updates, ema.decay)


FRESH = """
import sys
import torch
from test_ema_state import EMA, OPTIONS, run, small
for name, options in OPTIONS.items():
    weights, state = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    ema = EMA(small(), **options)
    ema.model.load_state_dict(weights)
    ema.load_state_dict(state)
    run(ema, ema.step, 11)
    torch.save(ema.state_dict(), f"{sys.argv[1]}/{name}.resumed")
"""


def test_goes_on_in_another_process(tmp_path):
    ends = {}
    for name, options in OPTIONS.items():
        ema = EMA(small(), **options)
        run(ema, 0, 4)
        torch.save((ema.model.state_dict(), ema.state_dict()), tmp_path / f"{name}.pt")
        run(ema, 4, 11)
        ends[name] = ema.state_dict()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", FRESH, tmp_path], check=True, timeout=120, env=environment)
    for name, state in ends.items():
        assert same_states(torch.load(tmp_path / f"{name}.resumed", weights_only=True), state), name


@pytest.mark.parametrize("index", [0, 1])
def test_saved_while_swapped(backend, index):
    # An evaluation that saves a checkpoint, which has to hold the state of a moment later.
    ema = EMA(small(), [0.9, 0.5])
    run(ema, 0, 4)
    with ema.swapped(index):
        state = saved_and_loaded(ema.state_dict())
    assert same_states(state, ema.state_dict())
    run(ema, 4, 8)
    resumed = EMA(small(), [0.9, 0.5])
    run(resumed, 0, 4)
    resumed.load_state_dict(state)
    run(resumed, 4, 8)
    assert same_states(resumed.state_dict(), ema.state_dict())


def test_own_schedule_goes_on_at_its_step(backend):
    asked = []
    ema = EMA(small(), [lambda n: 0.5, 0.9])
    run(ema, 0, 3)
    resumed = EMA(small(), [lambda n: asked.append(n) or 0.25, 0.1])
    resumed.load_state_dict(ema.state_dict())
    resumed.update()
    assert asked == [4]
    assert resumed.decay == (0.25, 0.9)


def test_wrapped_and_other_layouts(backend):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 2))
    ema = EMA(model, [0.5, 0.9])
    run(ema, 0, 2)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other[1] = nn.DataParallel(other[1])
    resumed = EMA(nn.DataParallel(other), [0.5, 0.9])
    resumed.load_state_dict(saved_and_loaded(ema.state_dict()))
    assert averages(resumed)["0.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in averages(ema).items():
        assert torch.equal(averages(resumed)[name], tensor)
    nudge(3, model, resumed.model)
    ema.update(), resumed.update()
    for k in range(2):
        for name, tensor in averages(ema, k).items():
            assert torch.equal(averages(resumed, k)[name], tensor)


def test_a_loaded_state_is_not_shared(backend):
    ema, other = EMA(small(), 0.5), EMA(small(), 0.9)
    run(other, 0, 2)
    state = other.state_dict()
    before = copy.deepcopy(state)
    ema.load_state_dict(state)
    run(ema, 2, 4)
    assert same_states(state, before)


def test_its_own_state(backend):
    ema = EMA(small(), [0.5, 0.9])
    run(ema, 0, 3)
    before = copy.deepcopy(ema.state_dict())
    ema.load_state_dict(ema.state_dict())
    assert same_states(ema.state_dict(), before)


def test_narrower_averages_are_widened(backend):
    narrow = EMA(small(), 0.5, dtype=torch.bfloat16)
    run(narrow, 0, 3)
    ema = EMA(small(), 0.5)
    ema.load_state_dict(narrow.state_dict())
    assert all(torch.equal(averages(ema)[name], tensor.float()) for name, tensor in averages(narrow).items())


# ---- What is refused


def changed(**changes):
    return lambda state: {**state, **changes}


def with_averages(change):
    """The state with `change` made to its last average, after values that must not get in."""

    def apply(state):
        new = [{name: tensor + 7 for name, tensor in each.items()} for each in state["averages"]]
        change(new[-1])
        return {**state, "averages": new, "step": 77}

    return apply


def reshaped(average):
    average["1.weight"] = average["1.weight"].reshape(7, 33)
    average["1.bias"] = torch.zeros(1)


def fake(size):
    with FakeTensorMode():
        return torch.ones(size)


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED = {
    "no mapping": (lambda state: [1, 2], ["list"]),
    "none": (lambda state: None, ["NoneType"]),
    "empty": (lambda state: {}, ["'averages'"]),
    "a model's": (lambda state: small().state_dict(), ["'averages'", "'0.weight'"]),
    "key missing": (lambda state: {key: state[key] for key in state if key != "step"}, ["'step'"]),
    "key more": (changed(extra=1), ["'extra'"]),
    "version": (changed(version=2), ["version", "2"]),
    "version None": (changed(version=None), ["version", "None"]),
    "rounding": (changed(rounding="stochastic"), ["rounding", "'nearest'", "'stochastic'"]),
    "step": (changed(step=-1), ["step", "-1"]),
    "step a float": (changed(step=2.0), ["step", "2.0"]),
    "step None": (changed(step=None), ["step", "None"]),
    "updates": (changed(updates="rubbish"), ["updates", "'rubbish'"]),
    "update_every": (changed(update_every=0), ["update_every", "0"]),
    "update_after_step": (changed(update_after_step="x"), ["update_after_step", "'x'"]),
    "seed": (changed(seed=-5), ["seed", "-5"]),
    "decays None": (changed(decays=None), ["decays"]),
    "decays three": (changed(decays=[0.1] * 3), ["decays", "3"]),
    "decays nan": (changed(decays=[0.5, math.nan]), ["decay", "nan"]),
    "schedules None": (changed(schedules=None), ["schedules"]),
    "schedule": (changed(schedules=[{"name": "constant", "D": 2.0}] * 2), ["constant", "D"]),
    "schedule unknown": (changed(schedules=[{"name": "eval", "D": 0.5}] * 2), ["'eval'"]),
    "averages None": (changed(averages=None), ["averages", "NoneType"]),
    "averages by no name": (changed(averages=[[], []]), ["by name", "list"]),
    "fewer averages": (lambda state: {**state, "averages": state["averages"][:1]}, ["averages", "2", "1"]),
    "more averages": (lambda state: {**state, "averages": state["averages"] * 2}, ["averages", "2", "4"]),
    "missing name": (with_averages(lambda a: a.pop("1.bias")), ["missing from the state: '1.bias'"]),
    "more names": (with_averages(lambda a: a.update({f"x{i}": 1 for i in range(7)})), ["'x4'", "2 more"]),
    "other names": (
        with_averages(lambda a: a.update(x=a.pop("0.bias"))),
        ["unexpected in the state: 'x'", "missing from the state: '0.bias'"],
    ),
    "shapes": (with_averages(reshaped), ["'1.weight'", "(33, 7)", "(7, 33)", "'1.bias'", "(33,)", "(1,)"]),
    "wider": (with_averages(lambda a: a.update({"1.bias": a["1.bias"].double()})), ["'1.bias'", "float32", "float64"]),
    "complex": (with_averages(lambda a: a.update({"1.bias": a["1.bias"] + 0j})), ["'1.bias'", "complex64"]),
    "nested": (with_averages(lambda a: a.update({"1.bias": torch.nested.nested_tensor([a["1.bias"]])})), ["'1.bias'"]),
    "lazy": (with_averages(lambda a: a.update({"1.bias": nn.UninitializedParameter()})), ["'1.bias'", "lazy"]),
    "fake": (with_averages(lambda a: a.update({"1.bias": fake(33)})), ["'1.bias'", "plain tensor", "FakeTensor"]),
    "freed": (with_averages(lambda a: a["1.bias"].untyped_storage().resize_(0)), ["'1.bias'", "132 bytes", "freed"]),
    "cut off": (with_averages(lambda a: a["1.bias"].untyped_storage().resize_(4)), ["'1.bias'", "of 4 bytes"]),
    "version of tensors": (changed(version=torch.ones(2)), ["version", "Tensor"]),
    "rounding of tensors": (changed(rounding=torch.ones(2)), ["rounding", "Tensor"]),
    "step freed": (changed(step=freed()), ["step", "Tensor"]),
    "step too large": (changed(step=10**400), ["step", "below 2**64"]),
    "schedule freed": (changed(schedules=[{"name": freed(), "D": 0.5}] * 2), ["schedule", "a Tensor"]),
    "no tensor": (with_averages(lambda a: a.update({"1.bias": [0.0] * 33})), ["'1.bias'", "list"]),
}
HALF_WRITTEN = "_fitting lets it through: copy_() raises after the first averages were written"
NOT_YET = {
    "decays strings": (changed(decays=["x", "y"]), ["decay"], "TypeError"),
    "schedules numbers": (changed(schedules=[1, 2]), ["schedule"], "taken for schedules of the user's"),
    "integers": (with_averages(lambda a: a.update({"1.bias": a["1.bias"].long()})), ["int64"], "taken, truncated"),
    "bools": (with_averages(lambda a: a.update({"1.bias": a["1.bias"] > 0})), ["bool"], "taken"),
    "float8": (
        with_averages(lambda a: a.update({"1.bias": a["1.bias"].to(torch.float8_e4m3fn)})),
        ["'1.bias'", "float8_e4m3fn"],
        "RuntimeError of promote_types, without the name",
    ),
    "meta": (with_averages(lambda a: a.update({"1.bias": a["1.bias"].to("meta")})), ["'1.bias'", "meta"], HALF_WRITTEN),
    "sparse": (with_averages(lambda a: a.update({"1.bias": a["1.bias"].to_sparse()})), ["'1.bias'"], HALF_WRITTEN),
}
CASES = [pytest.param(*case, id=name) for name, case in REFUSED.items()] + [
    pytest.param(*case, id=name) for name, (*case, reason) in NOT_YET.items()
]


@pytest.mark.parametrize(("change", "names"), CASES)
def test_refused_and_nothing_changed(backend, change, names):
    ema = EMA(small(), [0.5, tf_warmup(0.9)])
    run(ema, 0, 3)
    before = copy.deepcopy(ema.state_dict())
    state = change(copy.deepcopy(before))
    refused(ValueError, lambda: ema.load_state_dict(state), ema.model, averages(ema), averages(ema, 1), names=names)
    assert same_states(ema.state_dict(), before)
    assert ema.schedules == (constant(0.5), tf_warmup(0.9))
    ema.update()


@pytest.mark.hazard(39, "guarded")
@pytest.mark.parametrize(
    ("mine", "theirs", "names"),
    [
        ({}, {"decay": [0.5, 0.9]}, ["1 averages", "2"]),
        ({}, {"dtype": torch.float64}, ["float32", "float64", "'0.weight'"]),
        ({"dtype": torch.bfloat16}, {}, ["bfloat16", "float32", "'0.weight'"]),
        ({"dtype": torch.bfloat16}, {"dtype": torch.float16}, ["bfloat16", "float16", "'0.weight'"]),
        (
            {"dtype": torch.bfloat16, "rounding": "stochastic"},
            {"dtype": torch.bfloat16},
            ["rounding", "'stochastic'", "'nearest'"],
        ),
        ({}, {"select": lambda n, p: n != "1.bias"}, ["missing from the state: '1.bias'"]),
        ({"select": lambda n, p: n != "1.bias"}, {}, ["unexpected in the state: '1.bias'"]),
    ],
)
def test_of_another_manager_is_refused(backend, mine, theirs, names):
    ema, other = EMA(small(), **{"decay": 0.9, **mine}), EMA(small(), **{"decay": 0.9, **theirs})
    run(other, 0, 2)
    before = copy.deepcopy(ema.state_dict())
    refused(ValueError, lambda: ema.load_state_dict(other.state_dict()), averages(ema), ema.model, names=names)
    assert same_states(ema.state_dict(), before)


# ---- Pickles and copies of the manager


def pickled(ema):
    return pickle.loads(pickle.dumps(ema))


@pytest.mark.hazard(30, "good")
@pytest.mark.parametrize("duplicate", [pickled, copy.deepcopy])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_copies_go_on_by_themselves(backend, duplicate, options):
    ema = EMA(small(), **options)
    ema.model.tied = ema.model[0].weight
    ema = EMA(ema.model, **options)
    run(ema, 0, 4)
    other = duplicate(ema)
    assert other.model is not ema.model
    assert same_states(other.state_dict(), ema.state_dict())
    assert averages(other)["tied"].data_ptr() == averages(other)["0.weight"].data_ptr()
    before = copy.deepcopy(other.state_dict())
    run(ema, 4, 9)
    assert same_states(other.state_dict(), before)
    run(other, 4, 9)
    assert same_states(other.state_dict(), ema.state_dict())
    with other.swapped():
        assert torch.equal(other.model[0].weight, averages(ema)["0.weight"].float())


def test_copies_are_refused_while_it_is_busy(backend):
    ema = EMA(small(), 0.5)
    run(ema, 0, 1)
    before = copy.deepcopy(ema.state_dict())
    with ema.swapped():
        for duplicate in (pickled, copy.deepcopy):
            with pytest.raises(RuntimeError, match="swap"):
                duplicate(ema)
    handle = ema.attach(torch.optim.SGD(ema.model.parameters(), 0.1))
    for duplicate in (pickled, copy.deepcopy):
        with pytest.raises(RuntimeError, match="detach the optimizer"):
            duplicate(ema)
    handle.remove()
    assert same_states(pickled(ema).state_dict(), before)


def test_another_model_takes_another_manager():
    ema = EMA(small(), 0.5)
    with pytest.raises(AttributeError):
        ema.model = small()


def test_its_own_averages_in_another_order(backend):
    """A state_dict holds no copies: what is read must not be what was just written."""
    ema = EMA(small(), [0.5, 0.25])
    run(ema, 0, 3)
    state = ema.state_dict()
    expected = [{name: value.clone() for name, value in each.items()} for each in state["averages"][::-1]]
    state["averages"].reverse()
    ema.load_state_dict(state)
    for found, wanted in zip(ema.state_dict()["averages"], expected, strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_tied_averages_that_differ_are_refused(backend):
    model = small()
    model.tied = model[0].weight
    ema = EMA(model, 0.5)
    state = copy.deepcopy(ema.state_dict())
    before = copy.deepcopy(state)
    state["averages"][0]["tied"] = state["averages"][0]["tied"] + 1
    with pytest.raises(ValueError, match=r"expected the values of '.*', which it is tied to"):
        ema.load_state_dict(state)
    assert same_states(ema.state_dict(), before)


FREED = {
    "distance": lambda ema, other, path: ema.distance(),
    "copy_to": lambda ema, other, path: ema.copy_to(other),
    "save_safetensors": lambda ema, other, path: checkpoints.save_safetensors(path, ema),
    "load_state_dict": lambda ema, other, path: ema.load_state_dict(other),
}


@pytest.mark.parametrize("call", FREED)
@pytest.mark.parametrize("which", ["parameter", "average", "buffer"])
def test_what_reads_freed_memory_is_refused(backend, call, which, tmp_path):
    """As offloading leaves it; to read it would end the process."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = EMA(model, 0.5)
    other = copy.deepcopy(ema.state_dict()) if call == "load_state_dict" else copy.deepcopy(model)
    tensors = {"parameter": model[0].weight, "buffer": model[1].running_mean}
    freed = tensors.get(which, averages(ema)["0.weight"])
    freed.untyped_storage().resize_(0)
    reads = {"parameter": {"distance"}, "average": set(FREED), "buffer": {"copy_to", "save_safetensors"}}[which]
    if call in reads:
        with pytest.raises((RuntimeError, ValueError), match="storage"):
            FREED[call](ema, other, tmp_path / "x.safetensors")
    else:
        FREED[call](ema, other, tmp_path / "x.safetensors")
