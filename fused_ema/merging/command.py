"""`python -m fused_ema merge`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

from .merge import merge
from .weights import FORMS, parsed


def add_to(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser(
        "merge",
        help="write the weighted average of checkpoints",
        description="Writes the weighted average of checkpoints: .safetensors files, folders of them, files of "
        "torch.save, or folders of torch.distributed.checkpoint. See docs/merging.md.",
    )
    command.add_argument("paths", nargs="+", metavar="CHECKPOINT", help="from the oldest to the newest")
    command.add_argument("-o", "--out", required=True, help="where to write the average")
    command.add_argument(
        "--weights",
        default="mean",
        help=f"{FORMS}; or a number for each, with commas between them, as in --weights=-0.5,1.5 (mean)",
    )
    command.add_argument("--times", help="when each was saved, with commas between them, for ema and power (1,2,3,...)")
    command.add_argument("--key", help="where the model is in the checkpoints, such as state_dict")
    command.add_argument(
        "--integers",
        choices=["equal", "newest"],
        default="equal",
        help="whether integer tensors of several elements must be equal, or are the newest checkpoint's",
    )


def run(arguments: argparse.Namespace) -> int:
    """Merges as the command line says. Warnings become lines on stderr."""
    start = time.monotonic()
    try:
        times = None if arguments.times is None else parsed(arguments.times)
        if isinstance(times, str):
            raise ValueError(f"--times: expected numbers with commas between them, found {times!r}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = merge(
                arguments.paths,
                arguments.out,
                arguments.weights,
                times=times,
                key=arguments.key,
                integers=arguments.integers,
            )
    except KeyboardInterrupt:
        print("fused_ema: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"fused_ema: nothing was written: {error}", file=sys.stderr)
        return 1
    for each in caught:
        if issubclass(each.category, UserWarning):
            print(f"fused_ema: {each.message}", file=sys.stderr)
    print(f"{out}: the average of {len(arguments.paths)} checkpoints, in {time.monotonic() - start:.1f} s")
    return 0
