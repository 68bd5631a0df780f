"""How long plans live: copies and pickles make their own, and no plan keeps a model or a tensor alive."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from conftest import bits, net, same_bits, source, tensors_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fused_ema
from fused_ema import functional
from fused_ema.plan import Plan

pytestmark = pytest.mark.usefixtures("quick_collections")

# ---- Copies and pickles


@pytest.fixture(params=[copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def copied(request):
    return request.param


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_with_the_function_in_it(backend, copied, use_buffers):
    model = net()
    averaged = AveragedModel(model, multi_avg_fn=fused_ema.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    averaged.update_parameters(model)  # the first update copies
    before = averaged.module[0].weight.clone()
    again = copied(averaged)
    with torch.no_grad():
        model[0].weight.add_(2)
        model[1].num_batches_tracked.add_(3)
    again.update_parameters(model)
    assert torch.allclose(again.module[0].weight, before + 1, atol=1e-5)
    assert torch.equal(again.module[1].num_batches_tracked, model[1].num_batches_tracked)
    assert torch.equal(averaged.module[0].weight, before)


def test_a_binding_travels_with_its_modules(backend, copied):
    ema, model = net(), net()
    handle = fused_ema.bind(ema, model, buffers="ignore")
    handle.update(0.5)
    before = bits(ema, model)
    other_ema, other_model, other = copied((ema, model, handle))
    with torch.no_grad():
        other_model[0].weight.fill_(3)
    other.update(0.0)
    assert other_ema[0].weight.unique().tolist() == [3.0]
    assert not torch.equal(other_ema[1].running_mean, other_model[1].running_mean)
    assert same_bits(before, ema, model)


def test_copies_of_a_model_that_holds_its_binding(backend, copied):
    ema, model = net(), net()
    model.handle = fused_ema.bind(ema, model)
    other = copied(model)
    with torch.no_grad():
        other[0].weight.add_(1)
    before = bits(ema)
    other.handle.update(0.0)
    average, averaged = other.handle._sources[:2]
    assert averaged is other
    assert torch.equal(average[0].weight, other[0].weight)
    assert same_bits(before, ema)


# ---- What plans do not keep alive


class Knot(nn.Module):
    """A module that refers to itself, as those with hooks, bound methods or parents in their attributes do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.callback = self.forward
        self.layer.register_forward_hook(self.hook)

    def hook(self, *_):
        pass


@pytest.mark.parametrize("make", [net, Knot], ids=["plain", "knot"])
@pytest.mark.parametrize("operation", [lambda e, m: fused_ema.update(e, m, 0.5), fused_ema.copy_, fused_ema.swap_])
def test_cached_plans_keep_no_module_alive(backend, make, operation):
    ema, model = make(), make()
    operation(ema, model)
    dead = [weakref.ref(x) for side in (ema, model) for x in (side, *side.parameters())]
    memory = weakref.ref(model.get_parameter("0.weight" if make is net else "layer.weight").untyped_storage())
    del ema, model
    gc.collect()
    assert [reference() for reference in dead] == [None] * len(dead)
    assert memory() is None
    assert not functional._module_plans


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_cached_plans_keep_no_tensor_alive(backend, kind):
    ema, model = source(kind, {"w": torch.ones(3)}), source(kind, {"w": torch.zeros(3)})
    fused_ema.update(ema, model, 0.5)
    fused_ema.update(ema, model, 1.0)
    with pytest.raises(ValueError, match="decay"):
        fused_ema.update(ema, model, 2.0)
    dead = [weakref.ref(tensor) for tensor in tensors_of(ema, model)]
    del ema, model
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


@pytest.mark.parametrize("make", [net, Knot], ids=["plain", "knot"])
def test_a_dropped_binding_frees_its_modules(backend, make):
    ema, model = make(), make()
    handle = fused_ema.bind(ema, model)
    handle.update(0.5)
    dead = [weakref.ref(ema), weakref.ref(model), weakref.ref(next(model.parameters()))]
    del ema, model, handle
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3


def test_a_binding_kept_by_its_own_model(backend):
    ema, model = net(), net()
    model.handle = fused_ema.bind(ema, model)
    model.handle.update(0.5)
    dead = weakref.ref(model)
    del ema, model
    gc.collect()
    assert dead() is None


WAYS = {
    "update": lambda ema, model: functools.partial(fused_ema.update, ema, model, 0.5),
    "bind": lambda ema, model: functools.partial(fused_ema.bind(ema, model).update, 0.5),
    "manager": lambda _, model: fused_ema.EMA(model).update,
}


@pytest.mark.parametrize("way", WAYS)
def test_replaced_tensors_are_freed_at_once(backend, way):
    ema, model = net(), net()
    step = WAYS[way](ema, model)
    step()
    dead = weakref.ref(model[0].weight), weakref.ref(model[0].weight.untyped_storage())
    model[0].weight = nn.Parameter(torch.ones(4, 3))
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    step()


def test_a_model_that_its_own_tensors_refer_to(backend):
    ema, model = net(), net()
    model[0].weight.owner = model
    model[0].bias.register_hook(lambda _, owner=model: owner.training)
    fused_ema.update(ema, model, 0.5)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert not functional._module_plans


def test_a_new_model_at_an_old_address(backend):
    for value in range(50):
        ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.fill_(value)
        fused_ema.update(ema, model, 0.0)
        assert ema.weight.unique().tolist() == [value]


# ---- Which plans are kept


def test_many_pairs_of_modules_keep_their_plans():
    if fused_ema.backend("cpu") != "cpu":
        pytest.skip("the pure-PyTorch path keeps no plans")
    pairs = [(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(40)]
    for ema, model in pairs:
        fused_ema.update(ema, model, 0.5)
    plans = {key: entry[0] for key, entry in functional._module_plans.items()}
    for ema, model in pairs:
        fused_ema.update(ema, model, 0.5)
        key = (id(ema), id(model), "copy", "equal")
        assert functional._module_plans[key][0] is plans[key]


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_plans_of_lists_end_with_the_least_recently_used(backend, monkeypatch):
    most = 16
    monkeypatch.setattr(functional, "_MOST_PAIRS", most)
    pairs = [([torch.ones(2)], [torch.zeros(2)]) for _ in range(most + 1)]

    def update(i):
        """Updates pair i and returns the plan that ran, which was used last."""
        fused_ema.update(*pairs[i], 0.5)
        return next(reversed(functional._list_plans.values()))[0]

    plans = [update(i) for i in range(most)]
    assert update(0) is plans[0]
    new = update(most)  # takes the place of the second plan
    assert [plan for plan, _ in functional._list_plans.values()] == [*plans[2:], plans[0], new]
    assert update(2) is plans[2]
    assert update(1) is not plans[1]
    assert len(functional._list_plans) == most
    assert [ema[0].tolist() for ema, _ in pairs] == [[0.5**n] * 2 for n in (2, 2, 2, *[1] * (most - 2))]


def plans_made(monkeypatch):
    made, init = [], Plan.__init__

    def counting(self, *arguments, **options):
        made.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(Plan, "__init__", counting)
    return made


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("anew", [False, True])
def test_many_pairs_of_lists_keep_their_plans(backend, monkeypatch, kind, anew):
    """Also where the lists, or the tensor objects in them, are made anew at each call."""
    pairs = [[{"a": torch.full((2,), value), "b": torch.ones(1)} for value in (1.0, float(i))] for i in range(200)]
    made = plans_made(monkeypatch)
    for _ in range(3):
        for ema, model in pairs:
            if anew:
                ema, model = ({name: tensor.detach() for name, tensor in side.items()} for side in (ema, model))
            fused_ema.update(source(kind, ema), source(kind, model), 0.5)
    assert len(made) == 200
    assert [pair[0]["a"].tolist() for pair in pairs] == [[(1 + 7 * i) / 8] * 2 for i in range(200)]


def test_one_list_of_averages_follows_two_models_in_turn(backend, monkeypatch):
    ema, models = [torch.zeros(2)], [[torch.ones(2)], [torch.zeros(2)]]
    made = plans_made(monkeypatch)
    for _ in range(3):
        for model in models:
            fused_ema.update(ema, model, 0.5)
    assert len(made) == 2
    assert ema[0].tolist() == [0.25 + 0.0625 + 0.015625] * 2


def test_plans_of_lists_go_with_the_memory_of_their_averages(backend):
    for _ in range(3):
        ema, model = ([torch.ones(5), torch.ones(3)] for _ in range(2))
        fused_ema.update(ema, model, 0.5)
        fused_ema.update([tensor.detach() for tensor in ema], model, 0.5)
        assert len(functional._list_plans) == 1
        view = ema[0].view(5, 1)
        del ema
        gc.collect()
        assert len(functional._list_plans) == 1
        del view
        gc.collect()
        assert not functional._list_plans
