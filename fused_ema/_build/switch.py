"""Reads the environment variables that switch parts off, or make their absence an error."""

from __future__ import annotations

import os


def switch(name: str) -> bool | None:
    """FUSED_EMA_EXT or FUSED_EMA_CUDA: False leaves the part out, True makes its absence an error, None does neither."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}={value!r}: expected 0 (leave it out), 1 (its absence is an error) or nothing")
    return None if value == "" else value == "1"
