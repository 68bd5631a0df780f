"""What the tests of the drop-in for diffusers' EMAModel share: a small UNet with random weights."""

import diffusers
import torch

BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}


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
