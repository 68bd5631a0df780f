"""Trains torchtitan's llama3_debugmodel with FSDP2 on the CPU, with averages. test_trainers.py runs it by torchrun.

torchtitan is written for GPUs and for a PyTorch that is not released yet, so four things are put in its way: a device
module for the CPU; attention by PyTorch's own function, since FlexAttention has no backward pass on the CPU; gradients
that are summed, since gloo knows no scaled sum; and no timeouts of process groups, which PyTorch 2.13 can't change.
"""

# ruff: noqa: E402
import collections
import os
import types

import torch
import torchtitan.tools.utils
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import fused_ema


class Cpu(types.ModuleType):
    def __getattr__(self, name):
        return getattr(torch.cpu, name)


cpu = Cpu("cpu")
cpu.get_device_name = lambda device=None: "cpu"
cpu.current_device = lambda: 0
cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=2**34)
cpu.empty_cache = cpu.reset_peak_memory_stats = lambda *_: None
cpu.memory_stats = lambda *_: collections.defaultdict(int)
torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", cpu

import torchtitan.distributed.utils
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel


def attention(q, k, v, *, scale, enable_gqa, **_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa), None


FlexAttention._compiled_flex_attn = staticmethod(attention)
torchtitan.distributed.utils.set_pg_timeouts = lambda *_, **__: None


def whole(tensor):
    return tensor.detach().full_tensor().double()


def named():
    """The manager's names are without those of activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in model.named_parameters()}


config = llama3_debugmodel()
config.training.steps, config.training.local_batch_size, config.training.seq_len = 4, 2, 128
config.validator.enable = False
config.parallelism.spmd_backend = "partial_dtensor"
trainer = config.build()
(model,) = trainer.model_parts
for module in model.modules():
    if isinstance(module, FSDPModule):
        module.set_force_sum_reduction_for_comms(True)

ema = fused_ema.EMA(model, fused_ema.schedules.growing_half_life(0.5))
ema.attach(trainer.optimizers)

expected = {name: whole(parameter) for name, parameter in named().items()}
largest = {name: tensor.abs() for name, tensor in expected.items()}


def follow(*_):
    """The averages by their formula, in float64 and from the whole weights."""
    weight = 1 - 2 ** (-1 / (0.5 * trainer.step))
    for name, parameter in named().items():
        expected[name].lerp_(whole(parameter), weight)
        largest[name] = torch.maximum(largest[name], whole(parameter).abs())


trainer.optimizers.register_step_post_hook(follow)
trainer.train()

assert (trainer.step, ema.step) == (4, 4)
assert ema.decay == 2**-0.5
averages = {name: whole(tensor) for name, tensor in ema.state_dict()["averages"][0].items()}
assert averages.keys() == expected.keys()
for name, tensor in expected.items():
    # per step half an ulp of the average and 2^-23 of the difference, at most 4 * 2^-23 of the largest value in all
    assert ((averages[name] - tensor).abs() <= 4 * 4 * 2.0**-23 * largest[name]).all(), name
trained = {name: whole(parameter) for name, parameter in named().items()}
own = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # with wq, wk and wv for each wqkv
with ema.swapped():
    for name, parameter in named().items():
        assert torch.equal(whole(parameter), averages[name]), name
    averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
assert all(torch.equal(whole(parameter), trained[name]) for name, parameter in named().items())
assert averaged.keys() == own.keys()
assert all(not torch.equal(whole(averaged[name]), whole(tensor)) for name, tensor in own.items())
print("passed", flush=True)
trainer.close()
os._exit(0)  # as in tests/pairs/sharded.py
