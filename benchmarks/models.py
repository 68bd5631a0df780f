"""Builds the models to average from their packages' configuration classes, with random values and no downloads."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn


class Case(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    model_dtype: torch.dtype = torch.float32
    average_dtype: torch.dtype = torch.float32
    in_a_row: bool = False  # called repeatedly, as in a timing loop, so that the caches stay warm
    huge: bool = False  # needs the memory of a large GPU, so it runs on CUDA or on request only
    asked: bool = False  # runs on request only

    @property
    def title(self) -> str:
        average, model = (str(dtype).removeprefix("torch.") for dtype in (self.average_dtype, self.model_dtype))
        return f"{self.name}, {average}←{model}{', called in a row' if self.in_a_row else ''}"


def _transformers(model: str, config: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**arguments))

    return build


def _unet() -> nn.Module:
    """The defaults of this class have the size of Stable Diffusion 1's UNet."""
    return importlib.import_module("diffusers").UNet2DConditionModel(cross_attention_dim=768)


def _small_unet() -> nn.Module:
    return importlib.import_module("diffusers").UNet2DModel(
        sample_size=64,
        block_out_channels=(128, 128, 256, 256),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name)


def _llama(layers: int, width: int, inner: int, heads: int, groups: int) -> Callable[[], nn.Module]:
    return _transformers(
        "LlamaForCausalLM",
        "LlamaConfig",
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )


def _resnet50() -> nn.Module:
    """The 161 parameters and 159 BatchNorm buffers of ResNet-50, for machines without torchvision."""

    def convolution(channels: int, features: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, features, size, bias=False), nn.BatchNorm2d(features)]

    layers, channels = convolution(3, 64, 7), 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            layers += convolution(channels, width, 1) + convolution(width, width, 3)
            layers += convolution(width, 4 * width, 1)
            if block == 0:
                layers += convolution(channels, 4 * width, 1)  # the shortcut
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


def equal_tensors(count: int, elements: int) -> Callable[[], nn.Module]:
    """One flat list, which PyTorch traverses fastest."""
    return lambda: nn.ParameterList(torch.empty(elements) for _ in range(count))


_gpt2 = _transformers("GPT2Model", "GPT2Config")
_gpt2_xl = _transformers("GPT2Model", "GPT2Config", n_embd=1600, n_layer=48, n_head=25)
_vit_l = _transformers(
    "ViTModel", "ViTConfig", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
_llama_1b, _llama_7b = _llama(22, 2048, 5632, 32, 4), _llama(32, 4096, 11008, 32, 32)
_many = equal_tensors(2000, 256)

GPT2 = Case("GPT-2 small", _gpt2)
GPT2_BF16 = Case("GPT-2 small", _gpt2, torch.bfloat16)
RESNET = Case("ResNet-50", _resnet50)
MANY = Case("2000 tensors of 256", _many)
MANY_IN_A_ROW = Case("2000 tensors of 256", _many, in_a_row=True)
CASES = (
    GPT2,
    GPT2_BF16,
    Case("GPT-2 small", _gpt2, torch.bfloat16, torch.bfloat16),
    Case("BERT base", _transformers("BertModel", "BertConfig")),
    Case("ViT-B/16", _transformers("ViTModel", "ViTConfig")),
    Case("ConvNeXt-T (timm)", _timm("convnext_tiny")),
    RESNET,
    Case("UNet2D, 64 pixels", _small_unet),
    Case("Llama 1.1B", _llama_1b, torch.bfloat16),
    MANY,
    MANY_IN_A_ROW,
    Case("1 tensor of 500M", equal_tensors(1, 500_000_000)),
    Case("1 tensor of 100M", equal_tensors(1, 100_000_000), asked=True),
    Case("64 tensors of 4096", equal_tensors(64, 4096), in_a_row=True, asked=True),
    Case("2 tensors of 10", equal_tensors(2, 10), in_a_row=True, asked=True),
    Case("ViT-L/16", _vit_l, huge=True),
    Case("GPT-2 XL", _gpt2_xl, torch.bfloat16, huge=True),
    Case("Stable Diffusion UNet", _unet, torch.bfloat16, huge=True),
    Case("Llama 1.1B", _llama_1b, torch.bfloat16, torch.bfloat16, huge=True),
    Case("Llama 7B", _llama_7b, torch.bfloat16, huge=True),
    Case("2000 tensors of 256", _many, torch.bfloat16, huge=True),
    Case("1 tensor of 2^31+17", equal_tensors(1, 2**31 + 17), huge=True),
)


def filled(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with normally distributed values. The packages' own initialisation, which takes long, is skipped."""
    with torch.device("meta"):
        module = build()
    module.to(dtype).to_empty(device=device)
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return module


def average_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module of averages whose values differ from the model's."""
    average = copy.deepcopy(model).requires_grad_(False).to(dtype)
    for parameter in average.parameters():
        parameter.normal_(std=0.02)
    return average


def filled_pair(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The case's model and its averages."""
    model = filled(case.build, case.model_dtype, device)
    return model, average_of(model, case.average_dtype)


def shrunk(model: nn.Module) -> nn.Module:
    """The same modules and names with one element per tensor, so that only the host's work remains in an update."""
    small = copy.deepcopy(model)
    for tensor in chain(small.parameters(), small.buffers()):
        tensor.data = tensor.data[(slice(0, 1),) * tensor.dim()].clone()
    return small
