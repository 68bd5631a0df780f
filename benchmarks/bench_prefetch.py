"""What the prefetches of csrc bring: the host time of an update of one-element tensors, with caches that are cold.

Compiles the extension as it is and without each kind of prefetch, and times the variants alternately in one process.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import GPT2, RESNET, average_of, equal_tensors, filled, shrunk
from report import columns, console
from torch import nn
from torch.utils.cpp_extension import load

import fused_ema
from fused_ema._build import compile as _build
from fused_ema.runners import extension

FOLDER = Path(__file__).resolve().parents[1] / "build" / "prefetch"
COLD = 64 << 20  # bytes that are written between two calls: more than the caches hold
# What is replaced by nothing: in which file, from where, up to where.
AS_IT_IS = "as_it_is"
VARIANTS = {
    AS_IT_IS: None,
    "no_dicts": ("watch.cpp", "  if (fields->ma_used == 0) return;\n", "}\n\n// Inlined by request"),
    "no_values": ("watch.cpp", "  if (number + kAhead <", "  const Slot& slot"),
    "no_storages": ("plan.cpp", "      at.prefetch_storages(kAhead);\n", "    }\n"),
    "no_tensors": ("plan.cpp", "      prefetch(pairs_[i + kAhead].ema", "      at.prefetch_storages"),
    "no_rows": ("ema_cpu.cpp", "      if (tables.rows.end() - row > 4) {", "      const int64_t low"),
}


def linears() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1, 1) for _ in range(1000)))


CASES: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 small": GPT2.build,
    "ResNet-50": RESNET.build,
    "2000 in a list": equal_tensors(2000, 1),
    "1000 Linear": linears,
}


def compiled(name: str) -> Any:
    """The extension with one kind of prefetch left out. A namespace of its own lets several be loaded at once."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_build.source_folder(), folder)
    if edit := VARIANTS[name]:
        file, begin, end = edit
        text = (folder / file).read_text(encoding="utf-8")
        start = text.index(begin)
        (folder / file).write_text(text[:start] + text[text.index(end, start) :], encoding="utf-8")
    flags, link = _build.cxx_flags()
    sources = [str(path) for path in sorted(folder.glob("*.cpp"))]
    flags = [*flags, f"-Dfused_ema=fused_ema_{name}", "-w"]
    return load(f"_C_{name}", sources, extra_cflags=flags, extra_ldflags=link, build_directory=str(folder))


def measure(build: Callable[[], nn.Module], variants: dict[str, Any], decay: float, rounds: int) -> dict[str, float]:
    """Median microseconds of a bound update by variant."""
    model = shrunk(filled(build, torch.float32, torch.device("cpu")))
    average = average_of(model, torch.float32)
    handles = {}
    for name, module in variants.items():
        extension.load = lambda module=module: module
        handles[name] = fused_ema.bind(average, model)
    others = torch.zeros(COLD, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, handle in handles.items():
            others.add_(1)
            start = time.perf_counter()
            handle.update(decay)
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--decay", type=float, default=0.9, help="1.0 leaves the tensors alone; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=300, help="default: %(default)s")
    parser.add_argument("variants", nargs="*", help=f"default: all of {', '.join(list(VARIANTS)[1:])}")
    arguments = parser.parse_args()
    if unknown := set(arguments.variants) - VARIANTS.keys():
        parser.error(f"expected variants among {', '.join(VARIANTS)}, found {', '.join(unknown)}")
    torch.set_num_threads(1)
    names = dict.fromkeys([AS_IT_IS, *(arguments.variants or VARIANTS)])
    variants = {name: compiled(name) for name in names}
    table = columns("Host time of an update in µs, and as a multiple of the first", "case", list(names))
    for title, build in CASES.items():
        found = measure(build, variants, arguments.decay, arguments.rounds)
        table.add_row(title, *(f"{each:.0f} ({each / found[AS_IT_IS]:.2f})" for each in found.values()))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
