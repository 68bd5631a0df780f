"""Reconstructed weights into models: wrapped ones, other types, and refusals that write nothing."""

import copy
import warnings

import pytest
import torch
from conftest import bits, refused, same_bits, same_values
from torch import nn

import fused_ema
from fused_ema.posthoc import load_into, reconstruct, save_snapshot
from fused_ema.schedules import power_function


class Block(nn.Module):
    """A child that the user calls "module", as transformers' LeViT does."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)


class Net(nn.Module):
    """Has buffers, a tied weight, and an extra state."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.block, self.norm = Block(), nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def partly_compiled(model):
    model.block = torch.compile(model.block)
    return model


WRAPPED = pytest.mark.parametrize(
    "wrap",
    [nn.Module.eval, torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)), partly_compiled],
    ids=["bare", "compiled", "DDP", "both", "partly compiled"],
)


def averaged(model, folder, **options):
    """Saves a snapshot of an average of its own; returns its values by the names of `model.state_dict()`."""
    ema = fused_ema.EMA(model, power_function(0.1), **options)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(2).add_(1)
    ema.update()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    ema.update()
    save_snapshot(folder, ema)
    return {key: value for key, value in ema.averaged_state_dict().items() if isinstance(value, torch.Tensor)}


def tensors(model):
    return {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@WRAPPED
@pytest.mark.parametrize("given", [False, True], ids=["plain names", "the model's names"])
def test_wrapped_models(wrap, given, tmp_path):
    source, target = wrap(net()), wrap(net(seed=1))
    wanted = averaged(source, tmp_path)
    weights = reconstruct(tmp_path, 0.1, model=source if given else None)
    buffers = {key: tensor.clone() for key, tensor in tensors(target).items() if "norm.running" in key}
    load_into(target, weights)
    for key, tensor in tensors(target).items():
        expected = buffers[key] if key in buffers and not given else wanted[key]
        assert torch.equal(tensor, expected), key


@pytest.mark.hazard(43, "good")
@WRAPPED
def test_the_keys_of_the_model_load_whole(wrap, tmp_path):
    """Whatever wrapped the model that was averaged."""
    wanted = averaged(torch.compile(net()), tmp_path)
    target = wrap(net(seed=1))
    weights = reconstruct(tmp_path, 0.1, model=target)
    assert list(weights) == list(target.state_dict())
    before = {key: tensor.clone() for key, tensor in tensors(target).items()}
    target.load_state_dict(weights, strict=True)
    for key, average in zip(before, wanted.values(), strict=True):
        assert torch.equal(tensors(target)[key], before[key] if "norm.running" in key else average), key
    for value in weights.values():
        if isinstance(value, torch.Tensor):
            value.fill_(7)
    assert not any(tensor.eq(7).any() for tensor in tensors(target).values()), "the result has memory of its own"


def test_levit(tmp_path):
    """51 of its 87 parameters are below children called "module"."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    config = transformers.LevitConfig(image_size=32, **sizes)
    model = transformers.LevitForImageClassification(config)
    assert sum(".module." in name for name, _ in model.named_parameters()) == 51
    wanted = averaged(model, tmp_path)
    fresh = transformers.LevitForImageClassification(config)
    fresh.load_state_dict(reconstruct(tmp_path, 0.1, model=fresh), strict=True)
    other = transformers.LevitForImageClassification(config)
    load_into(other, reconstruct(tmp_path, 0.1))
    for name, _ in model.named_parameters():
        assert torch.equal(fresh.state_dict()[name], wanted[name])
        assert torch.equal(other.state_dict()[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_cast_to_the_models_types_in_place(dtype, tmp_path):
    wanted, target = averaged(net(), tmp_path), net(seed=1, dtype=dtype)
    places = [tensor.data_ptr() for tensor in target.parameters()]
    load_into(target, reconstruct(tmp_path, 0.1))
    assert [tensor.data_ptr() for tensor in target.parameters()] == places
    assert target.head.weight is target.embed.weight
    for name, parameter in target.named_parameters():
        assert torch.equal(parameter, wanted[name].to(dtype))


def test_other_dicts_of_ours_are_taken(tmp_path):
    ema = fused_ema.EMA(torch.compile(net()), 0.5, buffers="average")
    fused_ema.checkpoints.save_safetensors(tmp_path / "x.safetensors", ema)
    for weights in (ema.averaged_state_dict(), fused_ema.checkpoints.load(tmp_path / "x.safetensors")):
        load_into(target := net(seed=1), weights)
        same_values(tensors(target), tensors(ema.model._orig_mod))


@pytest.mark.hazard(43, "guarded")
def test_names_that_differ_are_refused(tmp_path):
    averaged(net(), tmp_path)
    weights = reconstruct(tmp_path, 0.1)
    target = net(seed=1)
    fewer = {name: value for name, value in weights.items() if "norm" not in name}
    more = {**weights, "block.other": torch.zeros(2)}
    refused(ValueError, lambda: load_into(target, fewer), target, names=["'norm.weight', 'norm.bias'", "'common'"])
    refused(ValueError, lambda: load_into(target, more), target, names=["unexpected in weights: 'block.other'"])
    del weights["head.weight"]  # tied
    load_into(target, weights)


def test_common_names_are_written_and_the_rest_is_named(tmp_path):
    wanted = averaged(net(), tmp_path)
    weights = reconstruct(tmp_path, 0.1)
    del weights["norm.weight"]
    weights["block.other"] = torch.zeros(2)
    target = net(seed=1)
    kept = target.norm.weight.clone()
    with pytest.warns(UserWarning, match="missing from weights: 'norm.weight'; unexpected in weights: 'block.other'"):
        load_into(target, weights, names="common")
    assert torch.equal(target.norm.weight, kept)
    assert torch.equal(target.norm.bias, wanted["norm.bias"])
    weights["norm.bias"] = torch.zeros(2)
    refused(ValueError, lambda: load_into(target, {**weights, "norm.weight": kept}), target, names=["names='common'"])
    with pytest.warns(UserWarning, match=r"of two shapes: 'norm.bias', \(2,\) and \(3,\)"):
        load_into(target, weights, names="common")
    assert torch.equal(target.norm.bias, wanted["norm.bias"]), "as the advice of the error has it"
    refused(ValueError, lambda: load_into(target, {"x": kept}, names="common"), target, names=["'x'"])
    refused(ValueError, lambda: load_into(target, weights, names="some"), target, names=["'equal' or 'common'"])


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("norm.bias", torch.zeros(1, 3), ValueError, ["'norm.bias'", "(3,)", "(1, 3)"]),
        ("norm.bias", torch.zeros(3, dtype=torch.complex64), TypeError, ["'norm.bias'", "complex64"]),
        ("norm.bias", torch.zeros(3, dtype=torch.int64), TypeError, ["'norm.bias'", "float32", "int64"]),
        ("norm.bias", torch.zeros(3, device="meta"), ValueError, ["'norm.bias'", "meta"]),
        ("norm.bias", None, TypeError, ["'norm.bias'", "NoneType"]),
        ("head.weight", torch.zeros(7, 3), ValueError, ["'embed.weight'", "'head.weight'"]),
    ],
    ids=["shape", "complex", "integer", "meta", "None", "tied"],
)
def test_values_that_do_not_fit_are_refused(name, value, error, words, tmp_path):
    averaged(net(), tmp_path)
    target = net(seed=1)
    refused(error, lambda: load_into(target, {**reconstruct(tmp_path, 0.1), name: value}), target, names=words)


def test_arguments_that_are_no_models_or_weights(tmp_path):
    averaged(net(), tmp_path)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, found dict"):
        load_into({}, {})
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, found dict"):
        reconstruct(tmp_path, 0.1, model={})
    for weights, words in ((net(), "Net"), ({3: torch.zeros(2)}, "other keys")):
        with pytest.raises(TypeError, match=f"weights: expected tensors by name, found {words}"):
            load_into(net(), weights)


def test_weights_in_the_models_own_memory_are_refused(tmp_path):
    target = net()
    weights = {name: tensor.detach() for name, tensor in target.named_parameters()}
    load_into(target, weights)  # what is there already
    weights["norm.weight"], weights["norm.bias"] = weights["norm.bias"], weights["norm.weight"]
    refused(ValueError, lambda: load_into(target, weights), target, names=["'norm.weight'", "memory"])
    weights["norm.weight"] = weights["norm.weight"].clone()
    weights["norm.bias"] = weights["norm.bias"].clone()
    load_into(target, weights)


def test_a_swapped_model_is_refused(tmp_path):
    model = net()
    averaged(model, tmp_path)
    ema = fused_ema.EMA(model)
    with ema.swapped():
        refused(RuntimeError, lambda: load_into(model, reconstruct(tmp_path, 0.1)), model, names=["swapped()"])


def test_a_model_with_parameters_that_were_not_averaged(tmp_path):
    """reconstruct() names what it takes from the model, and refuses a model that lacks something."""
    model = net()
    wanted = averaged(model, tmp_path, select=lambda name, tensor: "norm" not in name)
    with pytest.warns(UserWarning, match="no averages of 'norm.weight', 'norm.bias'; the model's own values"):
        weights = reconstruct(tmp_path, 0.1, model=model)
    model.load_state_dict(weights, strict=True)
    same_values(tensors(model), wanted)
    with pytest.raises(ValueError, match=r"names of the snapshots in its state_dict, found no 'embed.weight', 'block"):
        reconstruct(tmp_path, 0.1, model=nn.Linear(2, 2))
    model.block.module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"'block.weight'\]: expected shape \(3, 3\), .* found \(3, 2\)"):
        reconstruct(tmp_path, 0.1, model=model)


def test_nothing_is_warned_of_where_all_is_averaged(tmp_path):
    model = net()
    averaged(model, tmp_path)
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(copy.deepcopy(model), reconstruct(tmp_path, 0.1, model=model))
    assert same_bits(before, model)


def test_a_child_called_module_beside_a_parameter_of_the_same_name(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = Block()
        model.weight = nn.Parameter(torch.randn(2))
        return model

    wanted = averaged(make(0), tmp_path)
    for wrap in (nn.Module.eval, nn.DataParallel, torch.compile):
        load_into(target := wrap(make(1)), reconstruct(tmp_path, 0.1))
        assert all(map(torch.equal, target.parameters(), map(wanted.get, dict(make(2).named_parameters()))))
        target.load_state_dict(reconstruct(tmp_path, 0.1, model=target))
