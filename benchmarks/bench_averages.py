"""Compares several averages in one pass with one manager for each, and the manager with the bound handle."""

from __future__ import annotations

import copy
from typing import Any

import torch
from measure import alternating, ratio, spread
from methods import DECAY, Step
from models import GPT2, MANY, equal_tensors, filled
from report import columns, console, progress
from torch import nn

import fused_ema

DECAYS = [0.999, 0.9995, 0.9999]
CALLS = 200  # short updates that are timed together


def several(dtype: torch.dtype, count: int, device: torch.device) -> dict[str, Step]:
    model = filled(GPT2.build, dtype, device)
    together = fused_ema.EMA(model, decay=DECAYS[:count])
    managers = [fused_ema.EMA(model, decay=decay) for decay in DECAYS[:count]]

    def one_by_one() -> None:
        for manager in managers:
            manager.update()

    return {f"EMA with {count} averages": together.update, f"{count} EMAs with one": one_by_one}


def overhead(model: nn.Module) -> dict[str, Step]:
    handle = fused_ema.bind(copy.deepcopy(model), model)
    methods = {
        "bound handle": lambda: handle.update(DECAY),
        "EMA.update, constant decay": fused_ema.EMA(model, decay=DECAY).update,
        "EMA.update, inverse_power": fused_ema.EMA(model, decay=fused_ema.schedules.inverse_power(DECAY)).update,
    }

    def in_a_row(update: Step) -> Step:
        def calls() -> None:
            for _ in range(CALLS):
                update()

        return calls

    return {name: in_a_row(update) for name, update in methods.items()}


def report(title: str, steps: dict[str, Step], device: torch.device, budget: float, calls: int = 1) -> dict[str, Any]:
    with progress(title, budget) as tick:
        times = alternating({name: [step] for name, step in steps.items()}, device, budget, tick=tick)
    spent = {name: spread([max(t) / calls for t in values]) for name, values in times.items()}
    ratios = {name: ratio(values, next(iter(times.values()))) for name, values in times.items()}
    first = next(iter(spent.values()))["median"]
    table = columns(title, "method", ["µs", "p20", "p80", "ratio", "over the first, µs"])
    for name, us in spent.items():
        cells = [f"{us[key]:,.1f}" for key in ("median", "p20", "p80")]
        table.add_row(name, *cells, f"{ratios[name]:.2f}", f"{us['median'] - first:,.1f}")
    console.print(table)
    return {"case": title, "us": spent, "ratio": ratios}  # ratios to the first method, taken within rounds


@torch.no_grad()
def measure(device: torch.device, budget: float) -> list[dict[str, Any]]:
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for count in (2, 3):
            title = f"{GPT2.name}, {count} float32 averages of {str(dtype).removeprefix('torch.')}"
            cases.append(report(title, several(dtype, count, device), device, budget))
    for title, build in (("8 tensors of 256", equal_tensors(8, 256)), (MANY.name, MANY.build)):
        steps = overhead(filled(build, torch.float32, device))
        cases.append(report(f"{title}, {CALLS} calls in a row", steps, device, budget / 2, CALLS))
    console.print()
    return cases
