"""What the tests of the drop-in for diffusers' EMAModel share: a small UNet with random weights."""

import diffusers
import pytest
import torch

WARM = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.1, "update_after_step": 2}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
each_foreach = pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])


def unet(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return moved(diffusers.UNet2DModel(8, **BLOCKS).to(dtype))


@torch.no_grad()
def moved(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.1)
    return model


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def averaging(cls, model, **options):
    return cls(model.parameters(), 0.95, model_cls=type(model), model_config=model.config, **options)


def trained(cls, steps=5, **options):
    model = unet()
    ema = averaging(cls, model, **options)
    for _ in range(steps):
        ema.step(moved(model).parameters())
    return model, ema


def numbers(ema):
    """What a state holds beside tensors, and the decay of the last step."""
    return {**ema.state_dict(), "shadow_params": None}, ema.cur_decay_value
