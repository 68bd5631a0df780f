"""Warnings that point at the caller's line instead of a line in this package."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings

import torch

# Of this package, and of those that call it on behalf of the user: contextlib leaves `swapped()`, PyTorch runs hooks.
_SKIPPED = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, contextlib.__file__)


def warn(message: str) -> None:
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_once(message: str) -> None:
    """Warns of the same thing once per process. (torch.compile can't trace a warning.)"""
    if not torch.compiler.is_compiling():
        _warn_once(message)


_warn_once = functools.lru_cache(maxsize=256)(warn)  # which remembers no call that raised
