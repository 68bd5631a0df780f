"""How the methods are measured: in turns, with caches that others have used meanwhile; medians and percentiles."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from methods import DECAY, Step
from torch import Tensor, nn

import fused_ema

HERE = Path(__file__).resolve().parent
WARM_UP = 2  # rounds


class Times(NamedTuple):
    """Seconds of one call. On the CPU the two are the same."""

    device: float
    host: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Step, device: torch.device, asleep: float = 0.0) -> Times:
    """`asleep`: seconds for which a CUDA device is kept busy first, so that its own time holds no wait for the host."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        return Times(seconds, seconds)
    events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(asleep * 2e9) + 1)  # cycles, of at most 2 GHz
    events[0].record()
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    events[1].record()
    events[1].synchronize()
    return Times(events[0].elapsed_time(events[1]) / 1e3, host)


def in_turns(
    steps: dict[str, Sequence[Step]],
    device: torch.device,
    budget: float,
    repeats: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[Times]]:
    """Times of each method, whose steps for several sets of tensors take turns too.

    Rounds go on for `budget` seconds, 5 at least. `repeats`: calls in a row, of which the first does not count.
    """
    for each in steps.values():
        for step in each:  # plans, allocations, compilation
            step()
    times: dict[str, list[Times]] = {name: [] for name in steps}
    asleep = dict.fromkeys(steps, 0.0)
    order, shuffle = list(steps), random.Random(0).shuffle
    end = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    turn = calls = 0
    while time.perf_counter() < end or turn < WARM_UP + 5:
        shuffle(order)
        for name in order:
            step = steps[name][calls % len(steps[name])]  # the next set at each call: none is what the last one left
            calls += 1
            spent = [timed(step, device, asleep[name]) for _ in range(repeats)]
            asleep[name] = min(2 * spent[-1].host + 20e-6, 0.05)  # a call that waits for the device would double it
            times[name] += spent[1:] or spent
        turn += 1
        tick()
    gc.enable()
    dropped = WARM_UP * max(1, repeats - 1)
    return {name: values[dropped:] for name, values in times.items()}


def spread(seconds: Sequence[float], scale: float = 1e6) -> dict[str, float]:
    """Median and the percentiles 20 and 80, in microseconds."""
    cuts = statistics.quantiles(seconds, n=5)
    return {"median": statistics.median(seconds) * scale, "p20": cuts[0] * scale, "p80": cuts[3] * scale}


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = max(found, int(size.read_text().strip().removesuffix("K")) * 1024)
    return found or 32 << 20


def sets_for(size: int, device: torch.device) -> int:
    """How many sets of tensors, of `size` bytes each, no cache holds."""
    return max(1, min(32, math.ceil(2 * last_level_cache(device) / max(1, size))))


# ---- What else is known of one call --------------------------------------------------------------


def error_over_bound(step: Step, model: nn.Module, ema: nn.Module) -> float:
    """The largest error of one step against float64, in units of the one-step bound:
    half an ulp of the result in the average's type + 2^-23 * min(weight, decay) * |parameter - average|.

    Of long tensors, some 65536 elements are looked at, evenly spaced.
    """

    def sample(tensor: Tensor) -> Tensor:
        flat = tensor.detach().view(-1)
        return flat[:: max(1, len(flat) // 65536)].double()

    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    expected, bounds = [], []
    for average, parameter in pairs:
        old, new = sample(average), sample(parameter)
        exact = old + (1 - DECAY) * (new - old)
        digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[average.dtype]
        ulp = torch.exp2(torch.frexp(exact).exponent.clamp(min=-125).double() - digits)
        expected.append(exact)
        bounds.append(ulp / 2 + 2**-23 * min(1 - DECAY, DECAY) * (new - old).abs())
    step()
    triples = zip(pairs, expected, bounds, strict=True)
    return max(((sample(pair[0]) - exact).abs() / bound).max().item() for pair, exact, bound in triples)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's own library writes to stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory that one call holds beyond what there was before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(step: Step, device: torch.device) -> dict[str, int] | None:
    """Kernels, copies and waits of one call on a CUDA device, as the profiler counts them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with _silent(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    counts = {"kernels": 0, "copies": 0, "syncs": -1}  # the one above
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts["copies" if event.name.startswith(("Memcpy", "Memset")) else "kernels"] += 1
        elif "Synchronize" in event.name:
            counts["syncs"] += 1
    return counts


# ---- The ceiling ---------------------------------------------------------------------------------


def ceilings(size: int, model: nn.Module, ema: nn.Module, library: ctypes.CDLL | str) -> dict[str, Step]:
    """What this machine's memory gives such a pattern: on CUDA, streams of `size` bytes, read and written, over plain
    arrays; on the CPU, a plain loop over the very tensors.
    """
    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    first = pairs[0][0]
    if first.is_cuda:
        n = size // 12
        a, b, c = (torch.randn(n, device=first.device) for _ in range(3))
        source, target = torch.zeros(2, size // 2, dtype=torch.uint8, device=first.device)
        return {"torch.add(a, b, out=c)": lambda: torch.add(a, b, out=c), "device copy": lambda: target.copy_(source)}
    if isinstance(library, str):
        return {}
    kind = "_".join(str(side.dtype).removeprefix("torch.") for side in pairs[0])
    pointers = ctypes.c_void_p * len(pairs)
    averages, parameters = (pointers(*[side[k].data_ptr() for side in pairs]) for k in (0, 1))
    sizes = (ctypes.c_int64 * len(pairs))(*[average.numel() for average, _ in pairs])
    count, weight = ctypes.c_int64(len(pairs)), ctypes.c_float(1 - DECAY)
    function = library[kind]

    def step(keep: Any = pairs) -> None:
        function(averages, parameters, sizes, count, weight, ctypes.c_int(torch.get_num_threads()))

    return {"plain C++ loop": step}


def compile_stream() -> ctypes.CDLL | str:
    """stream.cpp, built for this very CPU, or why not."""
    compiler = os.environ.get("CXX") or "g++"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stream.so"
        command = [*shlex.split(compiler), *flags, "stream.cpp", "-o", library]
        try:
            subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            return f"no compiler {compiler!r} here; set CXX to another"
        except subprocess.CalledProcessError as problem:
            return f"{compiler} failed: {problem.stderr.strip()}"
        return ctypes.CDLL(library)


# ---- The machine ---------------------------------------------------------------------------------


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    edited = _first_line("git", "status", "--porcelain", "--untracked-files=no")
    cuda = device.type == "cuda"
    packages = ("timm", "ema-pytorch", "torch-ema", "diffusers", "transformers", "lightning", "apex", "triton")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in packages if (version := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "fused_ema": fused_ema.__version__,
        "backend": fused_ema.backend(device),
        "commit": _first_line("git", "rev-parse", "--short=12", "HEAD") + (" and edits" if edited else ""),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
