"""The runners, which run updates. base.py defines their interface."""

from __future__ import annotations

import os

from .base import Job, Prepared, Runner, Watch
from .extension import Extension
from .foreach import Foreach
from .nvrtc import Nvrtc
from .several import Several

RUNNERS: tuple[Runner, ...] = (Extension(), Nvrtc(), Foreach())  # the fastest first


def choose(device_type: str) -> Runner:
    """The fastest runner that can run on devices of this type, here and now, or the one that FUSED_EMA_RUNNER names.

    Raises:
        ValueError: FUSED_EMA_RUNNER names no runner.
        RuntimeError: it names one that can't run there.
    """
    forced = os.environ.get("FUSED_EMA_RUNNER", "")
    names = [runner.name for runner in RUNNERS]
    if forced and forced not in names:
        raise ValueError(f"FUSED_EMA_RUNNER={forced!r}: expected one of {', '.join(names)}, or nothing")
    for runner in RUNNERS:
        if forced in ("", runner.name):
            reason = runner.why_not(device_type)
            if reason is None:
                return runner
            if forced:
                raise RuntimeError(f"FUSED_EMA_RUNNER={forced}, but on {device_type} devices it can't run: {reason}")
    raise AssertionError("the last runner runs everywhere")


def prepare(job: Job, watch: Watch | None, runners: dict[str, Runner]) -> Prepared:
    """Prepares each pair for the runner of its device's type."""
    one, *others = dict.fromkeys(runners.values())
    if not others:
        return one.prepare(job, watch)
    return Several(job, watch, [runners.get(model.device.type, one) for model in job.model])
