"""Tied tensors run once; averages that overlap, or lie in the model's memory, are refused."""

import pytest
import torch
from conftest import label, net, refused, source
from torch import nn

import fused_ema

# ---- Tied tensors


@pytest.mark.hazard(1, "good")
def test_tied_pair_runs_once(update, kind):
    e, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    update(source(kind, {"a": e, "b": e}), source(kind, {"a": p, "b": p}), 0.5)
    assert e.tolist() == [2.0, 0.0]
    assert e._version == 1


def test_tied_through_other_tensor_objects(update):
    e, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    update([e, e.detach(), e.view(2)], [p, p[:], p.detach()], 0.5)
    assert e.tolist() == [2.0, 0.0]


def test_tied_modules_average_each_weight_once(update):
    def tied(value):
        module = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        module["head"].weight = module["embed"].weight
        module["again"] = module["head"]
        nn.init.constant_(module["embed"].weight, value)
        return module

    ema, model = tied(3.0), tied(1.0)
    update(ema, model, 0.5)
    assert ema["embed"].weight.eq(2.0).all()


def test_untied_averages_of_a_tied_model(update, kind):
    p = torch.tensor([3.0, -2.0])
    ema = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, 6.0])}
    update(source(kind, ema), source(kind, {"a": p, "b": p}), 0.5)
    assert ema["a"].tolist() == [2.0, 0.0]
    assert ema["b"].tolist() == [4.0, 2.0]


def test_averages_of_their_own_for_a_module_that_is_used_twice(update):
    layer = nn.Linear(3, 2)
    model, ema = nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(3, 2))
    update(ema, model, 0.0)
    for average in (ema[0], ema[2]):
        assert torch.equal(average.weight, layer.weight)
        assert torch.equal(average.bias, layer.bias)


@pytest.mark.hazard(1, "guarded")
@pytest.mark.parametrize("operation", ["update", "copy_", "swap_"])
def test_one_average_of_two_parameters_is_refused(backend, kind, operation):
    e = torch.ones(3)
    ema, model = source(kind, {"a": e, "b": e}), source(kind, {"a": torch.zeros(3), "b": torch.full((3,), 2.0)})
    decay = (0.5,) if operation == "update" else ()
    a, b = label(kind, "a", 0), label(kind, "b", 1)
    wanted = [f"model{a}", f"model{b}", f"ema{a}"]
    refused(ValueError, lambda: getattr(fused_ema, operation)(ema, model, *decay), ema, model, names=wanted)


def test_swap_of_a_tied_model_with_two_averages_is_refused(backend, kind):
    p = torch.zeros(3)
    ema, model = source(kind, {"a": torch.ones(3), "b": torch.ones(3)}), source(kind, {"a": p, "b": p})
    b = f"model{label(kind, 'b', 1)}"
    refused(ValueError, lambda: fused_ema.swap_(ema, model), ema, model, names=[b, "expected", "found"])


def test_swap_of_pairs_tied_on_both_sides_runs_once(backend, kind):
    e, p = torch.ones(3), torch.zeros(3)
    fused_ema.swap_(source(kind, {"a": e, "b": e}), source(kind, {"a": p, "b": p}))
    assert e.tolist() == [0.0] * 3
    assert p.tolist() == [1.0] * 3


# ---- Averages that overlap


@pytest.mark.hazard(2, "good")
def test_neighbours_in_one_storage(update, kind):
    flat = torch.arange(8.0)
    ema = {"a": flat[:3], "b": flat[3:7], "c": flat[7:]}
    update(source(kind, ema), source(kind, {name: torch.zeros_like(e) for name, e in ema.items()}), 0.5)
    assert flat.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


@pytest.mark.hazard(2, "guarded")
@pytest.mark.parametrize(
    "views",
    [
        lambda x: (x[:5], x[4:]),
        lambda x: (x[2:4], x),
        lambda x: (x[:4], x[:4].view(2, 2)),
        lambda x: (x[:4].view(2, 2), x[:4].view(2, 2).t()),
        lambda x: (x[:4], x[:4].view(torch.int32)),
        lambda x: (x[:8], x[:8].view(torch.complex64)),
        lambda x: (x[::2], x[6:]),
    ],
    ids=["partly", "inside", "reshaped", "transposed", "other dtype", "complex", "with gaps"],
)
def test_overlapping_averages_are_refused(update, views):
    first, second = views(torch.arange(9.0)[:8])
    tensors = {"a": first, "ok": torch.ones(2), "b": second}
    model = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    names = ["ema['a']", "ema['b']", "expected", "found"]
    refused(ValueError, lambda: update(tensors, model, 0.5), tensors, model, names=names)


# ---- Averages in the model's memory


@pytest.mark.hazard(3, "good")
def test_average_and_model_in_one_storage(update, kind):
    flat = torch.arange(8.0)
    update(source(kind, {"a": flat[:4]}), source(kind, {"a": flat[4:]}), 0.5)
    assert flat.tolist() == [2.0, 3.0, 4.0, 5.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("make", [net, lambda: dict(net().named_parameters()), lambda: [torch.ones(2)]])
def test_the_model_as_its_own_average_is_refused(update, make):
    model = make()
    refused(ValueError, lambda: update(model, model, 0.5), model, names=["ema[", "model[", "expected", "found"])


@pytest.mark.hazard(3, "guarded")
@pytest.mark.parametrize(
    "alias",
    [lambda p: p, lambda p: p.detach(), lambda p: p.view(torch.int32).view(torch.float32), lambda p: p.t()],
    ids=["itself", "detached", "viewed", "transposed"],
)
def test_views_of_the_model_are_refused(update, alias):
    p, q = torch.randn(3, 3), torch.randn(3)
    ema, model = {"q": q.clone(), "p": alias(p)}, {"q": q, "p": p}
    names = ["ema['p']", "model['p']", "expected", "found"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_overlap_with_another_tensor_of_the_model_is_refused(update, kind):
    flat = torch.arange(9.0)
    ema, model = {"a": torch.ones(4), "b": flat[3:7]}, {"a": flat[:4], "b": torch.ones(4)}
    names = [f"ema{label(kind, 'b', 1)}", f"model{label(kind, 'a', 0)}"]
    ema, model = source(kind, ema), source(kind, model)
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)


def test_shared_buffers_are_refused_unless_ignored(update):
    ema, model = net(), net()
    ema[1]._buffers["running_var"] = model[1].running_var
    names = ["ema['1.running_var']", "model['1.running_var']"]
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=names)
    update(ema, model, 0.0, buffers="ignore")
    assert torch.equal(ema[0].weight, model[0].weight)
