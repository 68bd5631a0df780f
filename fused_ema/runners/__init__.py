"""The runners, which run updates. base.py has their interface."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Runner
from .extension import Extension
from .foreach import Foreach
from .nvrtc import Nvrtc

RUNNERS: tuple[Runner, ...] = (Extension(), Nvrtc(), Foreach())  # the fastest first


def choose(device_types: Iterable[str]) -> Runner:
    """The fastest runner that can run on devices of all these types, here and now."""
    types = list(device_types)
    return next(runner for runner in RUNNERS if not any(map(runner.why_not, types)))
