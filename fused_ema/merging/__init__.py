"""Averages checkpoints after training.

    fused_ema.merge(["step-1000.safetensors", "step-2000.safetensors"], "average.safetensors", "ema:0.9")

`weights` has the weights, `sums` the arithmetic, and `entries` what a checkpoint holds; `safetensors_files`,
`torch_files` and `dcp_folders` read and write one kind of checkpoint each; `run` averages tensors piece by piece, in
threads; `checks` compares checkpoints; and `merge` combines all that.
"""

from .merge import merge as merge  # which is public as fused_ema.merge
from .weights import weights_of

__all__ = ["weights_of"]

weights_of.__module__ = __name__
