"""Reads and writes averages as other packages do, and the averaged model as a safetensors file.

    restore(ema, load("last.pth.tar"))            # a checkpoint of timm, as its keys show
    restore(ema, load("model.safetensors"))       # averaged weights
    torch.save(export(ema, "diffusers"), path)    # what EMAModel.load_state_dict takes
    save_safetensors("model.safetensors", ema)    # what model.load_state_dict takes

| layout | whose state | averages | count |
| --- | --- | --- | --- |
| "averaged_model" | torch's AveragedModel | by name, after `module.` | n_averaged: our updates and the first copy |
| "timm" | a checkpoint of timm | by name, in `state_dict_ema` | none |
| "diffusers" | EMAModel | by position, in `shadow_params` | optimization_step: our step |
| "ema_pytorch" | ema_pytorch.EMA | by name, after `ema_model.` | step: our step |
| "torch_ema" | ExponentialMovingAverage | by position, in `shadow_params` | num_updates: our step - update_after_step |
| "lit_ema" | latent-diffusion's LitEma, alone or under `model_ema.` | by name, without dots | as torch_ema |
| "mmengine" | ExponentialMovingAverage, or a checkpoint with EMAHook | by name, after `module.` | steps: our step |
| "dino" | a checkpoint of DINO or DINOv2 | by name, in `teacher` | none |
| "plain" | none: `averaged_state_dict()`, `save_safetensors` | by name | none |
"""

from .export import export
from .layouts import LAYOUTS
from .load import load
from .restore import restore
from .save_safetensors import save_safetensors

__all__ = ["LAYOUTS", "export", "load", "restore", "save_safetensors"]

for _public in (export, load, restore, save_safetensors):
    _public.__module__ = __name__
