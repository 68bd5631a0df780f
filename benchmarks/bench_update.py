"""Measures one update of all averages against what is in use today, in one run.

    python benchmarks/bench_update.py [--quick] [--device cuda] [--json FILE]

All methods work on the same tensors, in turns and in shuffled order, so that whatever else the machine does meets
all of them; the medians are compared. In most cases a turn is one call, which finds in the caches what the other
methods left there, as in a training loop; where the case says so it is several in a row, as in a timing
loop. Each method's result is first checked against float64.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from methods import (
    AVERAGED,
    BOUND,
    CASES,
    DECAY,
    FOREACH,
    FOREACH_CACHED,
    GPT2,
    GPT2_BF16,
    MANY,
    MANY_REPEATED,
    MUL_ADD,
    STREAM,
    UPDATE,
    Case,
    Method,
    compile_stream,
    filled,
    methods,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fused_ema

HERE = Path(__file__).resolve().parent

console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)


# ---- Measuring -----------------------------------------------------------------------------------


def error(method: Method) -> float | None:
    """The largest error of one step, against float64, in units of the one-step bound:
    half an ulp of the result + 2^-23 * min(weight, decay) * |parameter - average|.

    Of long tensors, some 65536 elements are looked at, evenly spaced.
    """
    if method.pairs is None:
        method.step()
        return None

    def sample(tensor: Tensor) -> Tensor:
        flat = tensor.detach().view(-1)
        return flat[:: max(1, len(flat) // 65536)].double()

    expected, bounds = [], []
    for average, parameter in method.pairs:
        old, new = sample(average), sample(parameter)
        exact = old + (1 - DECAY) * (new - old)
        ulp = torch.exp2(torch.frexp(exact).exponent.clamp(min=-125).double() - 24)
        expected.append(exact)
        bounds.append(ulp / 2 + 2**-23 * min(1 - DECAY, DECAY) * (new - old).abs())
    method.step()
    triples = zip(method.pairs, expected, bounds, strict=True)
    return max(((sample(pair[0]) - exact).abs() / bound).max().item() for pair, exact, bound in triples)


def seconds(step: Callable[[], None], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    events[0].record()
    step()  # an idle device waits for the host: launches are part of the time
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def rounds(steps: dict[str, Callable[[], None]], cuda: bool, budget: float, repeats: int = 1) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        shuffle(order)
        for name in order:
            in_a_row = [seconds(steps[name], cuda) for _ in range(repeats)]
            times[name] += in_a_row[1:] or in_a_row
    gc.enable()
    return {name: values[2:] for name, values in times.items()}  # without the warm-up


def measure(case: Case, device: torch.device, budget: float, library: ctypes.CDLL | str) -> dict[str, Any]:
    model = filled(case.build, case.dtype, device)
    ema = filled(case.build, torch.float32, device).requires_grad_(False)
    about = fused_ema.bind(ema, model).describe()
    result: dict[str, Any] = {"case": case.name, **about, "methods": {}, "left_out": {}}
    steps, errors = {}, {}
    for name, method in methods(ema, model, library).items():
        try:
            errors[name] = error(method)
            steps[name] = method.step
        except (RuntimeError, TypeError, ValueError) as problem:
            result["left_out"][name] = f"it raises {type(problem).__name__}: {problem}".partition("\n")[0]
    if isinstance(library, str):
        result["left_out"][STREAM] = library
    times = rounds(steps, device.type == "cuda", budget, case.repeats)
    reference = statistics.median(times[BOUND])
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5)
        median = statistics.median(values)
        result["methods"][name] = {
            "median_s": median,
            "p20_s": cuts[0],
            "p80_s": cuts[3],
            "rounds": len(values),
            "gb_per_s": about["bytes_per_update"] / median / 1e9,
            "ratio": median / reference,
            "max_error_in_bounds": errors[name],
        }
    result["unreliable"] = any(row["p80_s"] > 2 * row["p20_s"] for row in result["methods"].values())
    return result


# ---- Reporting -----------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    millions, gigabytes = result["elements"] / 1e6, result["bytes_per_update"] / 1e9
    title = f"{result['case']}: {result['tensors']} tensors, {millions:.1f}M elements, {gigabytes:.3f} GB"
    table = Table("method", title=title, title_justify="left", title_style="bold")
    for column in ("median ms", "p20", "p80", "GB/s", "ratio", "error"):
        table.add_column(column, justify="right")
    for name, row in result["methods"].items():
        times = [f"{row[key] * 1e3:.3f}" for key in ("median_s", "p20_s", "p80_s")]
        worst = row["max_error_in_bounds"]
        cells = (f"{row['gb_per_s']:.1f}", f"{row['ratio']:.2f}", "-" if worst is None else f"{worst:.2f}")
        table.add_row(name, *times, *cells, style="bold" if name == BOUND else None)
    console.print(table)
    if result["unreliable"]:
        console.print("UNRELIABLE: p80 far above p20, so something else ran too. Run it on a quiet machine.")
    for reason in dict.fromkeys(result["left_out"].values()):
        names = (name for name, why in result["left_out"].items() if why == reason)
        console.print(f"left out: {'; '.join(names)}\n    ({reason})", markup=False)
    console.print()


class Target(NamedTuple):
    what: str
    case: str
    slower: str
    faster: str
    wanted: float


TARGETS = (
    Target("124M parameters: update, against _foreach_lerp_ on cached lists", GPT2, FOREACH_CACHED, UPDATE, 1.15),
    Target("the same, against a plain C++ loop", GPT2, STREAM, UPDATE, 0.95),
    Target("float32 average of bfloat16: update, against a plain C++ loop", GPT2_BF16, STREAM, UPDATE, 0.95),
    Target("the same, against mul_, add_ on cached lists", GPT2_BF16, MUL_ADD, UPDATE, 2.5),
    Target("2000 tensors: update, against _foreach_lerp_, lists at each call", MANY, FOREACH, UPDATE, 8),
    Target("the same, against AveragedModel", MANY, AVERAGED, UPDATE, 25),
    Target("2000 tensors: bound, against _foreach_lerp_, lists at each call", MANY, FOREACH, BOUND, 15),
    Target(
        "called again and again: update, against _foreach_lerp_, lists at each call", MANY_REPEATED, FOREACH, UPDATE, 8
    ),
    Target("the same, against AveragedModel", MANY_REPEATED, AVERAGED, UPDATE, 25),
    Target("the same: bound, against _foreach_lerp_, lists at each call", MANY_REPEATED, FOREACH, BOUND, 15),
)


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = {result["case"]: result["methods"] for result in results}
    verdicts = []
    table = Table("target on the CPU: how many times as fast", title="Targets", title_justify="left")
    for column in ("wanted", "measured", ""):
        table.add_column(column, justify="right")
    for target in TARGETS:
        rows = times.get(target.case, {})
        if target.slower not in rows or target.faster not in rows:
            table.add_row(target.what, f"{target.wanted:.2f}", "-", "not measured")
            continue
        measured = rows[target.slower]["median_s"] / rows[target.faster]["median_s"]
        met = measured >= target.wanted
        verdicts.append({**target._asdict(), "measured": measured, "met": met})
        table.add_row(target.what, f"{target.wanted:.2f}", f"{measured:.2f}", "met" if met else "NOT MET")
    if any(result["unreliable"] for result in results):
        table.caption = "UNRELIABLE: the machine was busy, see above"
    console.print(table)
    return verdicts


def first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    edited = first_line("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "fused_ema": fused_ema.__version__,
        "backend": fused_ema.backend(device),
        "commit": first_line("git", "rev-parse", "--short=12", "HEAD") + (" and edits" if edited else ""),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds only, under a minute")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--seconds", type=float, help="per case (default: 45, or 3 with --quick)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    budget = arguments.seconds or (3 if arguments.quick else 45)

    about = machine(device)
    console.print(
        f"{about['device']}, {about['cpu']}, {about['cores']} cores, {about['threads']} threads; "
        f"torch {about['torch']}; fused_ema {about['fused_ema']} {about['commit']}, backend {about['backend']!r}\n\n"
        "GB/s   of the bytes that an update has to move, however many the method moves\n"
        "ratio  of the median to that of fused_ema's bound handle\n"
        "error  of one step, the largest, against float64: 1.00 is all that fused_ema's contract allows\n"
        "AveragedModel and fused_ema copy the buffers too; the other methods leave them.\n"
    )
    library = compile_stream() if device.type == "cpu" else "it runs on the CPU"
    results = []
    with torch.no_grad():
        for case in CASES:
            results.append(measure(case, device, budget, library))
            show(results[-1])
    verdicts = judge(results) if device.type == "cpu" else []
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": about, "decay": DECAY, "cases": results, "targets": verdicts}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
