"""Loads checkpoints from files without running code that is in them."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from .files import PathLike, safetensors


def load(path: PathLike, map_location: str | torch.device = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint from a .safetensors file, or from any other file with `torch.load(weights_only=True)`.

    timm's checkpoints hold an argparse.Namespace, which is allowed because it runs no code.

    Args:
        mmap: leaves the tensors of a file of `torch.save` in the file, which is mapped into memory.

    Raises:
        ValueError: the file is a pickle that could run code, as EDM2's are; it is truncated or corrupt; or it holds no
            dict.
        OSError: the file can't be opened.
        ImportError: safetensors is not installed.
    """
    library = safetensors() if Path(path).suffix.lower() == ".safetensors" else None
    try:
        if library:
            state = library.torch.load_file(path, device=str(map_location))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
            raise ValueError(f"{path}: expected a checkpoint, found a file that can't be read: {error!r}") from error
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = named[1] if named else "a damaged file, or a pickle of something else"
        raise ValueError(
            f"{path}: expected tensors, numbers, strings and containers, found {found}; the file was refused, because "
            "unpickling it could run code"
        ) from None  # torch's own message says how to unpickle it anyway
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state
