"""Measures one update of all averages and compares it with the methods in use today, in one run.

    python benchmarks/bench_update.py [--quick] [--parts models,scaling,...] [--json FILE] [--csv FILE]

The parts are `models`: each method on each architecture; `scaling`: the cost against the number of tensors and their
bytes; `averages`: several averages at once, and the manager's own cost; `training`: the share of a real training step;
`device`: what only a GPU can show; `instructions`: the host's, counted by Valgrind. All methods work on the same
tensors, alternating in shuffled order, so that other load on the machine affects all of them alike. Sets of tensors
alternate too, so that no call finds in a cache what the previous one left there. Each method's result is first compared
with float64.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import bench_averages
import bench_device
import bench_instructions
import bench_scaling
import bench_training
import export
import torch
from measure import (
    Times,
    alternating,
    ceilings,
    compared,
    compile_stream,
    environment,
    in_cache,
    launches,
    peak_extra_bytes,
    prepared,
    ratio,
    reason,
    sets_for,
    spread,
    waits,
)
from methods import BOUND, COMPILED, GRAPHS, OURS, Step, make_step, method_names
from models import CASES, Case, filled_pair, shrunk
from report import columns, console, parts_of, progress
from torch import nn

import fused_ema

REPEATS = 6  # calls in a row
WRONG = 1e5  # times the bound; updating wrong tensors gives millions, computing in bfloat16 about 30,000
PARTS = ("models", "scaling", "averages", "training", "device", "instructions")


def measure(case: Case, device: torch.device, budget: float, library: ctypes.CDLL | str, names: list[str]) -> Any:
    """The rows of one case (a dict per method), the memory's ceiling, and what was left out and why."""
    begin = time.perf_counter()
    model, average = filled_pair(case, device)
    about = fused_ema.bind(average, model).describe()
    size = about["bytes_per_update"]
    count = 1 if case.in_a_row else sets_for(size, device)
    sets = [(model, average), *(filled_pair(case, device) for _ in range(1, count))]
    streams, longer = ceilings(size, sets, library)
    torch._dynamo.reset()  # otherwise each case counts as a recompilation of the same function
    steps: dict[str, list[Step]] = {}
    facts: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            made = prepared(partial(make_step, name), sets)
            error, match = compared(made[0], *sets[0])
            facts[name] = {
                "max_err_over_bound": error,
                "match": match,
                "peak_extra_bytes": None if name in GRAPHS else peak_extra_bytes(made[0], device),  # graphs keep theirs
            }
            if not error < WRONG:
                raise ArithmeticError(f"a wrong result: {error:.0f} times the bound")
            steps[name] = made
        except Exception as problem:  # packages raise anything
            left_out[name] = reason(problem)
        free(device)  # outside the except block, where the traceback keeps the failed tensors alive
    counts = dict[str, Any].fromkeys(steps)
    try:
        counts = launches({name: made[0] for name, made in steps.items()}, device)
    except Exception as problem:
        left_out["counts of launches"] = reason(problem)
    with progress(case.title, budget) as tick:
        times = alternating({**steps, **streams}, device, budget, REPEATS if case.in_a_row else 1, tick)
        host = times if device.type == "cuda" else host_times(case, list(steps), model, average, budget / 4)
    ceiling = {name: spread([longer * t.device for t in times[name]]) for name in streams}
    best = min(streams, key=lambda name: ceiling[name]["median"], default=None)
    device_us = {name: spread([t.device for t in times[name]]) for name in steps}
    rows = []
    for name in steps:
        rows.append(
            {
                "case": case.title,
                "method": name,
                "tensors": about["tensors"],
                "elements": about["elements"],
                "dtypes": about["dtypes"],
                "bytes": size,
                "sets": count,
                "in_cache": in_cache(size, count, device),
                "device_us": device_us[name],
                "host_us": spread([t.host for t in host[name]]) if name in host else None,
                "host_warm_us": spread([t.warm for t in host[name]]) if name in host else None,
                "rounds": len(times[name]),
                "GBps": size / device_us[name]["median"] / 1e3,
                "share_of_ceiling": longer / ratio(times[name], times[best]) if best else None,
                "ratio": ratio(times[name], times[BOUND]) if BOUND in steps else None,
                "launches": counts[name],
                **facts[name],
            }
        )
    found = {name: {"us": each, "GBps": size / each["median"] / 1e3} for name, each in ceiling.items()}
    took = round(time.perf_counter() - begin, 1)
    return rows, {"case": case.title, "bytes": size, "streams": found, "took_s": took}, left_out


def host_times(
    case: Case, names: list[str], model: nn.Module, average: nn.Module, budget: float
) -> dict[str, list[Times]]:
    """The times of calls on tensors with one element each, on the CPU."""
    small = shrunk(model), shrunk(average)
    steps: dict[str, list[Step]] = {}
    for name in names:
        if name != COMPILED:  # it would compile again, for sizes that nobody has
            with suppress(Exception):  # a method that raises has no time
                steps[name] = prepared(partial(make_step, name), [small])
    return alternating(steps, torch.device("cpu"), budget, REPEATS if case.in_a_row else 1)


def show(rows: list[dict[str, Any]], ceiling: dict[str, Any], left_out: dict[str, str], cuda: bool) -> None:
    if not rows:
        return
    first = rows[0]
    title = f"{first['case']}: {first['tensors']} tensors, {first['elements'] / 1e6:.1f}M elements, "
    title += f"{first['bytes'] / 1e9:.3f} GB" + (f", {first['sets']} alternating sets" if first["sets"] > 1 else "")
    title += ", in the cache" if first["in_cache"] else ""
    heads = ["ms", "p20", "p80", "host µs", "warm", "GB/s", "of ceiling", "ratio", "error", "extra MB"]
    table = columns(title, "method", [*heads, "launches"] if cuda else heads)
    for row in rows:
        cells = [f"{row['device_us'][key] / 1e3:.3f}" for key in ("median", "p20", "p80")]
        cells[0] = ("*" if waits(row["launches"]) else "") + cells[0]
        cells += [f"{row[key]['median']:.0f}" if row[key] else "-" for key in ("host_us", "host_warm_us")]
        cells.append(f"{row['GBps']:.1f}")
        cells.append(f"{row['share_of_ceiling']:.0%}" if row["share_of_ceiling"] else "-")
        cells.append(f"{row['ratio']:.2f}" if row["ratio"] else "-")
        cells += [f"{row['max_err_over_bound']:.2f}"]
        cells.append("-" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 1e6:.1f}")
        if row["launches"]:
            cells.append(" + ".join(f"{n} {kind}" for kind, n in row["launches"].items() if n or kind == "kernels"))
        table.add_row(row["method"], *cells, style="bold" if row["method"] in OURS else None)
    for name, each in ceiling["streams"].items():
        spent = [f"{each['us'][key] / 1e3:.3f}" for key in ("median", "p20", "p80")]
        table.add_row(f"(ceiling: {name})", *spent, "", f"{each['GBps']:.1f}", style="dim")
    console.print(table)
    spans = [row["device_us"] for row in rows] + [each["us"] for each in ceiling["streams"].values()]
    if any(us["p80"] > 1.5 * us["p20"] for us in spans):
        console.print("UNSTEADY: some p80 is over 1.5 times p20. Ratios are taken within rounds, so trust them more.")
    for problem in dict.fromkeys(left_out.values()):
        names = (name for name, why in left_out.items() if why == problem)
        console.print(f"left out: {'; '.join(names)}\n    ({problem})", markup=False)
    console.print()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds of a few cases, about two minutes")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all, %(default)s")
    parser.add_argument("--cases", help="parts of cases' titles, separated by commas; default: all that fit")
    parser.add_argument("--methods", help="parts of methods' names, separated by commas; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, help="per case; default: 20, or 2 with --quick")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, after each case")
    parser.add_argument("--csv", type=Path, help="write `models` to this file, with the columns of export.py")
    arguments = parser.parse_args()
    device, parts = torch.device(arguments.device), [part.strip() for part in arguments.parts.split(",")]
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: expected a CUDA GPU, found none")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # events and graphs belong to the current one
    torch.set_num_threads(arguments.threads)
    budget = (2 if arguments.quick else 20) if arguments.seconds is None else arguments.seconds
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(unknown)}")
    names = method_names(device)
    if arguments.methods is not None:
        wanted = parts_of(arguments.methods, "--methods", names, parser)
        names = [name for name in names if name in wanted or name == BOUND]
    everywhere = [case for case in CASES if not (case.asked or (case.huge and device.type != "cuda"))]
    titles = [case.title for case in (CASES if arguments.cases else everywhere)]
    pattern = "GPT-2 small,ResNet,2000" if arguments.quick and arguments.cases is None else arguments.cases
    if pattern is not None:
        titles = parts_of(pattern, "--cases", titles, parser)
    cases = [case for case in CASES if case.title in titles]

    result: dict[str, Any] = {"env": environment(device), "ceiling": [], "rows": [], "left_out": {}}

    def save() -> None:
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            with arguments.csv.open("w", encoding="utf-8") as file:
                export.write(result, file)

    env = result["env"]
    console.print(
        f"{env['device']}, {env['cpu']}, {env['cores']} cores, {env['threads']} threads; torch {env['torch']}; "
        f"fused_ema {env['fused_ema']} {env['commit']}, backend {env['backend']!r}\n\n"
        "ms          time of one update: the median and the percentiles 20 and 80; on CUDA, the device's own time\n"
        "host µs     on the CPU, the same for tensors of one element each; on CUDA, the time until the call returns,\n"
        "            after other methods' calls; warm: right after a call of the same method\n"
        "GB/s        the bytes that an update has to move, per second, however many the method really moves\n"
        "of ceiling  the speed relative to a plain loop over the same memory, which checks nothing and skips the\n"
        "            buffers (on CUDA, to the best stream of as many bytes); the median over the rounds\n"
        "ratio       the time relative to fused_ema's bound handle; the median over the rounds\n"
        "error       the largest error of one step compared with float64; fused_ema's contract allows 1.00\n"
        "*           on CUDA, the method waits for the device or fills its queue, so some of the time is the host's\n"
        "extra MB    memory that one update needs beyond the averages and the model\n"
        "Managers also copy or average the buffers; the loops written by hand do not.\n"
    )
    library = compile_stream() if device.type == "cpu" else "it needs the CPU"
    if isinstance(library, str) and device.type == "cpu":
        console.print(f"no ceiling: {library}\n")
    failed = False
    with torch.no_grad():
        for case in cases if "models" in parts else ():
            try:
                rows, ceiling, left_out = measure(case, device, budget, library, names)
            except Exception as problem:  # a missing package, or too little memory
                console.print(f"left out: {case.title}\n    ({reason(problem)})\n", markup=False)
                result["left_out"][case.title] = reason(problem)
            else:
                result["rows"] += rows
                result["ceiling"].append(ceiling)
                result["left_out"][case.title] = left_out
                failed |= any(name in left_out for name in OURS)
                show(rows, ceiling, left_out, device.type == "cuda")
            save()
            free(device)
    others: dict[str, Callable[[], Any]] = {
        "scaling": lambda: bench_scaling.measure(device, budget / 4, names, library),
        "averages": lambda: bench_averages.measure(device, budget),
        "training": lambda: bench_training.measure(device, 2 * budget, names),
        "device": lambda: bench_device.measure(device, budget),
        "instructions": lambda: bench_instructions.measure(names),
    }
    for part, run in others.items():
        if part in parts and (part != "device" or device.type == "cuda"):
            try:
                result[part] = run()
            except Exception as problem:  # a missing package, or too little memory
                console.print(f"left out: {part}\n    ({reason(problem)})\n", markup=False)
                result["left_out"][part] = reason(problem)
            save()
            free(device)
    return int(failed)  # only our own methods' failures count


if __name__ == "__main__":
    sys.exit(main())
