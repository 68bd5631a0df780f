"""Defines the methods that are measured: loops written by hand, the managers that people install, and fused_ema.

Each method takes a model and a module of averages and returns a function that makes one update with a constant decay,
as the package would after any warm-up. All methods work on the same averages: if a package allocates its own, they are
replaced with these, so that no memory layout favours one method.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_ema

DECAY = 0.999
WEIGHT = 1 - DECAY

Step: TypeAlias = Callable[[], None]
Make: TypeAlias = Callable[[nn.Module, nn.Module], Step]  # (model, averages)

LOOP = "tutorial loop: named_parameters, mul_, add_"
MUL_ADD = "mul_, add_ on cached lists"
FOREACH_MUL_ADD = "_foreach_mul_, _foreach_add_ on cached lists"
FOREACH = "_foreach_lerp_, lists at each call"
FOREACH_CACHED = "_foreach_lerp_ on cached lists"
COMPILED = "torch.compile of the loop"
AVERAGED = "AveragedModel"
AVERAGED_FUSED = "AveragedModel with fused_ema"
AVERAGED_OURS = "fused_ema.AveragedModel"
TIMM = "timm ModelEmaV3"
EMA_PYTORCH = "ema-pytorch EMA"
EMA_PYTORCH_FOREACH = "ema-pytorch EMA, foreach"
TORCH_EMA = "torch_ema"
DIFFUSERS = "diffusers EMAModel"
DIFFUSERS_FOREACH = "diffusers EMAModel, foreach"
DIFFUSERS_FUSED = "EMAModel of fused_ema.dropin"
LIGHTNING = "Lightning EMAWeightAveraging"
APEX = "apex multi_tensor_axpby"
FOREACH_GRAPH = "_foreach_lerp_ in a CUDA graph"
UPDATE = "fused_ema.update"
BOUND = "fused_ema.bind"
MANAGER = "fused_ema.EMA"
BOUND_GRAPH = "fused_ema.bind in a CUDA graph"

# ---- By hand


def _loop(model: nn.Module, ema: nn.Module) -> Step:
    def step() -> None:
        ours = dict(ema.named_parameters())
        for name, parameter in model.named_parameters():
            ours[name].mul_(DECAY).add_(parameter.data, alpha=WEIGHT)

    return step


def _lists(model: nn.Module, ema: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return list(ema.parameters()), list(model.parameters())


def _mul_add(model: nn.Module, ema: nn.Module) -> Step:
    pairs = list(zip(*_lists(model, ema), strict=True))

    def step() -> None:
        for average, parameter in pairs:
            average.mul_(DECAY).add_(parameter, alpha=WEIGHT)

    return step


def _foreach_mul_add(model: nn.Module, ema: nn.Module) -> Step:
    averages, parameters = _lists(model, ema)

    def step() -> None:
        torch._foreach_mul_(averages, DECAY)
        torch._foreach_add_(averages, parameters, alpha=WEIGHT)

    return step


def _foreach(model: nn.Module, ema: nn.Module) -> Step:
    return lambda: torch._foreach_lerp_(*_lists(model, ema), WEIGHT)


def _foreach_cached(model: nn.Module, ema: nn.Module) -> Step:
    averages, parameters = _lists(model, ema)
    return lambda: torch._foreach_lerp_(averages, parameters, WEIGHT)


def _compiled(model: nn.Module, ema: nn.Module) -> Step:
    averages, parameters = _lists(model, ema)
    if len(averages) > 300:
        raise NotImplementedError(f"{len(averages)} tensors take torch.compile too long")

    lerp = _compiled_loop()
    return lambda: lerp(averages, parameters)


@functools.cache  # one function serves all sets, because their sizes are equal
def _compiled_loop() -> Callable[[list[torch.Tensor], list[torch.Tensor]], None]:
    @torch.compile(fullgraph=True, dynamic=False)
    def lerp(averages: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.to(average.dtype), WEIGHT)

    return lerp


# ---- Packages


def _averaged(function: Callable[..., None], kind: type[AveragedModel] = AveragedModel) -> Make:
    def make(model: nn.Module, ema: nn.Module) -> Step:
        manager = kind(model, multi_avg_fn=function)
        manager.module = ema
        manager.n_averaged.fill_(1)  # otherwise the first update would copy
        return lambda: manager.update_parameters(model)

    return make


def _timm(model: nn.Module, ema: nn.Module) -> Step:
    # Load this one file: `import timm` needs torchvision, but the file does not.
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ImportError("No module named 'timm'")
    spec = importlib.util.spec_from_file_location("_timm_model_ema", Path(package.origin).parent / "utils/model_ema.py")
    assert spec
    assert spec.loader
    if spec.name not in sys.modules:
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    manager = sys.modules[spec.name].ModelEmaV3(model, decay=DECAY)
    manager.module = ema
    return lambda: manager.update(model)


def _ema_pytorch(foreach: bool) -> Make:
    def make(model: nn.Module, ema: nn.Module) -> Step:
        manager = importlib.import_module("ema_pytorch").EMA(
            model,
            ema,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            coerce_dtype=True,
            use_foreach=foreach,
        )
        manager.initted.fill_(True)
        manager.step.fill_(10)
        return manager.update  # type: ignore[no-any-return]

    return make


def _torch_ema(model: nn.Module, ema: nn.Module) -> Step:
    library = importlib.import_module("torch_ema")
    manager = library.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    manager.shadow_params = list(ema.parameters())
    return lambda: manager.update()


def _diffusers(foreach: bool, package: str = "diffusers.training_utils") -> Make:
    def make(model: nn.Module, ema: nn.Module) -> Step:
        library = importlib.import_module(package)
        manager = library.EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
        manager.shadow_params = list(ema.parameters())
        manager.optimization_step = 10
        return torch.no_grad()(lambda: manager.step(model.parameters()))

    return make


def _lightning(model: nn.Module, ema: nn.Module) -> Step:
    """Calls the callback as the trainer does, with a stand-in for the trainer's step counter."""
    lightning = importlib.import_module("lightning.pytorch")
    callback = importlib.import_module("lightning.pytorch.callbacks").EMAWeightAveraging(decay=DECAY)
    module = lightning.LightningModule().to(next(model.parameters()).device)
    module.model = model
    trainer = types.SimpleNamespace(global_step=0)
    callback.setup(trainer, module, "fit")
    callback._average_model.module.model = ema
    callback._average_model.n_averaged.fill_(1)

    def step() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return step


def _apex(model: nn.Module, ema: nn.Module) -> Step:
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    kernel = importlib.import_module("amp_C").multi_tensor_axpby
    averages, parameters = _lists(model, ema)
    overflow = torch.zeros(1, dtype=torch.int, device=averages[0].device)
    lists = [averages, parameters, averages]
    return lambda: applier(kernel, overflow, lists, DECAY, WEIGHT, -1)


# ---- fused_ema


def _update(model: nn.Module, ema: nn.Module) -> Step:
    return lambda: fused_ema.update(ema, model, DECAY)


def _bound(model: nn.Module, ema: nn.Module) -> Step:
    handle = fused_ema.bind(ema, model)
    return lambda: handle.update(DECAY)


def _manager(model: nn.Module, ema: nn.Module) -> Step:
    dtype = next(ema.parameters()).dtype
    manager = fused_ema.EMA(model, decay=DECAY, dtype=dtype)
    theirs = dict(ema.named_parameters(remove_duplicate=False))
    manager._averages._first = {name: theirs[name].detach() for name in manager._averages}
    manager._plan = None
    return manager.update


def _graph(make: Make) -> Make:
    def captured(model: nn.Module, ema: nn.Module) -> Step:
        step, graph = make(model, ema), torch.cuda.CUDAGraph()
        step()  # plan, upload and warm up before the capture
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    return captured


METHODS: dict[str, Make] = {
    LOOP: _loop,
    MUL_ADD: _mul_add,
    FOREACH_MUL_ADD: _foreach_mul_add,
    FOREACH: _foreach,
    FOREACH_CACHED: _foreach_cached,
    COMPILED: _compiled,
    AVERAGED: _averaged(get_ema_multi_avg_fn(DECAY)),
    AVERAGED_FUSED: _averaged(fused_ema.get_ema_multi_avg_fn(DECAY)),
    AVERAGED_OURS: _averaged(get_ema_multi_avg_fn(DECAY), fused_ema.AveragedModel),
    TIMM: _timm,
    EMA_PYTORCH: _ema_pytorch(False),
    EMA_PYTORCH_FOREACH: _ema_pytorch(True),
    TORCH_EMA: _torch_ema,
    DIFFUSERS: _diffusers(False),
    DIFFUSERS_FOREACH: _diffusers(True),
    DIFFUSERS_FUSED: _diffusers(False, "fused_ema.dropin"),
    LIGHTNING: _lightning,
    UPDATE: _update,
    BOUND: _bound,
    MANAGER: _manager,
}
CUDA_METHODS: dict[str, Make] = {APEX: _apex, FOREACH_GRAPH: _graph(_foreach_cached), BOUND_GRAPH: _graph(_bound)}
GRAPHS = (FOREACH_GRAPH, BOUND_GRAPH)
OURS = (UPDATE, BOUND, MANAGER, BOUND_GRAPH)


def method_names(device: torch.device) -> list[str]:
    return [*METHODS, *(CUDA_METHODS if device.type == "cuda" else ())]


def make_step(name: str, model: nn.Module, ema: nn.Module) -> Step:
    make = METHODS.get(name) or CUDA_METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases use 16-bit averages on purpose
        return make(model, ema)
