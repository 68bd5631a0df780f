"""Biases of a mixture of experts that are moved outside of autograd (DeepSeek-V3's balancing without a loss): buffers,
which are copied from the model, or averaged, as chosen."""

import copy

import pytest
import torch
from conftest import averages, clones
from oracle import same_bits
from torch import nn
from torch.nn import functional as F

from fused_ema import EMA

EXPERTS, CHOSEN, SPEED = 8, 2, 0.001


class Router(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, width) * 0.2)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x):
        scores = (x @ self.weight.T).float().sigmoid()
        chosen = (scores + self.bias).topk(CHOSEN, -1).indices  # the bias chooses, and does not weigh
        self.load = chosen.flatten().bincount(minlength=EXPERTS)
        return chosen, scores.gather(-1, chosen)


class Mixture(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.router = Router(width)
        self.experts = nn.Parameter(torch.randn(EXPERTS, width, width) * 0.2)

    def forward(self, x):
        chosen, weights = self.router(x)
        each = torch.einsum("bi,bkij->bkj", x, self.experts[chosen])
        return (each * (weights / weights.sum(-1, keepdim=True)).unsqueeze(-1).to(x.dtype)).sum(1)


@torch.no_grad()
def balance(router):
    """After a step: experts that had less than their share are chosen more often from now on."""
    load = router.load.float()
    router.bias.add_(SPEED * (load.mean() - load).sign())


def train(ema, optimizer, steps=5):
    """The biases after each step."""
    model, seen = ema.model, []
    mixture = next(module for module in model.modules() if isinstance(module, Mixture))
    for _ in range(steps):
        model(torch.randn(64, 32, dtype=mixture.experts.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        balance(mixture.router)
        ema.update()
        seen.append(mixture.router.bias.clone())
    return seen


def by_name(name, buffer):
    return "average" if name.endswith("router.bias") else "copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffers", ["copy", "average", by_name, "ignore"], ids=lambda x: getattr(x, "__name__", x))
def test_the_bias_is_what_was_chosen(backend, buffers, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Mixture()).to(dtype)
    model[1].router.bias = model[1].router.bias.float()  # which stays in float32
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    ema = EMA(model, 0.5, buffers=buffers)
    seen = train(ema, optimizer)
    router, averaged = model[1].router, buffers in ("average", by_name)
    expected = torch.zeros(EXPERTS)
    for each in seen:
        expected.lerp_(each, 0.5)  # as the average does it: at 0.5, one rounding
    if not averaged:
        expected = seen[-1]
        assert "1.router.bias" in ema.describe()["not_averaged"]
    assert not same_bits(expected, seen[-1]) or not averaged
    assert same_bits(ema.averaged_state_dict()["1.router.bias"], expected)
    x = torch.randn(64, 32, dtype=dtype)
    with ema.swapped(), torch.no_grad():
        assert same_bits(router.bias, expected), "what an evaluation routes with"
        y, routed = model(x), router.load
    assert same_bits(router.bias, seen[-1])
    other = copy.deepcopy(model)
    ema.copy_to(other)
    assert same_bits(other[1].router.bias, expected)
    with torch.no_grad():
        assert same_bits(other(x), y)
    assert torch.equal(other[1].router.load, routed)


def test_it_resumes(backend):
    torch.manual_seed(0)
    model = Mixture()
    ema = EMA(model, 0.9, buffers="average")
    train(ema, torch.optim.SGD(model.parameters(), 0.1))
    again = EMA(copy.deepcopy(model), 0.9, buffers="average")
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each in (ema, again):
        torch.manual_seed(1)
        train(each, torch.optim.SGD(each.model.parameters(), 0.1))
    for name, tensor in averages(ema).items():
        assert same_bits(averages(again)[name], tensor), name
    assert not same_bits(averages(ema)["router.bias"], model.router.bias)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_deepseek_v3_of_transformers(tmp_path, buffers):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=EXPERTS,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=CHOSEN,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    gate = model.get_submodule(name.rpartition(".")[0])
    gate.register_forward_hook(lambda module, inputs, outputs: setattr(module, "chosen", outputs[-1]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ema = EMA(model, 0.5, buffers=buffers)
    ema.attach(optimizer)
    expected = torch.zeros(EXPERTS)
    for _ in range(4):
        tokens = torch.randint(64, (4, 16))
        model(tokens, labels=tokens).loss.backward()
        with torch.no_grad():  # before the step, so that the update sees it
            load = gate.chosen.flatten().bincount(minlength=EXPERTS).float()
            gate.e_score_correction_bias.add_(SPEED * (load.mean() - load).sign())
        optimizer.step()
        optimizer.zero_grad()
        expected.lerp_(gate.e_score_correction_bias, 0.5)
    own = clones(model.state_dict())
    expected = expected if buffers == "average" else own[name]
    assert expected.any()
    assert same_bits(ema.averaged_state_dict()[name], expected)
    model.eval()
    with ema.swapped(), torch.no_grad():
        model.save_pretrained(tmp_path)
        inside = model(tokens).logits
    assert all(same_bits(tensor, own[key]) for key, tensor in model.state_dict().items())
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    assert same_bits(loaded.get_buffer(name), expected)
    with torch.no_grad():
        assert torch.equal(F.log_softmax(loaded(tokens).logits, -1), F.log_softmax(inside, -1))
