"""EMA of a dict of tensors, such as an optimizer's float32 master weights."""

import copy
import pickle
from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from conftest import averages, clones, equal, net, parameters, refused, same_values
from torch import nn

import fused_ema
from fused_ema import EMA, checkpoints


def masters(dtype=torch.float32):
    """A 16-bit model without buffers, and the weights that its optimizer trains."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()
    return model, {name: parameter.detach().to(dtype).clone() for name, parameter in model.named_parameters()}


def nudge(tensors):
    with torch.no_grad():
        for tensor in tensors.values():
            tensor += torch.randn(tensor.shape).to(tensor.dtype)


@pytest.mark.parametrize("options", [{}, {"decay": [0.5, 0.9]}, {"dtype": torch.bfloat16}])
def test_it_averages_as_a_module_does(backend, options):
    model = net()
    named = dict(model.named_parameters())
    of_dict, of_module = (EMA(each, **{"decay": 0.9, **options}) for each in (named, model))
    for _ in range(3):
        nudge(named)
        of_dict.update(), of_module.update()
    for k in range(len(of_dict.schedules)):
        same_values(averages(of_dict, k), averages(of_module, k))
    state = of_dict.averaged_state_dict()
    assert list(state) == list(named)
    same_values(state, averages(of_dict))
    before = clones(named)
    with of_dict.swapped():
        assert equal({n: t.to(state[n].dtype) for n, t in named.items()}, state)
    same_values(named, before)
    assert of_dict.distance() == of_module.distance()
    assert of_dict.describe()["tensors"] == len(named)


def test_masters_of_a_16_bit_model(backend, tmp_path):
    model, weights = masters()
    ema = EMA(weights, 0.5)
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.1)
    ema.attach(optimizer, save=True)
    for tensor in weights.values():
        tensor.grad = torch.ones_like(tensor)
    start = clones(weights)
    optimizer.step()
    assert ema.step == 1
    for name, tensor in start.items():
        torch.testing.assert_close(averages(ema)[name], tensor - 0.05)
    ema.copy_to(model)
    same_values(parameters(model), {name: tensor.bfloat16() for name, tensor in averages(ema).items()})
    checkpoints.save_safetensors(tmp_path / "averaged.safetensors", ema)
    same_values(checkpoints.load(tmp_path / "averaged.safetensors"), averages(ema))


def test_states_fit_modules_and_dicts(backend):
    model, weights = masters()
    ema = EMA(weights, 0.5)
    nudge(weights)
    ema.update()
    for other in (EMA(model, 0.5), EMA(masters()[1], 0.5)):
        other.load_state_dict(ema.state_dict())
        assert other.step == 1
        same_values(averages(other), averages(ema))


def test_copy_to_a_dict(backend):
    _, weights = masters()
    ema, (_, other) = EMA(weights, 0.5), masters()
    nudge(weights)
    ema.update()
    ema.copy_to(other)
    same_values(other, averages(ema))
    refused(ValueError, lambda: ema.copy_to({"0.weight": torch.zeros(4, 3)}), other, names=["missing", "'0.bias'"])
    with ema.swapped():
        refused(RuntimeError, lambda: ema.copy_to(weights), weights, names=["EMA.copy_to", "swapped()"])
    ema.copy_to(weights)  # the averaged ones
    same_values(weights, averages(ema))


def test_what_is_put_into_the_dict_later_is_averaged(backend):
    weights = {"a": torch.zeros(3), "tied": torch.zeros(2), "count": torch.tensor(3)}
    weights["tied to"] = weights["tied"]
    ema = EMA(weights, 0.5)
    weights["a"] = torch.ones(3)
    weights["tied"] += 1
    ema.update()
    assert {name: tensor.tolist() for name, tensor in averages(ema).items()} == {
        "a": [0.5] * 3,
        "tied": [0.5] * 2,
        "tied to": [0.5] * 2,
    }
    assert ema.describe()["not_averaged"] == ["count"]
    weights["b"] = torch.zeros(2)
    with pytest.raises(ValueError, match="unexpected in the model: 'b'"):
        ema.update()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copies_and_pickles(duplicate):
    ema = EMA(masters()[1], 0.5)
    other = duplicate(ema)
    nudge(other.model._parameters)
    other.update()
    assert (other.step, ema.step) == (1, 0)
    assert not equal(averages(other), averages(ema))


def test_an_ordered_dict(backend):
    weights = OrderedDict(a=torch.zeros(3))
    ema = EMA(weights, 0.5)
    weights["a"] += 1
    ema.update()
    assert averages(ema)["a"].tolist() == [0.5] * 3


def test_what_is_refused():
    weights = {"a": torch.zeros(3)}
    for model, text in (
        ([torch.zeros(3)], r"expected a torch\.nn\.Module or a dict of names to tensors, found list$"),
        (iter(weights.items()), "found dict_itemiterator$"),
        (MappingProxyType(weights), r"found mappingproxy; wrap it in dict\(\)"),
        ({**weights, "lr": 0.1}, r"\['lr'\]: expected a name \(str\) and a tensor, found str and float"),
        ({0: torch.zeros(3)}, r"\[0\]: expected .*, found int and Tensor"),
        ({"a": None}, r"\['a'\]: expected .*, found str and NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^model.*{text}"):
            EMA(model)
        with pytest.raises(TypeError, match=f"^model.*{text}"):
            EMA(weights).copy_to(model)
    with pytest.raises(ValueError, match=r"^model: expected parameters to average"):
        EMA({})
    EMA(dict(MappingProxyType(weights))).update()  # as the error says


class Masters:
    """An optimizer with float32 copies of a 16-bit model, as mixed-precision trainers have."""

    def __init__(self, model):
        self.model = model
        self.named = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(list(self.named.values()), lr=1e-3)

    def step(self):
        for name, tensor in self.model.named_parameters():
            self.named[name].grad, tensor.grad = tensor.grad.float(), None
        self.optimizer.step()
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                tensor.copy_(self.named[name])


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(64, 8)).bfloat16()


def train(trainer):
    trainer.model(torch.randn(2, 8, 64, dtype=torch.bfloat16)).square().mean().backward()
    trainer.step()


def close(found, expected, steps):
    """Within one step's bound per step: half an ulp of the average, and 2^-23 of what it moves by."""
    for name, tensor in expected.items():
        size = tensor.abs().clamp(min=1e-2)  # no weight here moves by more than 1e-3 a step
        assert ((found[name].double() - tensor).abs() <= steps * 2.0**-23 * size).all(), name


@pytest.mark.parametrize("kind", ["manager", "attached", "dict", "list", "bound dict", "bound list"])
def test_masters_in_training(backend, kind):
    """The masters' small steps, which bfloat16 would round away, are in the averages, through dicts and lists."""
    trainer = Masters(encoder())
    masters, decay, steps = trainer.named, 0.99, 10
    own = clones(masters)
    if kind in ("manager", "attached"):
        ema = EMA(masters, decay)
        own = averages(ema)
        if kind == "attached":
            ema.attach(trainer.optimizer)
        update = ema.update if kind == "manager" else lambda: None
    else:
        pair = (own, masters) if "dict" in kind else (list(own.values()), list(masters.values()))
        handle = fused_ema.bind(*pair)
        update = (lambda: handle.update(decay)) if "bound" in kind else (lambda: fused_ema.update(*pair, decay))
    expected = {name: tensor.double() for name, tensor in masters.items()}
    rounded = {name: tensor.double() for name, tensor in masters.items()}
    for _ in range(steps):
        train(trainer)
        update()
        for name, tensor in masters.items():
            expected[name].lerp_(tensor.detach().double(), 1 - decay)
            rounded[name].lerp_(trainer.model.get_parameter(name).detach().double(), 1 - decay)
    close(own, expected, steps)
    with pytest.raises(AssertionError):
        close(own, rounded, steps)  # what averages of the 16-bit parameters would be


def test_masters_are_evaluated_through_a_copy(backend):
    """swapped() on the masters leaves the 16-bit model as it is; copy_to fills another, by name."""
    trainer = Masters(encoder())
    ema = EMA(trainer.named, 0.5)
    for _ in range(3):
        train(trainer)
        ema.update()
    before = clones(parameters(trainer.model))
    with ema.swapped():
        same_values(parameters(trainer.model), before)
    averaged = copy.deepcopy(trainer.model)
    ema.copy_to(averaged)
    same_values(parameters(averaged), {name: tensor.bfloat16() for name, tensor in averages(ema).items()})
    same_values(parameters(trainer.model), before)
