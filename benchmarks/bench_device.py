"""Measures what only a GPU can show: the bandwidth of exchanges, copies and stochastic rounding; averages in host
memory compared with the bus; and the share of a training step that attached averages cost, overlapped or not."""

from __future__ import annotations

import copy
import importlib
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from bench_training import gpt, vit
from measure import alternating, reason, spread, synchronize
from methods import DECAY, FOREACH_CACHED, LOOP, Step, make_step
from models import GPT2, average_of, filled
from report import columns, console, progress

import fused_ema

STEPS = 5  # training steps that are timed together


def table(title: str, steps: dict[str, Step], moved: dict[str, int], device: torch.device, budget: float) -> Any:
    """`moved`: the bytes that each step reads and writes."""
    with progress(title, budget) as tick:
        times = alternating({name: [step] for name, step in steps.items()}, device, budget, tick=tick)
    rows = {}
    shown = columns(title, "what", ["µs", "p20", "p80", "GB", "GB/s"])
    for name, spent in times.items():
        us = spread([t.device for t in spent])
        rows[name] = {"us": us, "bytes": moved[name], "GBps": moved[name] / us["median"] / 1e3}
        cells = [f"{us[key]:,.1f}" for key in ("median", "p20", "p80")]
        shown.add_row(name, *cells, f"{moved[name] / 1e9:.3f}", f"{rows[name]['GBps']:,.1f}")
    console.print(shown)
    return {"case": title, "rows": rows}


def streams(device: torch.device, budget: float) -> Any:
    model = filled(GPT2.build, torch.bfloat16, device)
    n = sum(parameter.numel() for parameter in model.parameters())
    same, wide = copy.deepcopy(model), average_of(model, torch.float32)
    stochastic = fused_ema.EMA(model, DECAY, dtype=torch.bfloat16, rounding="stochastic")
    three = fused_ema.EMA(model, [DECAY] * 3)
    to_swap, to_copy = fused_ema.bind(same, model), fused_ema.bind(wide, model)
    steps: dict[str, Step] = {
        "swap_, bfloat16": to_swap.swap_,
        "copy_, float32←bfloat16": to_copy.copy_,
        "update, float32←bfloat16": lambda: to_copy.update(DECAY),
        "update, bfloat16←bfloat16": lambda: to_swap.update(DECAY),
        "EMA.update, bfloat16, stochastic rounding": stochastic.update,
        "EMA.update, 3 averages of float32": three.update,
    }
    moved = dict(zip(steps, (8 * n, 6 * n, 10 * n, 6 * n, 6 * n, 26 * n), strict=True))
    return table("GPT-2 small in bfloat16: operations", steps, moved, device, budget)


def host_memory(device: torch.device, budget: float) -> Any:
    """An update moves 4 bytes per element over the bus in each direction at once, as the last row of the table does."""
    model = filled(GPT2.build, torch.bfloat16, device)
    n = sum(parameter.numel() for parameter in model.parameters())
    ema = fused_ema.EMA(model, DECAY, device="cpu")
    down, up = (torch.empty(n, pin_memory=True) for _ in range(2))
    here = torch.empty(2, n, device=device)
    other = torch.cuda.Stream(device)

    def both_ways() -> None:
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            down.copy_(here[0], non_blocking=True)
        here[1].copy_(up, non_blocking=True)
        torch.cuda.current_stream().wait_stream(other)

    steps: dict[str, Step] = {
        "EMA.update, averages in host memory": ema.update,
        "copy to the host": lambda: down.copy_(here[0], non_blocking=True),
        "copy to the device": lambda: here[1].copy_(up, non_blocking=True),
        "both copies at once": both_ways,
    }
    moved = dict(zip(steps, (8 * n, 4 * n, 4 * n, 8 * n), strict=True))
    return table("GPT-2 small in bfloat16: float32 averages in host memory", steps, moved, device, budget)


def attached(make: Callable[..., Any], device: torch.device, budget: float) -> Any:
    """Times a whole training step without averages, and with each way to keep them."""
    torch.manual_seed(0)
    model, loss, title = make(device)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    average = average_of(model, torch.float32)
    ema = fused_ema.EMA(model, DECAY)
    with torch.no_grad():
        by_hand: dict[str, Step] = {name: make_step(name, model, average) for name in (LOOP, FOREACH_CACHED)}
    ways = ["no average", *by_hand, "EMA.update()", "EMA.attach", "EMA.attach, overlap=True"]

    def seconds(way: str) -> float:
        with ExitStack() as stack:
            if "attach" in way:
                stack.callback(ema.attach(optimizer, overlap="overlap" in way).remove)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(STEPS):
                with torch.autocast(device.type, torch.bfloat16):
                    value = loss(model)
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
                if way in by_hand:
                    with torch.no_grad():
                        by_hand[way]()
                elif way == "EMA.update()":
                    ema.update()
            synchronize(device)
            return (time.perf_counter() - start) / STEPS

    for way in ways:
        seconds(way)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    shuffle, end = random.Random(0).shuffle, time.perf_counter() + budget
    with progress(title, budget) as tick:
        while time.perf_counter() < end or len(spent[ways[0]]) < 5:
            order = list(ways)
            shuffle(order)
            for way in order:
                spent[way].append(seconds(way))
            tick()
    alone = spent[ways[0]]
    shares = {
        way: statistics.median((each - none) / none for each, none in zip(spent[way], alone, strict=True))
        for way in ways[1:]
    }
    shown = columns(f"Training with autocast: {title}", "averages", ["ms per step", "p20", "p80", "added"])
    for way, values in spent.items():
        us = spread(values)
        share = f"{shares[way]:.2%}" if way in shares else ""
        shown.add_row(way, *[f"{us[key] / 1e3:.2f}" for key in ("median", "p20", "p80")], share)
    console.print(shown)
    return {"case": title, "step_us": {way: spread(values) for way, values in spent.items()}, "on_top": shares}


def measure(device: torch.device, budget: float) -> dict[str, Any]:
    importlib.import_module("transformers").logging.set_verbosity_error()
    parts: dict[str, Callable[[], Any]] = {
        "operations": torch.no_grad()(lambda: streams(device, budget / 2)),
        "host memory": torch.no_grad()(lambda: host_memory(device, budget / 2)),
        "training of a ViT": lambda: attached(vit, device, budget),
        "training of a GPT": lambda: attached(gpt, device, budget),
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as problem:  # a missing package, or too little memory
            found[name] = {"left_out": reason(problem)}
            console.print(f"left out: {name} ({reason(problem)})", markup=False)
        torch.cuda.empty_cache()
    console.print()
    return found
