"""Says once where updates run slower than they could on this machine, and what to do about it."""

from __future__ import annotations

import os
import shutil

import torch

from .._build.switch import switch
from .._build.toolkit import no_cuda_in
from .._warning import warn
from .base import Runner
from .extension import Extension
from .foreach import Foreach
from .nvrtc import Nvrtc

_warned = False


def warn_once(runners: dict[str, Runner]) -> None:
    """Warns, once per process, where one of these runners, by device type, is not the fastest that could be had.

    It is silent where FUSED_EMA_QUIET=1 asks for that, and where the user has chosen the runner.
    """
    global _warned
    if _warned or os.environ.get("FUSED_EMA_QUIET") == "1" or os.environ.get("FUSED_EMA_RUNNER"):
        return
    for device_type, runner in runners.items():
        if isinstance(runner, Foreach) and (reason := why_slower(device_type)):
            _warned = True
            warn(
                f"fused_ema: on {device_type} devices, updates run as PyTorch's own operations, which are slower than "
                f"the compiled kernel: {reason}. FUSED_EMA_QUIET=1 silences this warning."
            )
            return


def why_slower(device_type: str) -> str | None:
    """Why there is no compiled code for devices of this type, though there could be; None where nothing can be done."""
    if switch("FUSED_EMA_EXT") is False:
        return None
    if device_type == "cpu":
        return Extension().why_not("cpu") if has_compiler() else None
    if device_type == "cuda" and not no_cuda_in(torch):
        return Nvrtc().why_not("cuda")
    return None


def has_compiler() -> bool:
    return any(map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++", "cl"]))
