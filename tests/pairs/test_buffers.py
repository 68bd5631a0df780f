"""Buffers: which are averaged, copied and ignored, by a word or by a function; those that are not persistent."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import net, refused
from torch import nn

import fused_ema
from fused_ema import EMA, functional

# ---- Spectral norm

SPECTRAL = {
    "hook": nn.utils.spectral_norm,
    "parametrization": nn.utils.parametrizations.spectral_norm,
}


def layers(spectral):
    torch.manual_seed(0)
    return nn.Sequential(spectral(nn.Linear(16, 16)), nn.Tanh(), spectral(nn.Linear(16, 16)))


def train(model):
    """Yields after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (model(torch.randn(64, 16)) - torch.randn(64, 16)).square().sum().backward()
        optimizer.step()
        yield


def norms(model):
    """The spectral norm of each layer, which is 1 but for what the power iteration has yet to find."""
    with torch.no_grad():
        model.eval()(torch.randn(2, 16))  # the hooks compute the weight
        return [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (model[0], model[2])]


@pytest.mark.hazard(46, "good")
@pytest.mark.parametrize("buffers", ["average", "ignore", lambda name, tensor: "average"])
@pytest.mark.parametrize("spectral", ["hook", "parametrization"])
def test_averaged_layers_keep_their_spectral_norm(spectral, buffers):
    model = layers(SPECTRAL[spectral])
    teacher, ema = copy.deepcopy(model), EMA(model, 0.9, buffers=buffers)
    for _ in train(model):
        fused_ema.update(teacher, model, 0.9, buffers=buffers)
        ema.update()
    assert norms(teacher) == pytest.approx([1, 1], abs=0.05)
    with ema.swapped():
        assert norms(model) == pytest.approx([1, 1], abs=0.05)
    for name, vector in teacher.named_buffers():
        assert torch.equal(vector, model.get_buffer(name))


def test_vectors_are_found_by_what_holds_them():
    """Not by their names: `running_u` and `weight_u` are buffers like others where no spectral norm made them."""
    ema = nn.utils.spectral_norm(nn.Linear(3, 3), name="weight")
    for name in ("_u", "weight_u_", "bias_u"):
        ema.register_buffer(name, torch.ones(3))
    model = copy.deepcopy(ema)
    for buffer in model.buffers():
        buffer.zero_()
    fused_ema.update(nn.Sequential(ema), nn.DataParallel(nn.Sequential(model)), 0.75, buffers="average")
    averaged = {name: buffer.unique().tolist() for name, buffer in ema.named_buffers()}
    assert averaged == {"weight_u": [0], "weight_v": [0], "_u": [0.75], "weight_u_": [0.75], "bias_u": [0.75]}


# ---- A function


class Mixture(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("expert_bias", torch.full((2,), value))
        self.register_buffer("queue", torch.full((2,), value))
        self.register_buffer("own", torch.full((2,), value))
        self.register_buffer("count", torch.tensor(int(value)))
        self.register_buffer("cache", torch.full((2,), value), persistent=False)

    def values(self):
        return {name: buffer.flatten()[0].item() for name, buffer in self.named_buffers()}


def use(name, tensor):
    assert isinstance(tensor, torch.Tensor)
    return {"queue": "copy", "own": "ignore"}.get(name.rpartition(".")[2], "average")


@pytest.mark.hazard(46, "good")
@pytest.mark.parametrize("wrapped", [False, True])
def test_buffers_by_a_function(update, wrapped):
    ema, model = Mixture(4.0), Mixture(0.0)
    ours, theirs = (nn.DataParallel(ema), torch.compile(model)) if wrapped else (ema, model)
    asked = []

    def ask(name, tensor):
        asked.append(name)
        assert not tensor.any(), "the model's buffer was expected"
        return use(name, tensor)

    update(ours, theirs, 0.5, buffers=ask)
    assert ema.values() == {"expert_bias": 2.0, "queue": 0.0, "own": 4.0, "count": 0, "cache": 0.0}
    assert sorted(asked) == sorted(ema.values()), "each name is asked once"


@pytest.mark.parametrize("operation", [fused_ema.copy_, fused_ema.swap_])
def test_copies_and_swaps_by_a_function(backend, operation):
    ema, model = Mixture(4.0), Mixture(0.0)
    operation(ema, model, buffers=use)
    assert ema.values() == {"expert_bias": 0.0, "queue": 0.0, "own": 4.0, "count": 0, "cache": 0.0}
    swapped = operation is fused_ema.swap_
    assert model.values() == {name: 4.0 if swapped and name != "own" else 0.0 for name in model.values()}


def test_an_ignored_buffer_may_be_missing(update):
    ema, model = Mixture(4.0), Mixture(0.0)
    del ema.own
    model.extra = nn.BatchNorm1d(3, affine=False)
    update(ema, model, 0.5, buffers=lambda name, _: "ignore" if name == "own" or "extra" in name else "copy")
    refused(ValueError, lambda: update(ema, model, 0.5, buffers=use), ema, model, names=["'extra.running_mean'"])


def test_names_are_asked_for_without_wrappers_though_a_child_is_called_module(update):
    def make(value):
        model = nn.Module()
        model.module = Mixture(value)
        model.register_buffer("queue", torch.full((2,), value))
        return model

    ema, model, asked = make(4.0), nn.DataParallel(make(0.0)), []
    update(ema, model, 0.5, buffers=lambda name, _: asked.append(name) or use(name if "." in name else "own", _))
    assert "queue" in asked
    assert "module.queue" in asked
    assert (ema.queue[0].item(), ema.module.queue[0].item()) == (4.0, 0.0)


@pytest.mark.parametrize("answer", [None, "mean", True, ["copy"]])
def test_other_answers_are_refused(update, answer):
    ema, model = Mixture(4.0), Mixture(0.0)
    names = ["buffers: expected the function to return 'copy', 'average' or 'ignore'", "'expert_bias'"]
    refused(ValueError, lambda: update(ema, model, 0.5, buffers=lambda *_: answer), ema, model, names=names)
    refused(ValueError, lambda: EMA(model, buffers=lambda *_: answer), model, names=names)


@pytest.mark.parametrize("buffers", [None, "both", ["copy"], 1])
def test_neither_a_word_nor_a_function_is_refused(update, buffers):
    ema, model = Mixture(4.0), Mixture(0.0)
    call = lambda: update(ema, model, 0.5, buffers=buffers)  # noqa: E731
    refused(ValueError, call, ema, model, names=["buffers: expected 'copy'", "a function"])


def test_the_manager_asks_a_function(backend):
    model = Mixture(4.0)
    ema = EMA(torch.compile(model), 0.5, buffers=use)
    assert sorted(ema.state_dict()["averages"][0]) == ["expert_bias", "linear.bias", "linear.weight"]
    for buffer in model.buffers():
        buffer.zero_()
    ema.update()
    with ema.swapped():
        assert model.values() == {"expert_bias": 2.0, "queue": 0.0, "own": 0.0, "count": 0, "cache": 0.0}
    copied = copy.deepcopy(ema)
    copied.update()
    assert copied.state_dict()["averages"][0]["expert_bias"].tolist() == [1.0, 1.0]


def test_a_compiled_update_asks_a_function():
    ema, model = Mixture(4.0), Mixture(0.0)
    model.cache = torch.ones(7)
    torch._dynamo.reset()
    torch.compile(lambda: fused_ema.update(ema, model, 0.5, buffers=use), backend="eager", fullgraph=True)()
    assert ema.values() == {"expert_bias": 2.0, "queue": 0.0, "own": 4.0, "count": 0, "cache": 4.0}


class Rule:
    """A function as an object, a method, or one that is made for each call."""

    asked = 0

    def __call__(self, name, tensor):
        self.asked += 1
        return "average"

    def method(self, name, tensor):
        return self(name, tensor)


def test_a_function_that_is_made_anew_is_asked_once(backend):
    ema, model, asked = net(), net(), []
    globals()["ASKED"] = asked
    for _ in range(3):
        fused_ema.update(ema, model, 0.5, buffers=lambda name, _: ASKED.append(name) or "copy")  # noqa: F821
    assert len(asked) == len([*model.buffers()])
    rule = Rule()
    for _ in range(3):
        fused_ema.update(ema, model, 0.5, buffers=rule.method)
    assert rule.asked == len([*model.buffers()])
    before = ema[1].running_mean.clone()
    fused_ema.update(ema, model, 1.0, buffers=lambda *_: "average")
    assert torch.equal(ema[1].running_mean, before), "another function has another plan"


def test_functions_are_not_kept_alive(backend):
    ema, model = net(), net()
    rule = Rule()
    model.rule = rule
    for buffers in (rule, rule.method, lambda *_, rule=rule: rule(*_)):
        fused_ema.update(ema, model, 0.5, buffers=buffers)
    del buffers
    kept = len(functional._module_plans)
    functions = [lambda *_, rule=rule: rule(*_) for _ in range(50)]
    for buffers in functions:
        fused_ema.update(ema, model, 0.5, buffers=buffers)
    assert len(functional._module_plans) == kept + 50
    del functions, buffers
    gc.collect()
    assert len(functional._module_plans) == kept
    dead = weakref.ref(model), weakref.ref(rule)
    del model, rule
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    assert not functional._module_plans


# ---- Not persistent


class Rope(nn.Linear):
    def __init__(self, length, **tensors):
        super().__init__(2, 2)
        caches = {"cos": torch.full((length,), float(length)), "ids": torch.arange(length), **tensors}
        for name, tensor in caches.items():
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)


SHARED = torch.ones(3)
CACHES = {
    "equal": {},
    "grown": {"cos": torch.ones(7), "ids": torch.arange(7)},
    "missing": {"cos": None, "ids": None},
    "extra": {"more": torch.ones(2)},
    "of other types": {"cos": torch.arange(3), "ids": torch.ones(3)},
    "lazy": {"cos": nn.UninitializedBuffer()},
    "meta": {"cos": torch.ones(3, device="meta")},
    "sparse": {"cos": torch.eye(3).to_sparse()},
    "expanded": {"cos": torch.ones(1).expand(3)},
    "shared": {"cos": SHARED},
}


@pytest.mark.hazard(46, "good")
@pytest.mark.parametrize("sides", ["ema", "model"])
@pytest.mark.parametrize("caches", CACHES)
def test_caches_never_stop_an_update(update, caches, sides):
    plain = Rope(3, cos=SHARED if caches == "shared" else torch.full((3,), 5.0))
    other = Rope(3, **CACHES[caches])
    ema, model = (other, plain) if sides == "ema" else (plain, other)
    before = {name: buffer for name, buffer in ema.named_buffers() if not nn.parameter.is_lazy(buffer)}
    before = {name: buffer.clone() for name, buffer in before.items() if not buffer.is_meta and not buffer.is_sparse}
    update(ema, model, 0.0, buffers="average")
    assert torch.equal(ema.weight, model.weight)
    if caches == "equal":
        assert torch.equal(ema.cos, model.cos)
        assert torch.equal(ema.ids, model.ids)
    elif caches == "grown":
        assert all(torch.equal(ema.get_buffer(name), buffer) for name, buffer in before.items())


@pytest.mark.hazard(46, "guarded")
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_equal_caches_are_copied_never_averaged(update, decay):
    ema, model = Rope(3, mask=torch.full((3,), -torch.inf)), Rope(3, cos=torch.full((3,), 9.0), ids=torch.arange(3) + 4)
    model.register_buffer("mask", torch.full((3,), -torch.inf), persistent=False)
    update(ema, model, decay, buffers="average")
    assert ema.mask.tolist() == [-torch.inf] * 3
    if decay < 1:
        assert ema.cos.tolist() == [9.0] * 3
        assert ema.ids.tolist() == [4, 5, 6]


@pytest.mark.hazard(46, "guarded")
def test_persistent_ones_are_still_refused(update):
    ema, model = net(), net()
    model[1].running_mean = torch.ones(5)
    refused(ValueError, lambda: update(ema, model, 0.5), ema, model, names=["ema['1.running_mean']", "names='common'"])


def test_a_cache_that_grows_between_updates(update):
    ema, model = Rope(3), Rope(3)
    for length, value in ((3, 3.0), (5, 5.0), (5, 6.0), (3, 7.0)):
        model.cos = torch.full((length,), value)
        update(ema, model, 0.5)
    assert ema.cos.tolist() == [7.0] * 3
    fused_ema.copy_(ema, model), fused_ema.swap_(ema, model)
    model.cos = torch.ones(9)
    fused_ema.copy_(ema, model), fused_ema.swap_(ema, model)
    assert (ema.cos.numel(), model.cos.numel()) == (3, 9)


@pytest.mark.parametrize("caches", ["equal", "grown", "missing", "extra", "of other types", "meta"])
@pytest.mark.parametrize("sides", ["mine", "theirs"])
def test_copy_to_with_caches(backend, caches, sides):
    plain, other = Rope(3, cos=torch.full((3,), 5.0)), Rope(3, **CACHES[caches])
    model, fresh = (other, plain) if sides == "mine" else (plain, other)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema.copy_to(fresh)
    assert torch.equal(fresh.weight, ema.state_dict()["averages"][0]["weight"])
    if caches == "equal":
        assert torch.equal(fresh.cos, model.cos)
        assert torch.equal(fresh.ids, model.ids)


def test_copy_to_still_refuses_persistent_ones(backend):
    model, fresh = net(), net()
    fresh[1].running_mean = torch.ones(5)
    refused(ValueError, lambda: EMA(model).copy_to(fresh), fresh, names=["'1.running_mean'", "names='common'"])
