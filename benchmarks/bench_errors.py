"""Compares the errors of an update, and of the usual ways to write one, with float64, after one step and after many.

    python benchmarks/bench_errors.py [--json FILE]

There are a million float32 averages. `one step` is the largest error in units of the bound that fused_ema promises;
`moved` is the share of averages that an update changes although they equal the model; `drift` is the largest distance
of such averages from constant weights after ten thousand updates, in units in the last place.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measure import environment, exact_and_bound, ulp
from report import columns, console
from torch import Tensor

import fused_ema

DECAYS = (0.9, 0.99, 0.999, 0.9999)
ELEMENTS, STEPS = 1_000_000, 10_000
DRIFTING = 10_000  # elements in the long run


def mul_add(ema: Tensor, model: Tensor, decay: float) -> None:
    ema.mul_(decay).add_(model, alpha=1 - decay)


def lerp(ema: Tensor, model: Tensor, decay: float) -> None:
    ema.lerp_(model, 1 - decay)


METHODS: dict[str, Callable[[Tensor, Tensor, float], None]] = {
    "mul_, add_": mul_add,
    "lerp_": lerp,
    "fused_ema.update": lambda ema, model, decay: fused_ema.update([ema], [model], decay),
}


def measure(name: str, decay: float) -> dict[str, float]:
    update = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    old, model = (torch.randn(ELEMENTS, generator=generator) for _ in range(2))
    exact, bound = exact_and_bound(old.double(), model.double(), decay, torch.float32)
    average = old.clone()
    update(average, model, decay)
    one_step = ((average.double() - exact).abs() / bound).max().item()
    average = model.clone()
    update(average, model, decay)
    moved = (average != model).double().mean().item()
    model = model[:DRIFTING].clone()
    average = model.clone()
    for _ in range(STEPS):
        update(average, model, decay)
    drift = ((average.double() - model.double()).abs() / ulp(model, torch.float32)).max().item()
    return {"one_step": one_step, "moved": moved, "drift_ulp": drift}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    rows = [{"method": name, "decay": decay, **measure(name, decay)} for decay in DECAYS for name in METHODS]
    table = columns("Errors of an update of float32 averages", "decay", ["method", "one step", "moved", "drift, ulp"])
    for row in rows:
        cells = (f"{row['one_step']:.2f}", f"{row['moved']:.1%}", f"{row['drift_ulp']:.0f}")
        table.add_row(str(row["decay"]), str(row["method"]), *cells)
    console.print(table)
    if arguments.json:
        content = {"env": environment(torch.device("cpu")), "steps": STEPS, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
