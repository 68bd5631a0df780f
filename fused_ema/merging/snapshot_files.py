"""Snapshots of posthoc, merged by the weights that reconstruct a power profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._warning import warn
from ..posthoc import profile_error, solve_weights
from ..posthoc.snapshots import MARK, about_of
from ..schedules import gamma_of
from . import safetensors_files
from .entries import Checkpoint
from .weights import parameter

KIND = "averages in snapshots"


def weighed(
    files: list[Checkpoint], weights: str | Sequence[float], times: Sequence[float] | None
) -> tuple[list[Checkpoint], list[float]] | None:
    """Each average in the snapshots as a checkpoint, and its weight; None where no file is a snapshot."""
    marked = [each.kind == safetensors_files.FILE and MARK in each.about for each in files]
    if not any(marked):
        return None
    if not all(marked):
        other = files[marked.index(False)].path
        raise ValueError(f"{other}: expected a snapshot, as {files[marked.index(True)].path} is, found none")
    sigma_rel = parameter(weights, "power") if isinstance(weights, str) else None
    if sigma_rel is None:
        raise ValueError(
            f"weights: expected power:SIGMA_REL for snapshots, which hold power averages, found {weights!r}"
        )
    if times is not None:
        raise ValueError("times: expected none for snapshots, which hold their own, found some")
    averages, at, gammas = [], [], []
    for file in files:
        about = about_of(Path(file.path), file.about)
        if about["complex"]:
            raise ValueError(f"{file.path}: {about['complex'][0]!r}: complex averages are for posthoc.reconstruct")
        for k, each in enumerate(about["sigma_rels"]):
            try:
                entries = {name: file.entries[f"{k}/{key}"] for name, key in about["tensors"].items()}
            except KeyError as missing:
                raise ValueError(f"{file.path}: truncated or corrupt: it has no {missing}") from None
            averages.append(Checkpoint(f"{file.path}, sigma_rel {each}", KIND, entries, {"format": "pt"}))
            at.append(about["updates"])
            gammas.append(gamma_of(each))
    wanted = max(at), gamma_of(sigma_rel)
    if (error := profile_error(at, gammas, *wanted)) > 0.25:
        warn(
            f"the snapshots give the profile of sigma_rel {sigma_rel} after {wanted[0]} updates with an error of "
            f"{error:.0%}; see fused_ema.posthoc.profile_error"
        )
    return averages, solve_weights(at, gammas, *wanted).tolist()
