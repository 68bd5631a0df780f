"""Averages of PEFT's adapters, saved and loaded as adapters, without a trainer."""

import copy

import pytest
import torch
from conftest import averages, clones
from oracle import same_bits
from torch import nn

from fused_ema import EMA, checkpoints

peft = pytest.importorskip("peft")
X = torch.randn(8, 16)

CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=["0", "2"], r=4),
    "DoRA": lambda: peft.LoraConfig(target_modules=["0", "2"], r=4, use_dora=True),
    "a whole head": lambda: peft.LoraConfig(target_modules=["0"], r=4, modules_to_save=["2"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["0", "2"], r=4),
}


def base(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(dtype)


def adapted(kind, dtype):
    """A trained model with adapters, and its manager."""
    model = peft.get_peft_model(base(dtype), CONFIGS[kind]())
    ema = EMA(model, 0.5, select=lambda name, parameter: parameter.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    ema.attach(optimizer)
    for _ in range(4):
        (model(X.to(dtype)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_average_is_an_adapter(backend, kind, dtype, tmp_path):
    model, ema = adapted(kind, dtype)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert averages(ema).keys() == trained
    own = clones(model.state_dict())
    with ema.swapped(), torch.no_grad():
        model.save_pretrained(tmp_path)
        inside = model(X.to(dtype))
    assert all(same_bits(tensor, own[name]) for name, tensor in model.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(base(dtype), tmp_path).eval()
    parameters = dict(loaded.named_parameters())
    for name, average in averages(ema).items():
        # PEFT may make its adapters in float32, whatever the model's type
        assert same_bits(parameters[name].detach(), average.to(model.get_parameter(name).dtype)), name
    with torch.no_grad():
        assert same_bits(loaded(X.to(dtype)), inside)
        assert not same_bits(model(X.to(dtype)), inside)


@pytest.mark.parametrize("kind", CONFIGS)
def test_in_the_precision_of_the_averages(backend, kind, tmp_path):
    model, ema = adapted(kind, torch.bfloat16)
    model.save_pretrained(tmp_path, state_dict=ema.averaged_state_dict())
    saved = checkpoints.load(tmp_path / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(model, state_dict=ema.averaged_state_dict())
    assert saved.keys() == expected.keys()
    assert len(saved) >= len(averages(ema))
    for name, tensor in expected.items():
        assert saved[name].dtype == torch.float32
        assert same_bits(saved[name], tensor), name
    peft.PeftModel.from_pretrained(base(torch.bfloat16), tmp_path)


def test_one_of_two_adapters(backend, tmp_path):
    model = peft.get_peft_model(base(torch.float32), CONFIGS["LoRA"]())
    model.add_adapter("second", CONFIGS["LoRA"]())
    model.set_adapter("second")
    ema = EMA(model, 0.5, select=lambda name, parameter: parameter.requires_grad)
    assert all("second" in name for name in averages(ema))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1) if parameter.requires_grad else None
    ema.update()
    with ema.swapped():
        model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = peft.PeftModel.from_pretrained(base(torch.float32), tmp_path / "second", adapter_name="second")
    for name, average in averages(ema).items():
        assert same_bits(loaded.get_parameter(name).detach(), average), name


def test_merged_into_the_base(backend):
    """merge_and_unload() of a model that holds the average: a copy, since it takes the adapters out."""
    model, ema = adapted("LoRA", torch.float32)
    with ema.swapped(), torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
        inside = model(X)
    assert (merged(X) - inside).abs().max() <= 1e-5 * inside.abs().max()
