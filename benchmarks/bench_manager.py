"""Measures the manager: several averages in one pass, and what it costs over the bound handle.

    python benchmarks/bench_manager.py [--seconds 30] [--json FILE]

Methods take turns in one run, in shuffled order; the medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_update import console, machine, rounds
from methods import filled, gpt2, many
from rich.table import Table
from torch import nn

import fused_ema

DECAYS = [0.999, 0.9995, 0.9999]
CALLS = 200  # of a short update, timed together


def several(dtype: torch.dtype, count: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """One manager of `count` averages, and as many managers of one."""
    model = filled(gpt2, dtype, device)
    together = fused_ema.EMA(model, decay=DECAYS[:count])
    apart = [fused_ema.EMA(model, decay=decay) for decay in DECAYS[:count]]

    def one_by_one() -> None:
        for manager in apart:
            manager.update()

    return {f"EMA with {count} averages": together.update, f"{count} EMAs with one": one_by_one}


def overhead(model: nn.Module) -> dict[str, Callable[[], None]]:
    handle = fused_ema.bind(copy.deepcopy(model), model)
    manager = fused_ema.EMA(model, decay=0.999)
    scheduled = fused_ema.EMA(model, decay=fused_ema.schedules.inverse_power(0.999))
    methods = {
        "bound handle": lambda: handle.update(0.999),
        "EMA.update, constant decay": manager.update,
        "EMA.update, inverse_power": scheduled.update,
    }

    def in_a_row(update: Callable[[], None]) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(CALLS):
                update()

        return calls

    return {name: in_a_row(update) for name, update in methods.items()}


def report(title: str, steps: dict[str, Callable[[], None]], device: torch.device, budget: float, calls: int) -> Any:
    times = rounds(steps, device.type == "cuda", budget)
    medians = {name: statistics.median(values) / calls for name, values in times.items()}
    first = next(iter(medians.values()))
    table = Table("method", title=title, title_justify="left", title_style="bold")
    for column in ("median", "p20", "p80", "ratio", "over the first"):
        table.add_column(column, justify="right")
    rows = {}
    for name, values in times.items():
        cuts = [cut / calls for cut in statistics.quantiles(values, n=5)]
        rows[name] = {"median_s": medians[name], "p20_s": cuts[0], "p80_s": cuts[3], "rounds": len(values)}
        cells = [f"{seconds * 1e6:,.1f} µs" for seconds in (medians[name], cuts[0], cuts[3], medians[name] - first)]
        table.add_row(name, *cells[:3], f"{medians[name] / first:.2f}", cells[3])
    console.print(table)
    return {"case": title, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="per case")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    device, budget = torch.device(arguments.device), arguments.seconds
    about = machine(device)
    console.print(f"{about['device']}, {about['cpu']}, {about['threads']} threads; torch {about['torch']}\n")
    cases = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for count in (2, 3):
                title = f"GPT-2 small shapes, {count} float32 averages of {str(dtype).removeprefix('torch.')}"
                cases.append(report(title, several(dtype, count, device), device, budget, 1))
        small = filled(lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), torch.float32, device)
        for title, model in (("8 small tensors", small), ("2000 tensors of 256", filled(many, torch.float32, device))):
            cases.append(report(f"{title}, {CALLS} calls in a row", overhead(model), device, budget, CALLS))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
