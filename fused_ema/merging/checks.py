"""What checkpoints must have in common before anything is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from .._warning import warn
from ..pairs.pairing import first_few
from .entries import AVERAGED, COPIED, Checkpoint


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises where a checkpoint has other names, shapes, dtypes or ties than the first one."""
    first = checkpoints[0]
    for name, entry in first.entries.items():
        if entry.dtype not in AVERAGED and entry.dtype not in COPIED:
            raise TypeError(f"{first.path}: {name!r}: expected a type that has an average, found {entry}")
    for other in checkpoints[1:]:
        missing = [name for name in first.entries if name not in other.entries]
        extra = [name for name in other.entries if name not in first.entries]
        if missing or extra:
            parts = [("has no", missing), ("has besides", extra)]
            listed = " and ".join(f"{what} {first_few(list(map(repr, names)), ', ')}" for what, names in parts if names)
            raise ValueError(f"{other.path}: expected the names of {first.path}, found a difference: it {listed}")
        unlike = [
            f"{name!r}: expected {entry}, found {other.entries[name]}"
            for name, entry in first.entries.items()
            if str(entry) != str(other.entries[name])
        ]
        if unlike:
            raise ValueError(f"{other.path}: expected the tensors of {first.path}: {first_few(unlike, '; ')}")
        for name in first.entries:
            if first.ties.get(name) != other.ties.get(name):
                here, there = (each.ties.get(name) for each in (first, other))
                raise ValueError(
                    f"{other.path}: {name!r}: expected {_tie(here)}, as in {first.path}, found {_tie(there)}; save all "
                    "checkpoints with the same ties"
                )


def _tie(name: str | None) -> str:
    return "memory of its own" if name is None else f"one memory with {name!r}"


def warn_of_order(paths: Sequence[Path]) -> None:
    """Warns where the numbers in paths fall, as those of `step-1000 step-900` do in the order of a shell.

    Only paths that are alike but for their numbers are compared, by the first number that differs.
    """
    split = [re.split(r"(\d+)", str(path)) for path in paths]
    for (before, earlier), (after, later) in pairwise(zip(paths, split, strict=True)):
        if earlier[::2] == later[::2] and [*map(int, earlier[1::2])] > [*map(int, later[1::2])]:
            warn(
                f"{after} is taken for newer than {before}, whose number is larger; checkpoints come from the oldest "
                "to the newest (`ls -v` sorts by number)"
            )
            return
