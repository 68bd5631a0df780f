"""Times variants of the kernel on a GPU, alternately in one run: threads, unroll, tile, residency, cache hints.

    python benchmarks/bench_sweep.py [--compile] [--variants PARTS] [--cases PARTS] [--seconds S] [--json FILE]

A variant is csrc/ema_cuda.cu compiled with other parameters (csrc/tiles.h, csrc/vectors.h). Each is compiled once, into
build/sweep; --compile stops there, and needs no GPU. A variant whose result differs from fused_ema's by one bit is left
out.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import HERE, alternating, ceilings, environment, prepared, ratio, reason, sets_for, spread
from methods import DECAY, FOREACH_CACHED, Step, make_step
from models import CASES, Case, filled_pair
from report import AS_BUILT, columns, console, parts_of, progress

import fused_ema
from fused_ema._build.toolkit import find_cuda_home

FOLDER = HERE.parent / "build" / "sweep"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum Type
DEFAULT_CASES = "1 tensor of 500M,GPT-2 XL,Llama 1.1B,GPT-2 small,Stable,ResNet-50,2000 tensors"


def shape(**values: int) -> dict[str, str]:
    """Macros of csrc/tiles.h; the others keep the values they have there."""
    return {f"FUSED_EMA_{name.upper()}": str(value) for name, value in values.items()}


def hints(average: str = "plain", model: str = "__ldg", store: str | None = None) -> dict[str, str]:
    """Macros of sweep.cu; the values are functions of CUDA or of sweep.cu."""
    return {"SWEEP_LOAD": average, "SWEEP_MODEL": model} | ({"SWEEP_STORE": store} if store else {})


def variants() -> dict[str, dict[str, str]]:
    """The macros of each variant, by its name."""
    found = {}
    for threads in (32, 64, 96, 128, 256):
        for unroll, steps in ((1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (4, 1), (4, 2)):
            found[f"{threads} threads, unroll {unroll}, {steps} steps"] = shape(
                threads=threads, unroll=unroll, steps=steps
            )
    for resident in (768, 1280, 1536, 2048):
        found[f"{resident} threads resident"] = shape(resident=resident)
    return found | {
        "average __ldcs": hints("__ldcs"),
        "both __ldcs, __stcs": hints("__ldcs", "__ldcs", "__stcs"),
        "both no_allocate, __stcs": hints("no_allocate", "no_allocate", "__stcs"),
        "model no_allocate": hints(model="no_allocate"),
        "model plain": hints(model="plain"),
        "__stcs": hints(store="__stcs"),
    }


def compiled(macros: dict[str, str]) -> Path:
    """The library of a variant, compiled unless build/sweep has it; for compute capability 9.0 if there is no GPU."""
    home = find_cuda_home()
    assert home, "no CUDA toolkit"
    arch = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "90"
    flags = [
        "-O3",
        "-std=c++17",
        "-fmad=false",
        "--expt-relaxed-constexpr",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    flags += ["-shared", "-cudart=shared", "-Xcompiler=-fPIC"] + [f"-D{name}={value}" for name, value in macros.items()]
    digest = hashlib.sha256(repr(flags).encode())
    folder = HERE.parent / "csrc"
    for source in (HERE / "sweep.cu", folder / "ema_cuda.cu", *sorted(folder.glob("*.h"))):
        digest.update(source.read_bytes())
    library = FOLDER / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partly = library.with_suffix(f".{os.getpid()}")
        command = [str(home / "bin" / "nvcc"), *flags, str(HERE / "sweep.cu"), "-o", str(partly)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        partly.rename(library)
    return library


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.make_plan.restype = ctypes.c_void_p
    library.update.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p)
    library.free_plan.argtypes = (ctypes.c_void_p,)
    return library


def step_of(library: ctypes.CDLL, plans: list[ctypes.c_void_p], model: Any, average: Any) -> Step:
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    pointers = ctypes.c_void_p * len(pairs)
    ema, new = (pointers(*[side[k].data_ptr() for side in pairs]) for k in (0, 1))
    numel = (ctypes.c_int64 * len(pairs))(*[side[0].numel() for side in pairs])
    types = [ctypes.c_int(TYPES[side.dtype]) for side in pairs[0]]
    plan = ctypes.c_void_p(library.make_plan(ctypes.c_int64(len(pairs)), ema, new, numel, *types))
    if not plan:
        raise MemoryError("no memory for a plan")
    plans.append(plan)

    def step(keep: Any = pairs) -> None:
        if error := library.update(plan, DECAY, torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(f"CUDA error {error}")

    return step


@torch.no_grad()
def measure(case: Case, device: torch.device, budget: float, libraries: dict[str, ctypes.CDLL]) -> dict[str, Any]:
    model, average = filled_pair(case, device)
    size = fused_ema.bind(average, model).describe()["bytes_per_update"]
    sets = [(model, average), *(filled_pair(case, device) for _ in range(1, sets_for(size, device)))]
    streams, longer = ceilings(size, sets, "")
    steps = {AS_BUILT: prepared(partial(make_step, "fused_ema.bind"), sets)}
    if case.model_dtype == case.average_dtype:
        steps[FOREACH_CACHED] = prepared(partial(make_step, FOREACH_CACHED), sets)
    before = [parameter.clone() for parameter in average.parameters()]
    steps[AS_BUILT][0]()
    wanted = [parameter.clone() for parameter in average.parameters()]
    plans: dict[str, list[ctypes.c_void_p]] = {name: [] for name in libraries}
    left_out = {}
    for name, library in libraries.items():
        try:
            made = [step_of(library, plans[name], *each) for each in sets]
            torch._foreach_copy_(list(average.parameters()), before)
            made[0]()
            if not all(map(torch.equal, average.parameters(), wanted)):
                raise ArithmeticError("its values differ from fused_ema's")
            steps[name] = made
        except Exception as problem:
            left_out[name] = reason(problem)
    del before, wanted
    with progress(case.title, budget) as tick:
        times = alternating({**steps, **streams}, device, budget, tick=tick)
    for name, library in libraries.items():
        for plan in plans[name]:
            library.free_plan(plan)
    best = min(streams, key=lambda name: spread([t.device for t in times[name]])["median"])
    rows = {}
    for name, spent in times.items():
        us = spread([t.device * (longer if name in streams else 1) for t in spent])
        to_ceiling = longer / ratio(spent, times[best]) if name not in streams else None
        rows[name] = {"us": us, "GBps": size / us["median"] / 1e3, "share_of_ceiling": to_ceiling}
        if name in libraries:
            rows[name] |= {"registers": libraries[name].registers(), "local_bytes": libraries[name].local_bytes()}
    title = f"{case.title}: {size / 1e9:.3f} GB, {len(sets)} sets, {len(times[AS_BUILT])} rounds"
    table = columns(title, "variant", ["µs", "p20", "p80", "GB/s", "of ceiling", "registers"])
    for name, row in sorted(rows.items(), key=lambda item: item[1]["us"]["median"]):
        cells = [f"{row['us'][key]:.1f}" for key in ("median", "p20", "p80")] + [f"{row['GBps']:.0f}"]
        cells.append(f"{row['share_of_ceiling']:.1%}" if row["share_of_ceiling"] else "-")
        table.add_row(name, *cells, str(row.get("registers", "")), style="bold" if name == AS_BUILT else None)
    console.print(table)
    if left_out:
        console.print(f"left out: {left_out}", markup=False)
    return {"case": case.title, "bytes": size, "sets": len(sets), "variants": rows, "left_out": left_out}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile", action="store_true", help="only compile what build/sweep lacks")
    parser.add_argument("--variants", help="parts of variants' names, separated by semicolons; default: all")
    parser.add_argument(
        "--cases", default=DEFAULT_CASES, help="parts of cases' titles, separated by commas; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=6, help="per case; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, after each case")
    arguments = parser.parse_args()
    known, titles = variants(), [case.title for case in CASES if not case.in_a_row]
    names = parts_of(arguments.variants, "--variants", list(known), parser, ";") if arguments.variants else list(known)
    chosen = {name: known[name] for name in names}
    cases = parts_of(arguments.cases, "--cases", titles, parser)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = dict(zip(chosen, pool.map(compiled, chosen.values()), strict=True))
    if arguments.compile:
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)  # loads the CUDA runtime that the libraries share
    libraries = {name: load(path) for name, path in paths.items()}
    result: dict[str, Any] = {"env": environment(device), "macros": chosen, "cases": []}
    for case in CASES:
        if case.title in cases and not case.in_a_row:
            try:
                result["cases"].append(measure(case, device, arguments.seconds, libraries))
            except Exception as problem:  # a missing package, or too little memory
                console.print(f"left out: {case.title} ({reason(problem)})", markup=False)
            torch.cuda.empty_cache()
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(not result["cases"] or any(case["left_out"] for case in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
