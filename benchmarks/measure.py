"""Measures the methods: they alternate, so that each meets caches that others have used; medians and percentiles."""

from __future__ import annotations

import bisect
import ctypes
import gc
import importlib.metadata
import itertools
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from methods import DECAY, Step
from torch import Tensor, nn

import fused_ema

Pair: TypeAlias = tuple[nn.Module, nn.Module]  # model, averages
HERE = Path(__file__).resolve().parent
WARM_UP = 2  # rounds that do not count
ROUNDS = 9  # the least number of rounds that count
SETS = 256  # the most sets of tensors
MARK = "fused_ema: probe"  # begins the names of the profiler's ranges
KINDS = ("kernels", "copies", "syncs")
TOLERANCE = {torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2, torch.float16: 1e-3}  # relative, as in torch.testing
SCRATCH = 4 << 30  # the most bytes used to measure a CUDA device's ceiling


class Times(NamedTuple):
    """Seconds of one call. On the CPU all three are the same."""

    device: float
    host: float  # after other methods' calls, so that the host's caches hold little of what it reads
    warm: float  # repeated right after that call


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(step: Step, device: torch.device) -> float:
    """Seconds until the call returns, with nothing else running on the device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_seconds(step: Step, device: torch.device, host: float) -> float:
    """The device's own time. The device first sleeps for longer than the host needs for the call, so that it never
    waits for the host, unless the call itself waits for the device or launches more than the queue holds: see `waits`.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(min(2 * host + 20e-6, 0.1) * 2e9))  # cycles, at 2 GHz at most
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def alternating(
    steps: dict[str, list[Step]],
    device: torch.device,
    budget: float,
    repeats: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[Times]]:
    """Times the methods, alternating between methods and between each method's sets of tensors.

    Rounds continue for `budget` seconds, and for at least ROUNDS rounds. `repeats` is the number of calls in a row, of
    which the first does not count.
    """
    times: dict[str, list[Times]] = {name: [] for name in steps}
    order, shuffle, calls = list(steps), random.Random(0).shuffle, itertools.count()

    def next_step(name: str) -> Step:
        """Takes another set at each call of any method, so that no call finds its tensors in a cache."""
        return steps[name][next(calls) % len(steps[name])]

    def call(name: str) -> Times:
        step = next_step(name)
        host = host_seconds(step, device)
        if device.type != "cuda":
            return Times(host, host, host)
        warm = host_seconds(step, device)
        return Times(cuda_seconds(next_step(name), device, host), host, warm)

    end = time.perf_counter() + budget
    with _no_collection():
        for turn in itertools.count():
            if turn >= WARM_UP + ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                spent = [call(name) for _ in range(repeats)]
                if turn >= WARM_UP:
                    times[name] += spent[1:] or spent
            tick()
    return times


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prepared(make: Callable[[nn.Module, nn.Module], Step], sets: Sequence[Pair]) -> list[Step]:
    """The method's step for each set, called once so that it has planned, allocated and compiled."""
    steps = [make(*each) for each in sets]
    for step in steps:
        step()
    return steps


def reason(problem: Exception) -> str:
    """The problem in one line, for tables and files."""
    return f"{type(problem).__name__}: {problem}".partition("\n")[0][:300]


def spread(seconds: Sequence[float], scale: float = 1e6) -> dict[str, float]:
    """What is kept of a method's times, in microseconds. An outlier lies more than 1.5 times the range between the
    quartiles (IQR) beyond one of them."""
    cuts = statistics.quantiles(seconds, n=5)
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    reach = 1.5 * (third - first)
    found = {
        "median": statistics.median(seconds),
        "p20": cuts[0],
        "p80": cuts[3],
        "mean": statistics.mean(seconds),
        "std": statistics.stdev(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "iqr": third - first,
    }
    outliers = sum(not first - reach <= each <= third + reach for each in seconds)
    return {name: each * scale for name, each in found.items()} | {"outliers": outliers}


def ratio(times: Sequence[Times], others: Sequence[Times]) -> float:
    """The device's time relative to the others': the median over the rounds, since each round meets one state of the
    machine."""
    return statistics.median(one.device / other.device for one, other in zip(times, others, strict=True))


def last_level_cache(device: torch.device) -> int:
    """Its size in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = max(found, int(size.read_text().strip().removesuffix("K")) * 1024)
    return found or 32 << 20


def sets_for(size: int, device: torch.device) -> int:
    """The number of sets of `size` bytes that exceeds any cache, at most SETS: tiny ones may fit into a cache."""
    return max(1, min(SETS, math.ceil(2 * last_level_cache(device) / max(1, size))))


def in_cache(size: int, sets: int, device: torch.device) -> bool:
    """Whether the last-level cache may still hold some of a set when it is used again."""
    return size * sets < 2 * last_level_cache(device)


# ---- Errors, memory and launches of one call --------------------------------------------------------------


def error_over_bound(step: Step, model: nn.Module, ema: nn.Module) -> float:
    """The largest error of one step compared with float64, in units of the one-step bound:
    half an ulp of the result in the average's type + 2^-23 * min(weight, decay) * |parameter - average|.
    """
    return compared(step, model, ema)[0]


def compared(step: Step, model: nn.Module, ema: nn.Module) -> tuple[float, bool]:
    """That error, and whether the results match those in float64 by the tolerance that `torch.testing.assert_close`
    has for the average's type. In long tensors it checks about 65536 evenly spaced elements.
    """

    def sample(tensor: Tensor) -> Tensor:
        flat = tensor.detach().view(-1)
        return flat[:: max(1, len(flat) // 65536)].double()

    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    wanted = [exact_and_bound(sample(average), sample(new), DECAY, average.dtype) for average, new in pairs]
    step()
    worst, match = 0.0, True
    for (average, _), (exact, bound) in zip(pairs, wanted, strict=True):
        off = (sample(average) - exact).abs()
        worst = max(worst, (off / bound).max().item())
        match &= bool((off <= TOLERANCE[average.dtype] * exact.abs() + 1e-5).all())
    return worst, match


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of `dtype` at each value."""
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    return torch.exp2(torch.frexp(values).exponent.clamp(min=-125).double() - digits)


def exact_and_bound(old: Tensor, new: Tensor, decay: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The exact result of one step of an average in `dtype`, and the error it may have, both in float64."""
    exact = old + (1 - decay) * (new - old)
    return exact, ulp(exact, dtype) / 2 + 2**-23 * min(1 - decay, decay) * (new - old).abs()


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses what the profiler's own library writes to stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory that one call allocates beyond what was allocated before."""
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


def launches(steps: dict[str, Step], device: torch.device) -> dict[str, dict[str, int] | None]:
    """The kernels, copies and synchronisations of one call of each method on a CUDA device, as the profiler counts them
    (for a graph, those that a replay runs); None if the profiler counts nothing.

    All methods share one profile, because starting and ending a profile takes long.
    """
    if device.type != "cuda":
        return dict.fromkeys(steps)
    x = torch.zeros(1, device=device)
    probes: list[Step] = [lambda: None, lambda: x.add_(1).zero_(), *steps.values()]
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with _silent(), torch.profiler.profile(activities=activities) as profile:
        for number, probe in enumerate(probes):
            with torch.profiler.record_function(f"{MARK} {number}"):
                probe()
                torch.cuda.synchronize(device)
    around, known, *counts = counted(profile.events(), len(probes))
    if known["kernels"] + known["copies"] - around["kernels"] - around["copies"] != 2:
        return dict.fromkeys(steps)
    return {name: {kind: each[kind] - around[kind] for kind in KINDS} for name, each in zip(steps, counts, strict=True)}


def counted(events: Sequence[Any], probes: int) -> list[Counter[str]]:
    """Counts what ran within each range marked with the number of a probe. Each range ends with a synchronisation."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    marked = {event.name: event.time_range for event in on_host if event.name.startswith(MARK)}
    ranges = [marked[f"{MARK} {number}"] for number in range(probes)]
    counts: list[Counter[str]] = [Counter() for _ in ranges]
    starts = [each.start for each in ranges]
    for event in events:
        number = bisect.bisect_right(starts, event.time_range.start) - 1
        if getattr(event, "is_user_annotation", False) or number < 0 or event.time_range.start > ranges[number].end:
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[number]["copies" if event.name.startswith(("Memcpy", "Memset")) else "kernels"] += 1
        elif "Synchronize" in event.name:
            counts[number]["syncs"] += 1
    return counts


def waits(counts: dict[str, int] | None) -> bool:
    """Whether the device's time of such a call includes some of the host's: the queue holds about 1000 launches."""
    return counts is not None and (counts["syncs"] > 0 or counts["kernels"] + counts["copies"] > 1000)


# ---- The ceiling ---------------------------------------------------------------------------------


def ceilings(size: int, sets: Sequence[Pair], library: ctypes.CDLL | str) -> tuple[dict[str, list[Step]], float]:
    """Steps that show what the machine's memory allows, and the factor by which to multiply their times.

    On CUDA they stream `size` bytes, read and written, over plain arrays; for large updates they stream fewer bytes,
    hence the factor. On the CPU they are a plain loop over the same tensors.
    """
    device = next(sets[0][1].parameters()).device
    if device.type == "cuda":
        moved = min(size, SCRATCH)
        streams: dict[str, list[Step]] = {"a.add_(b)": [], "device copy": []}
        for _ in sets:
            a, b = torch.zeros(2, moved // 12, device=device)  # 8 bytes read, 4 written
            source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
            streams["a.add_(b)"].append(partial(a.add_, b))
            streams["device copy"].append(partial(target.copy_, source))
        return streams, size / moved
    if isinstance(library, str):
        return {}, 1.0
    return {"plain C++ loop": [_plain_loop(*each, library) for each in sets]}, 1.0


def _plain_loop(model: nn.Module, ema: nn.Module, library: ctypes.CDLL) -> Step:
    pairs = list(zip(ema.parameters(), model.parameters(), strict=True))
    kind = "_".join(str(side.dtype).removeprefix("torch.") for side in pairs[0])
    pointers = ctypes.c_void_p * len(pairs)
    averages, parameters = (pointers(*[side[k].data_ptr() for side in pairs]) for k in (0, 1))
    sizes = (ctypes.c_int64 * len(pairs))(*[average.numel() for average, _ in pairs])
    count, weight = ctypes.c_int64(len(pairs)), ctypes.c_float(1 - DECAY)
    function = library[kind]

    def step(keep: Any = pairs) -> None:
        function(averages, parameters, sizes, count, weight, ctypes.c_int(torch.get_num_threads()))

    return step


def compile_stream() -> ctypes.CDLL | str:
    """stream.cpp, built for this CPU, or the reason why it cannot be built."""
    compiler = os.environ.get("CXX") or "g++"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/stream.so"
        command = [*shlex.split(compiler), *flags, "stream.cpp", "-o", library]
        try:
            subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
            return ctypes.CDLL(library)
        except OSError as problem:
            return f"{problem}; set CXX to another compiler, or TMPDIR to a folder that allows executables"
        except subprocess.CalledProcessError as problem:
            return f"{compiler} failed: {problem.stderr.strip()}"


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


def _settings() -> list[str]:
    """The environment variables that choose how fused_ema runs, as a part of the command."""
    names = ("FUSED_EMA_EXT", "FUSED_EMA_CUDA", "FUSED_EMA_RUNNER")
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


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
        "commit": _first_line("git", "rev-parse", "--short=12", "HEAD") + (" with edits" if edited else ""),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "command": " ".join([*_settings(), shlex.join(["python", *sys.argv])]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
