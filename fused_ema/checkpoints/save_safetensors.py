"""Writes the averaged model to a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..manager.ema import EMA
from ..pairs.arguments import check_floating
from ..pairs.pairing import unwrapped
from .files import PathLike, safetensors, save, storable


def save_safetensors(path: PathLike, ema: EMA, index: int = 0, *, dtype: torch.dtype | None = None) -> None:
    """Writes the model with the average in it, for `model.load_state_dict(safetensors.torch.load_file(path))`.

    The prefixes of DDP and torch.compile are removed from the names. The file holds tensors only, and stores tied
    ones under each of their names. If writing is interrupted, the file that was there before stays as it was. If the
    model is sharded, every rank has to call this; the first rank of the mesh writes the whole tensors.

    Args:
        index: which average.
        dtype: a floating type to cast floating tensors to. None: as they are.

    Raises:
        ValueError: a value is too large for `dtype`, or a tensor is complex128, which safetensors does not have.
        IndexError: there is no average of that index.
        ImportError: safetensors is not installed, or numpy, which it needs for writing.
    """
    safetensors()
    check_floating(dtype or torch.float32)
    tensors: dict[str, Tensor | None] = {}
    for key, value in unwrapped(ema.model, ema.averaged_state_dict(index, copy=False)).items():
        if isinstance(value, Tensor):
            if value.dtype == torch.complex128:
                raise ValueError(f"ema[{key!r}]: expected a type that safetensors has, found complex128")
            copy = storable(key, value, dtype if value.is_floating_point() else None)
            tensors[key] = torch.view_as_complex(copy) if copy is not None and value.is_complex() else copy
    save(Path(path), tensors, {})
