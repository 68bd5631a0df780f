"""A model whose names change under its manager: reselect(), names in common, layers that are unfrozen later."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import all_averages, averages, bits, refused, same_bits
from torch import nn

from fused_ema import EMA, _warning, posthoc, schedules


class Net(nn.Module):
    def __init__(self, classes=2, head=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        if head:
            self.head = nn.Linear(4, classes)


def fill(model, value):
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.fill_(value)


def trained(classes=2, decay=0.5, **options):
    """A manager of zeros, after one update towards ones."""
    model = Net(classes)
    fill(model, 0.0)
    ema = EMA(model, decay, **options)
    fill(model, 1.0)
    ema.update()
    return ema


def values(ema, k=0):
    """The value of each average; all of its elements are equal."""
    found = {name: tensor.unique().tolist() for name, tensor in averages(ema, k).items()}
    assert all(len(value) == 1 for value in found.values()), found
    return {name: value[0] for name, value in found.items()}


BODY = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
HEAD = ["head.weight", "head.bias"]
STATISTICS = ["body.1.running_mean", "body.1.running_var"]


def add(model):
    model.extra = nn.Linear(4, 2)
    fill(model.extra, 8.0)


def remove(model):
    del model.head


def widen(model):
    model.head = nn.Linear(4, 5)
    fill(model.head, 8.0)


def rename(model):
    widen(model)
    model.other = model.head
    del model.head


def unwrap(model):
    """Names change as wrappers go; nothing else does."""
    model.body = nn.Sequential(*model.body)


CHANGES = {
    add: (["extra.weight", "extra.bias"], []),
    remove: ([], HEAD),
    widen: (HEAD, HEAD),
    rename: (["other.weight", "other.bias"], HEAD),
    unwrap: ([], []),
}


@pytest.mark.hazard(48, "good")
@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_reselect(backend, change, buffers):
    """What is new begins as a copy, what is gone is dropped, and the rest goes on, in each of two averages."""
    ema = trained(decay=[0.5, 0.75], buffers=buffers)
    kept = {name: tensor.data_ptr() for name, tensor in averages(ema).items()}
    added, dropped = CHANGES[change]
    change(ema.model)
    assert ema.reselect() == (added, dropped)
    assert ema.step == 1
    here = [*BODY, *(STATISTICS if buffers == "average" else []), *(x for x in HEAD if x not in dropped), *added]
    assert sorted(values(ema)) == sorted(here)
    for k, moved in enumerate((0.5, 0.25)):
        assert values(ema, k) == {name: 8.0 if name in added else moved for name in here}
    assert all(averages(ema)[name].data_ptr() == kept[name] for name in here if name not in added)
    fill(ema.model, 2.0)
    ema.update()
    assert values(ema) == {name: 5.0 if name in added else 1.25 for name in here}
    before = bits(ema.model)
    with ema.swapped(1):
        assert {p.unique().item() for p in ema.model.parameters()} <= {0.25 * 0.75 + 0.5, 6.5}
    assert same_bits(before, ema.model)
    ema.model.load_state_dict(ema.averaged_state_dict())
    assert ema.reselect() == ([], [])


@pytest.mark.hazard(48, "guarded")
@pytest.mark.parametrize("change", [add, remove, widen, rename], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "call", [EMA.update, EMA.averaged_state_dict, EMA.copy_to, lambda ema: ema.swapped().__enter__()]
)
def test_the_advice_of_a_changed_model_works(backend, change, call):
    ema = trained()
    change(ema.model)
    refused(ValueError, lambda: call(ema), ema.model, averages(ema), names=["expected", "call ema.reselect()"])
    assert "call ema.reselect()" in ema.describe()["problem"]
    ema.reselect()
    call(ema)


def test_reselect_while_attached(backend):
    ema = trained()
    optimizer = torch.optim.SGD(ema.model.parameters(), 1.0)
    ema.attach(optimizer, save=True)
    add(ema.model)
    optimizer.add_param_group({"params": list(ema.model.extra.parameters())})
    for parameter in ema.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"call ema.reselect\(\)"):
        optimizer.step()
    fill(ema.model, 1.0)
    fill(ema.model.extra, 8.0)
    assert ema.reselect()[0] == ["extra.weight", "extra.bias"]
    optimizer.step()
    assert values(ema) == {**dict.fromkeys([*BODY, *HEAD], 0.25), "extra.weight": 7.5, "extra.bias": 7.5}
    other = EMA(copy.deepcopy(ema.model))
    again = torch.optim.SGD(other.model.parameters(), 1.0)
    other.attach(again, save=True)
    again.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    state = optimizer.state_dict()
    other.load_state_dict(state["fused_ema"])
    assert values(other) == values(ema)


def test_reselect_of_tied_names(backend):
    """A name that becomes tied follows the tensor; one that is no longer goes on by itself, from the same values."""
    model = Net(4)
    model.twin = model.body[0].bias
    model.register_parameter("lone", nn.Parameter(torch.zeros(4)))
    fill(model, 0.0)
    ema = EMA(model, [0.5, 0.75])
    fill(model, 1.0)
    ema.update()
    model.lone = model.body[0].bias
    model.body[0].bias = nn.Parameter(torch.ones(4))
    assert ema.reselect() == ([], [])
    own = averages(ema)
    assert own["lone"].data_ptr() == own["twin"].data_ptr() != own["body.0.bias"].data_ptr()
    with torch.no_grad():
        model.lone.fill_(3.0)
    ema.update()
    assert values(ema) == {**dict.fromkeys(values(ema), 0.75), "lone": 1.75, "twin": 1.75}
    assert values(ema, 1)["twin"] == 0.25 * 0.75 + 0.75
    model.new = model.lone
    assert ema.reselect() == (["new"], [])
    assert values(ema)["new"] == 1.75


def test_tied_since(backend):
    ema = trained()
    ema.model.body[1].bias = ema.model.body[0].bias
    refused(ValueError, lambda: ema.swapped().__enter__(), averages(ema), names=["bytes shared", "call ema.reselect()"])
    ema.reselect()
    with ema.swapped():
        assert ema.model.body[0].bias.eq(0.5).all()


def test_untied_since(backend):
    model = Net()
    model.body[1].bias = model.body[0].bias
    ema = EMA(model, 0.5)
    model.body[1].bias = nn.Parameter(torch.zeros_like(model.body[0].bias))
    refused(ValueError, ema.update, averages(ema), names=["one model tensor", "call ema.reselect()"])
    ema.reselect()
    ema.update()


def test_bytes_shared_by_tensors_that_are_not_tied(backend):
    """reselect() would not help."""
    ema = trained()
    ema.model.body[1].bias.data = ema.model.body[0].bias.data
    with pytest.raises(ValueError, match=r"bytes shared with [^;]*$"):
        ema.swapped().__enter__()


class Adapters(nn.Module):
    """Its state leaves frozen parts out."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(2, 2), nn.Linear(2, 2)

    def state_dict(self, **options):
        return {name: value for name, value in super().state_dict(**options).items() if "adapter" in name}


def test_a_state_that_leaves_averages_out(backend):
    """As the error says: either way."""
    ema = EMA(Adapters(), 0.5)
    own = averages(ema)
    refused(RuntimeError, ema.averaged_state_dict, own, names=["'base.weight'", "by ema.reselect(", "by ema.copy_to"])
    ema.copy_to(other := copy.deepcopy(ema.model))
    assert torch.equal(other.base.weight, own["base.weight"])
    ema.reselect(lambda name, tensor: name in ema.model.state_dict())
    assert [*ema.averaged_state_dict()] == ["adapter.weight", "adapter.bias"]


def test_describe_keeps_the_plan_where_a_tensor_was_replaced(backend):
    ema = trained()
    ema.update()
    plan = ema._plan
    ema.model.head.bias = nn.Parameter(torch.zeros_like(ema.model.head.bias))
    assert "problem" not in ema.describe()
    assert ema._plan is plan
    assert plan.prepared.current() or backend == "torch"


def test_reselect_by_another_choice(backend):
    ema = trained(select=lambda name, _: name.startswith("body"))
    assert ema.reselect(lambda name, _: not name.startswith("body.0")) == (HEAD, ["body.0.weight", "body.0.bias"])
    assert values(ema) == {"body.1.weight": 0.5, "body.1.bias": 0.5, **dict.fromkeys(HEAD, 1.0)}
    add(ema.model)
    assert ema.reselect()[0] == ["extra.weight", "extra.bias"], "it is the manager's from now on"


def test_an_adapter_that_select_turns_down(backend):
    ema = trained(select=lambda name, _: "extra" not in name)
    add(ema.model)
    refused(ValueError, ema.update, averages(ema), names=["'extra.weight'", "call ema.reselect()"])
    assert ema.reselect() == ([], [])
    ema.update()


def test_16_bit_averages_keep_their_type(backend):
    ema = trained(dtype=torch.bfloat16, rounding="stochastic")
    add(ema.model)
    ema.reselect()
    assert {tensor.dtype for tensor in averages(ema).values()} == {torch.bfloat16}
    for duplicate in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        add(duplicate.model.head)
        duplicate.reselect()
        assert {tensor.dtype for tensor in averages(duplicate).values()} == {torch.bfloat16}


def test_reselect_that_is_refused_changes_nothing(backend):
    ema = trained(select=lambda name, _: name != "body.0.bias")
    ema.model.lazy = nn.LazyLinear(2)
    before = values(ema)

    def unchanged(error, call, *names):
        refused(error, call, averages(ema), names=names)
        assert values(ema) == before

    unchanged(RuntimeError, ema.reselect, "'lazy.weight'", "initialised")
    unchanged(ValueError, lambda: ema.reselect(lambda *_: False), "select: expected some")
    unchanged(TypeError, lambda: ema.reselect([]), "select: expected a function")
    del ema.model.lazy
    ema.model.alias = nn.Parameter(ema.model.head.weight.detach())
    ema.model.part = nn.Parameter(averages(ema)["head.weight"])
    unchanged(ValueError, ema.reselect, "bytes shared")
    del ema.model.alias, ema.model.part
    with ema.swapped(), pytest.raises(RuntimeError, match=r"EMA.reselect\(\) was called inside swapped\(\)"):
        ema.reselect()
    ema.update()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_asks_for_select(backend, duplicate):
    other = duplicate(trained(select=lambda name, _: name in HEAD))
    add(other.model)
    refused(ValueError, other.reselect, averages(other), names=["pass it: ema.reselect(select)"])
    assert other.reselect(lambda name, _: "bias" in name)[0] == ["body.0.bias", "body.1.bias", "extra.bias"]
    other = duplicate(trained())
    add(other.model)
    assert other.reselect()[0] == ["extra.weight", "extra.bias"]


def test_snapshots_after_a_change(backend, tmp_path):
    pytest.importorskip("safetensors")
    power = schedules.power_function
    ema = trained(decay=[power(0.05), power(0.1)])
    posthoc.save_snapshot(tmp_path / "before", ema)
    add(ema.model)
    ema.reselect()
    for _ in range(4):
        ema.update()
    posthoc.save_snapshot(tmp_path / "before", ema)
    with pytest.raises(ValueError, match=r"'extra.weight'.*after EMA.reselect\(\) save snapshots into a new folder"):
        posthoc.reconstruct(tmp_path / "before", 0.05)
    posthoc.save_snapshot(tmp_path / "after", ema)
    found = posthoc.reconstruct(tmp_path / "after", 0.05)
    assert found.keys() == averages(ema).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in averages(ema).items())


# ---- Names in common


@pytest.fixture
def heard():
    """The warnings so far, each given whenever it is called for."""
    _warning._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found
    _warning._warn_once.cache_clear()


@pytest.mark.parametrize("head", [True, False])
def test_the_advice_of_a_state_that_does_not_fit_works(backend, heard, head):
    """A state of other classes, or with a head more or less, loads what both have."""
    saved = trained(5, decay=[0.5, 0.75]).state_dict()
    ema = EMA(Net(2, head), [0.5, 0.75])
    fill(ema.model, 3.0)
    refused(ValueError, lambda: ema.load_state_dict(saved), averages(ema), names=["names='common'", "ema.reselect()"])
    own = [{name: tensor.clone() for name, tensor in each.items()} for each in all_averages(ema)]
    ema.load_state_dict(saved, names="common")
    assert ema.step == 1
    assert "'head.weight'" in str(heard.pop().message)
    assert not heard
    for k, moved in enumerate((0.5, 0.25)):
        assert all(averages(ema, k)[name].eq(moved).all() for name in BODY)
        assert all(torch.equal(averages(ema, k)[name], own[k][name]) for name in (HEAD if head else []))
    ema.update()


def test_the_advice_of_an_optimizer_with_a_state_that_does_not_fit_works(backend):
    saved = attached(trained(5)).state_dict()
    ema = EMA(Net(2))
    optimizer = attached(ema)
    refused(
        ValueError, lambda: optimizer.load_state_dict(saved), averages(ema), names=["optimizer_state.pop('fused_ema')"]
    )
    _warning._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="leaves out"):
        ema.load_state_dict(saved.pop("fused_ema"), names="common")
    with pytest.warns(UserWarning, match="no averages"):
        optimizer.load_state_dict(saved)
    assert all(averages(ema)[name].eq(0.5).all() for name in BODY)


def test_the_other_advice_of_a_state_that_does_not_fit_works(backend):
    """The run that was saved had called reselect(): so does the one that resumes."""
    first = trained()
    add(first.model)
    first.reselect()
    ema = trained()
    add(ema.model)
    refused(ValueError, lambda: ema.load_state_dict(first.state_dict()), averages(ema), names=["ema.reselect() first"])
    ema.reselect()
    ema.load_state_dict(first.state_dict())
    assert values(ema) == values(first)


def test_a_state_with_one_of_two_tied_names(backend, heard):
    saved = trained().state_dict()
    model = Net()
    model.twin = model.head.bias
    ema = EMA(model, 0.5)
    ema.load_state_dict(saved, names="common")
    assert values(ema) == dict.fromkeys(values(ema), 0.5)
    other = EMA(Net(), 0.5)
    other.load_state_dict(ema.state_dict(), names="common")
    assert values(other) == dict.fromkeys(values(other), 0.5)
    (warning,) = heard  # of the second: in the first nothing was left out
    assert "unexpected in the state: 'twin'" in str(warning.message)


@pytest.mark.parametrize("names", ["all", None])
def test_other_words_for_names_are_refused(backend, names):
    ema = trained()
    call = {"expected 'equal' or 'common'"}
    refused(ValueError, lambda: ema.load_state_dict(ema.state_dict(), names=names), averages(ema), names=call)
    refused(ValueError, lambda: ema.copy_to(names=names), ema.model, names=call)


def test_nothing_in_common_is_refused(backend):
    ema, other = EMA(nn.Linear(2, 3)), EMA(nn.Linear(4, 5))
    call = lambda: ema.load_state_dict(other.state_dict(), names="common")  # noqa: E731
    refused(ValueError, call, averages(ema), names=["EMA.load_state_dict: expected some tensors in common"])
    call = lambda: ema.copy_to(other.model, names="common")  # noqa: E731
    refused(ValueError, call, other.model, names=["EMA.copy_to: expected some tensors in common"])


@pytest.mark.parametrize("other", [lambda: Net(5), lambda: Net(head=False)], ids=["widened", "no head"])
def test_the_advice_of_copy_to_works(backend, heard, other):
    ema, fresh = trained(), nn.DataParallel(other())
    fill(fresh, 7.0)
    refused(ValueError, lambda: ema.copy_to(fresh), fresh, averages(ema), names=["pass names='common'"])
    ema.copy_to(fresh, names="common")
    found = {name: tensor.unique().tolist() for name, tensor in fresh.module.named_parameters()}
    assert found == {name: [7.0] if "head" in name else [0.5] for name in found}
    assert fresh.module.body[1].running_mean.eq(1).all(), "what is not averaged comes from the model"
    assert len(heard) == 1
    assert "names='common' leaves out" in str(heard[0].message)


def test_copy_to_a_model_that_has_changed(backend, heard):
    ema = trained()
    rename(ema.model)
    fresh = Net()
    ema.copy_to(fresh, names="common")
    assert fresh.head.weight.eq(0.5).all(), "averages are there, though the model has lost the name"
    ema.copy_to(names="common")
    assert ema.model.body[0].weight.eq(0.5).all()
    assert ema.model.other.weight.eq(8).all()


def test_extra_states_in_common(backend, heard):
    class Scaled(nn.Linear):
        scale = 1.0

        def get_extra_state(self):
            return {"scale": self.scale}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    def make(*names):
        return nn.ModuleDict({"plain": nn.Linear(2, 2), **{name: Scaled(2, 2) for name in names}})

    ema, fresh = EMA(make("mine", "both")), make("both", "theirs")
    ema.model["both"].scale = 3.0
    refused(ValueError, lambda: ema.copy_to(fresh), fresh, names=["pass names='common'"])
    ema.copy_to(fresh, names="common")
    assert (fresh["both"].scale, fresh["theirs"].scale) == (3.0, 1.0)


# ---- Layers that are unfrozen later


def by_requires_grad(name, parameter):
    return parameter.requires_grad


def frozen(select=by_requires_grad):
    model = Net()
    model.body.requires_grad_(False)
    return EMA(model, 0.5, select=select)


MOMENTS = {
    "swapped": lambda ema: ema.swapped().__enter__(),
    "state_dict": EMA.state_dict,
    "averaged_state_dict": EMA.averaged_state_dict,
    "copy_to": EMA.copy_to,
    "the optimizer's state": lambda ema: save_with_optimizer(ema),
    "a new plan": lambda ema: ema.to("cpu").update(),
}


def attached(ema):
    optimizer = torch.optim.SGD(ema.model.parameters(), 0.1)
    ema.attach(optimizer, save=True)
    return optimizer


def save_with_optimizer(ema):
    optimizer = torch.optim.SGD(ema.model.parameters(), 0.1)
    handle = ema.attach(optimizer, save=True)
    optimizer.state_dict()
    handle.remove()


@pytest.mark.parametrize("moment", MOMENTS)
def test_unfrozen_layers_are_said_once_and_the_advice_works(backend, heard, moment):
    ema = frozen()
    ema.update(), ema.state_dict()
    assert not heard
    ema.model.body.requires_grad_(True)
    MOMENTS[moment](ema)
    assert len(heard) == 1
    for part in (f"'{BODY[0]}'", "requires_grad=False", "call ema.reselect()"):
        assert part in str(heard[0].message)
    if moment == "swapped":
        return
    ema.state_dict(), ema.averaged_state_dict()
    assert len(heard) == 1
    assert sorted(ema.reselect()[0]) == sorted(BODY)
    fill(ema.model, 1.0)
    ema.update(), ema.state_dict()
    assert len(heard) == 1
    assert sorted(averages(ema)) == sorted([*BODY, *HEAD])


def test_layers_unfrozen_in_phases_are_said_after_each_reselect(backend, heard):
    ema = frozen()
    for count, layer in enumerate(ema.model.body, 1):
        layer.requires_grad_(True)
        ema.state_dict()
        assert len(heard) == count
        ema.reselect()


def test_layers_unfrozen_in_phases_are_said_once_where_nobody_listens(backend, heard):
    ema = frozen()
    for layer in ema.model.body:
        layer.requires_grad_(True)
        ema.state_dict()
    assert len(heard) == 1


def test_what_select_turns_down_by_name_is_no_news(backend, heard):
    ema = frozen(lambda name, _: "head" in name)
    ema.model.body.requires_grad_(True)
    ema.state_dict(), ema.averaged_state_dict()
    assert not heard
    ema = EMA(Net(), 0.5, select=by_requires_grad)
    ema.model.body.requires_grad_(False)  # frozen later: their averages stand still
    ema.state_dict(), ema.update()
    assert not heard


def test_an_update_does_not_ask(backend):
    asked = []
    ema = frozen(lambda name, p: asked.append(name) or p.requires_grad)
    ema.update()
    asked.clear()
    ema.model.body.requires_grad_(True)
    for _ in range(5):
        ema.update()
    assert not asked
