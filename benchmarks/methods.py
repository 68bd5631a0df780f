"""What is measured: modules of real shapes with random values, and the methods that average them."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_ema

DECAY = 0.999


def gpt2() -> nn.Module:
    """GPT-2 small: 148 tensors, 124M elements."""
    layer = nn.TransformerEncoderLayer(768, 12, 3072)
    blocks = nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)
    return nn.ModuleList([nn.Embedding(50257, 768), nn.Embedding(1024, 768), blocks])


def resnet50() -> nn.Module:
    """161 parameter tensors, 26M elements, and BatchNorm's 159 buffers."""

    def convolution(channels: int, features: int, size: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, features, size, bias=False), nn.BatchNorm2d(features)]

    layers, channels = convolution(3, 64, 7), 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            layers += convolution(channels, width, 1) + convolution(width, width, 3)
            layers += convolution(width, 4 * width, 1)
            if block == 0:
                layers += convolution(channels, 4 * width, 1)  # of the shortcut
            channels = 4 * width
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


def many() -> nn.Module:
    """One list, the quickest for PyTorch to walk over."""
    return nn.ParameterList(torch.empty(256) for _ in range(2000))


class Case(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    dtype: torch.dtype  # of the model; averages are float32
    repeats: int = 1  # calls in a row; the first of several warms the caches and is not counted


GPT2 = "GPT-2 small shapes, float32"
GPT2_BF16 = "GPT-2 small shapes, float32 average of bfloat16"
RESNET = "ResNet-50 shapes, float32"
MANY = "2000 tensors of 256, float32"
MANY_REPEATED = "2000 tensors of 256, float32, called again and again"
CASES = (
    Case(GPT2, gpt2, torch.float32),
    Case(GPT2_BF16, gpt2, torch.bfloat16),
    Case(RESNET, resnet50, torch.float32),
    Case(MANY, many, torch.float32),
    Case(MANY_REPEATED, many, torch.float32, repeats=6),
)


def filled(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device("meta"):  # the modules' own initialisation takes long, and is of no use here
        module = build()
    module.to(dtype).to_empty(device=device)
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()
    return module


# ---- Methods -------------------------------------------------------------------------------------

LOOP = "loop: named_parameters, mul_, add_"
MUL_ADD = "mul_, add_ on cached lists"
FOREACH = "_foreach_lerp_, lists at each call"
FOREACH_CACHED = "_foreach_lerp_ on cached lists"
AVERAGED = "AveragedModel"
AVERAGED_FUSED = "AveragedModel with fused_ema"
UPDATE = "fused_ema.update(module, module)"
BOUND = "fused_ema.bind(...).update"
STREAM = "plain C++ loop, two arrays"
COPY = "device copy of as many bytes"

Pairs = list[tuple[Tensor, Tensor]]


class Method(NamedTuple):
    step: Callable[[], None]
    pairs: Pairs | None  # (average, parameter) it is to be checked on; None: it computes something else


def methods(ema: nn.Module, model: nn.Module, library: ctypes.CDLL | str) -> dict[str, Method]:
    averages, parameters = list(ema.parameters()), list(model.parameters())
    pairs = list(zip(averages, parameters, strict=True))
    weight = 1 - DECAY
    handle = fused_ema.bind(ema, model)

    def loop() -> None:
        ours = dict(ema.named_parameters())
        for name, parameter in model.named_parameters():
            ours[name].mul_(DECAY).add_(parameter, alpha=weight)

    def mul_add() -> None:
        for average, parameter in pairs:
            average.mul_(DECAY).add_(parameter, alpha=weight)

    def averaged_model(function: Callable[..., None]) -> Callable[[], None]:
        manager = AveragedModel(nn.Identity(), multi_avg_fn=function)
        manager.module = ema  # the averages that all methods update, not a copy
        manager.n_averaged.fill_(1)  # the first update would copy
        return lambda: manager.update_parameters(model)

    steps = {
        LOOP: loop,
        MUL_ADD: mul_add,
        FOREACH: lambda: torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight),
        FOREACH_CACHED: lambda: torch._foreach_lerp_(averages, parameters, weight),
        AVERAGED: averaged_model(get_ema_multi_avg_fn(DECAY)),
        AVERAGED_FUSED: averaged_model(fused_ema.get_ema_multi_avg_fn(DECAY)),
        UPDATE: lambda: fused_ema.update(ema, model, DECAY),
        BOUND: lambda: handle.update(DECAY),
    }
    found = {name: Method(step, pairs) for name, step in steps.items()}
    elements = sum(average.numel() for average in averages)
    if elements < 10**7:  # no stream: it fits into a cache
        return found
    if isinstance(library, ctypes.CDLL):
        found[STREAM] = stream(library, elements, parameters[0].dtype)
    if averages[0].is_cuda:
        size = handle.describe()["bytes_per_update"] // 2
        source, target = torch.zeros(2, size, dtype=torch.uint8, device=averages[0].device)
        found[COPY] = Method(lambda: target.copy_(source), None)
    return found


def stream(library: ctypes.CDLL, elements: int, dtype: torch.dtype) -> Method:
    average, parameter = torch.randn(elements), torch.randn(elements, dtype=dtype)
    function = getattr(library, f"stream_{str(dtype).removeprefix('torch.')}")

    def step() -> None:
        pointers = (ctypes.c_void_p(average.data_ptr()), ctypes.c_void_p(parameter.data_ptr()))
        weight = ctypes.c_float(1 - DECAY)
        function(*pointers, ctypes.c_int64(elements), weight, ctypes.c_int(torch.get_num_threads()))

    return Method(step, [(average, parameter)])


def compile_stream() -> ctypes.CDLL | str:
    """stream.cpp, built for this very CPU, or why not."""
    compiler = os.environ.get("CXX") or "g++"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stream.so"
        command = [*shlex.split(compiler), *flags, "stream.cpp", "-o", library]
        try:
            subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            return f"no compiler {compiler!r} here; set CXX to another"
        except subprocess.CalledProcessError as problem:
            return f"{compiler} failed: {problem.stderr.strip()}"
        return ctypes.CDLL(library)
