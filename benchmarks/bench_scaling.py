"""Measures the cost of an update against the number of tensors and against their bytes, and fits a line to both.

    time = fixed + per_tensor * tensors + per_byte * bytes

by least squares on relative errors. The fit tells from which size on a method is nearly as fast as fused_ema. Beside
the methods runs a stream of the same bytes: a method's share is its speed relative to the stream's.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from measure import alternating, ceilings, in_cache, prepared, ratio, reason, sets_for, spread
from methods import (
    AVERAGED,
    BOUND,
    DIFFUSERS_FOREACH,
    EMA_PYTORCH,
    FOREACH,
    FOREACH_CACHED,
    LOOP,
    MANAGER,
    TIMM,
    TORCH_EMA,
    UPDATE,
    make_step,
)
from models import average_of, equal_tensors, filled
from report import columns, console, progress, short

METHODS = (
    LOOP,
    FOREACH,
    FOREACH_CACHED,
    AVERAGED,
    TIMM,
    EMA_PYTORCH,
    TORCH_EMA,
    DIFFUSERS_FOREACH,
    UPDATE,
    BOUND,
    MANAGER,
)
ELEMENTS = 4_000_000  # of all tensors together, when their number varies
COUNTS = (1, 10, 100, 1000, 5000, 20000)
TENSORS = 100  # when their size varies
SIZES = (
    25_000,
    80_000,
    250_000,
    800_000,
    2_500_000,
    8_000_000,
    25_000_000,
    125_000_000,
)  # elements of all tensors together
GAIN = 1.1  # the least gain that counts


def point(
    tensors: int, elements: int, device: torch.device, budget: float, names: list[str], library: ctypes.CDLL | str
) -> dict[str, Any]:
    build = equal_tensors(tensors, max(1, elements // tensors))
    size = 12 * tensors * max(1, elements // tensors)
    pairs = []
    for _ in range(sets_for(size, device)):
        model = filled(build, torch.float32, device)
        pairs.append((model, average_of(model, torch.float32)))
    steps, left_out = {}, {}
    for name in names:
        try:
            steps[name] = prepared(partial(make_step, name), pairs)
        except Exception as problem:  # a missing package, or too little memory
            left_out[name] = reason(problem)
    streams, longer = ceilings(size, pairs, library)
    with progress(f"{tensors} tensors, {short(size)}", budget) as tick:
        times = alternating({**steps, **streams}, device, budget, tick=tick)
    # A user waits for the longer of the host's and the device's time.
    spent = {name: spread([max(t) for t in times[name]]) for name in steps}
    ceiling = {name: spread([longer * t.device for t in times[name]]) for name in streams}
    best = min(streams, key=lambda name: ceiling[name]["median"], default=None)
    return {
        "tensors": tensors,
        "bytes": size,
        "sets": len(pairs),
        "in_cache": in_cache(size, len(pairs), device),
        "us": spent,
        "streams": ceiling,
        "share_of_ceiling": {name: longer / ratio(times[name], times[best]) for name in steps} if best else {},
        "left_out": left_out,
    }


def fit(points: list[dict[str, Any]], method: str) -> dict[str, float]:
    """The fitted microseconds: fixed, per tensor and per gigabyte; none is negative."""
    rows = torch.tensor([[1.0, p["tensors"], p["bytes"] / 1e9] for p in points], dtype=torch.float64)
    us = torch.tensor([p["us"][method]["median"] for p in points], dtype=torch.float64)
    keep = [0, 1, 2]
    while True:
        solved = torch.linalg.lstsq(rows[:, keep] / us[:, None], torch.ones(len(us), 1, dtype=torch.float64)).solution
        if (solved >= 0).all():
            break
        del keep[int(solved.argmin())]
    found = dict(zip(keep, solved[:, 0].tolist(), strict=True))
    return {name: found.get(i, 0.0) for i, name in enumerate(("fixed_us", "us_per_tensor", "us_per_GB"))}


def break_even(theirs: dict[str, float], ours: dict[str, float], tensors: int) -> float | None:
    """The number of bytes, with this many tensors, above which we are less than GAIN times as fast: 0 if that is so for
    the smallest tensors, None if it is so at no size."""
    lead = (
        theirs["fixed_us"]
        - GAIN * ours["fixed_us"]
        + tensors * (theirs["us_per_tensor"] - GAIN * ours["us_per_tensor"])
    )
    slope = GAIN * ours["us_per_GB"] - theirs["us_per_GB"]
    if lead <= 0:
        return 0.0
    return lead / slope * 1e9 if slope > 0 else None


@torch.no_grad()
def measure(device: torch.device, budget: float, chosen: list[str], library: ctypes.CDLL | str) -> dict[str, Any]:
    names = [name for name in METHODS if name in chosen]
    smallest = point(1, 1000, device, budget / 4, names, library)
    by_count = [point(count, ELEMENTS, device, budget, names, library) for count in COUNTS]
    by_size = [point(TENSORS, elements, device, budget, names, library) for elements in SIZES]
    points = [smallest, *by_count, *by_size]
    left_out = {name: why for each in points for name, why in each["left_out"].items()}
    names = [name for name in names if name not in left_out]
    for name, why in left_out.items():
        console.print(f"left out: {name}\n    ({why})", markup=False)
    fits = {name: fit(points, name) for name in names}
    ends = {name: break_even(fits[name], fits[BOUND], TENSORS) for name in names}
    show(by_count, by_size, fits, ends)
    return {
        "smallest": smallest,
        "by_count": by_count,
        "by_size": by_size,
        "fits": fits,
        "break_even_bytes": ends,
        "tensors": TENSORS,
    }


def show(by_count: Any, by_size: Any, fits: dict[str, dict[str, float]], ends: dict[str, float | None]) -> None:
    for title, points, head in (
        (f"µs against the number of tensors, {short(12 * ELEMENTS)} to move", by_count, lambda p: f"{p['tensors']:,}"),
        (f"µs against the bytes to move, {TENSORS} tensors", by_size, lambda p: short(p["bytes"])),
    ):
        table = columns(title, "method", [head(p) for p in points])
        for name in fits:
            table.add_row(name, *[f"{p['us'][name]['median']:,.0f}" for p in points])
        console.print(table)
    table = columns(
        f"speed relative to the plain stream, {TENSORS} tensors", "method", [short(p["bytes"]) for p in by_size]
    )
    for name in fits:
        if all(p["share_of_ceiling"] for p in by_size):
            table.add_row(name, *[f"{p['share_of_ceiling'][name]:.0%}" for p in by_size])
    if table.row_count:
        console.print(table)
    table = columns("Line fitted to both", "method", ["fixed µs", "µs per tensor", "ms per GB"])
    for name, each in fits.items():
        cells = (f"{each['fixed_us']:.1f}", f"{each['us_per_tensor']:.3f}", f"{each['us_per_GB'] / 1e3:.1f}")
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"fused_ema.bind is less than {GAIN} times as fast, for a float32 model of {TENSORS} tensors:")
    for name, size in ends.items():
        if not name.startswith("fused_ema"):
            if size is None:
                words = "at no size"
            elif size == 0:
                words = "already for the smallest"
            else:
                words = f"from {size / 12 / 1e6:,.1f}M parameters on ({short(size)})"
                words += ", extrapolated beyond the measured sizes" if size > max(p["bytes"] for p in by_size) else ""
            console.print(f"    {name}: {words}")
    console.print()
