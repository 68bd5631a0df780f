"""Trains lerobot's ACT with averages. test_trainers.py runs it in a process of its own.

It is made by lerobot's own functions; the batches are random, since its data sets are downloaded. torchvision's wheels
for the CPU are in no registry, and those for CUDA can't load their operations here: lerobot does not call them.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

import torch

register_fake = torch.library.register_fake
torch.library.register_fake = lambda name, *rest, **options: (
    (lambda function: function) if name.startswith("torchvision::") else register_fake(name, *rest, **options)
)
import torchvision  # noqa: F401

torch.library.register_fake = register_fake

from accelerate import Accelerator
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

import fused_ema

torch.manual_seed(0)
config = ACTConfig(
    input_features={
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(6,)),
        "observation.images.top": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
    },
    output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(6,))},
    pretrained_backbone_weights=None,
    chunk_size=8,
    n_action_steps=8,
    optimizer_lr=1e-3,
    device="cpu",
    push_to_hub=False,
)
accelerator = Accelerator(cpu=True)
policy = ACTPolicy(config)
pipeline = TrainPipelineConfig(dataset=DatasetConfig(repo_id="none"), policy=config)
pipeline.optimizer, pipeline.scheduler = config.get_optimizer_preset(), config.get_scheduler_preset()
optimizer, scheduler = make_optimizer_and_scheduler(pipeline, policy)
policy, optimizer = accelerator.prepare(policy, optimizer)

ema = fused_ema.EMA(policy, 0.9)
ema.attach(optimizer)

meters = {name: AverageMeter(name, ":.3f") for name in ("loss", "grad_norm", "lr", "update_s")}
metrics = MetricsTracker(2, 2, 1, meters, accelerator=accelerator)
expected = {name: tensor.detach().double() for name, tensor in policy.named_parameters()}
for _ in range(3):
    batch = {
        "observation.state": torch.randn(2, 6),
        "observation.images.top": torch.rand(2, 3, 64, 64),
        "action": torch.randn(2, 8, 6),
        "action_is_pad": torch.zeros(2, 8, dtype=torch.bool),
    }
    update_policy(metrics, policy, batch, optimizer, 10.0, accelerator, scheduler)
    for name, tensor in policy.named_parameters():
        expected[name].lerp_(tensor.detach().double(), 1 - 0.9)

assert ema.step == 3
(averages,) = ema.state_dict()["averages"]
for name, tensor in expected.items():
    size = torch.maximum(tensor.abs(), policy.get_parameter(name).detach().abs().double()) + 1e-3  # a step moves 1e-3
    assert ((averages[name] - tensor).abs() <= 3 * 4 * 2.0**-23 * size).all(), name
own = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
with ema.swapped():
    accelerator.unwrap_model(policy).save_pretrained(sys.argv[1])
assert all(torch.equal(tensor, own[name]) for name, tensor in policy.state_dict().items())
assert Path(sys.argv[1], "model.safetensors").is_file()
loaded = ACTPolicy.from_pretrained(sys.argv[1])
for name, tensor in loaded.named_parameters():
    assert torch.equal(tensor, averages[name]), name
assert any(not torch.equal(tensor, own[name]) for name, tensor in loaded.named_parameters())
print("passed", flush=True)
