"""Counts the instructions of one update in which only the host has work: GPT-2 small's tensors with one element each.

Valgrind (callgrind) counts them, so that neither other processes nor the clock matter. `valgrind` must be installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_scaling import METHODS
from measure import reason
from methods import BOUND, OURS, make_step
from models import GPT2, average_of, filled, shrunk
from report import columns, console


def measure(chosen: list[str]) -> dict[str, Any] | None:
    """Instructions per call by method, or None if they cannot be counted."""
    if not shutil.which("valgrind") or not torch._C._valgrind_supported_platform():
        console.print(
            "left out: instructions (valgrind is not installed, or PyTorch was built without support for it)\n"
        )
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        done = subprocess.run([*command, sys.executable, __file__, *chosen], capture_output=True, text=True)
        if done.returncode:
            console.print(f"left out: instructions (valgrind failed: {done.stderr.strip()[-300:]})\n", markup=False)
            return None
        for line in done.stderr.splitlines():
            if line.startswith("left out"):
                console.print(line, markup=False)
        names = json.loads(done.stdout.splitlines()[-1])
        counts = {}
        for i, name in enumerate(names):
            (found,) = re.findall(
                r"^(?:totals|summary): (\d+)", Path(f"{folder}/out.{i + 1}").read_text(), re.MULTILINE
            )[:1]
            counts[name] = int(found)
    show(counts)
    return {"case": f"{GPT2.name}'s tensors with one element each", "instructions": counts}


def show(counts: dict[str, int]) -> None:
    table = columns(
        "Instructions of one call, GPT-2 small's tensors with one element each", "method", ["thousands", "ratio"]
    )
    for name, count in counts.items():
        ratio = f"{count / counts[BOUND]:.1f}" if BOUND in counts else "-"
        table.add_row(name, f"{count / 1e3:,.0f}", ratio, style="bold" if name in OURS else None)
    console.print(table)
    console.print()


@torch.no_grad()
def count() -> None:
    """Runs in the process that callgrind observes, and makes one dump for each method."""
    torch.set_num_threads(1)
    model = shrunk(filled(GPT2.build, torch.float32, torch.device("cpu")))
    average, names = average_of(model, torch.float32), []
    for name in METHODS:
        if name not in sys.argv[1:]:
            continue
        try:
            step = make_step(name, model, average)
            step(), step()
        except Exception as problem:  # a missing package
            print(f"left out: {name} ({reason(problem)})", file=sys.stderr)
            continue
        torch._C._valgrind_toggle()
        step()
        torch._C._valgrind_toggle_and_dump_stats()
        names.append(name)
    print(json.dumps(names))


if __name__ == "__main__":
    count()
