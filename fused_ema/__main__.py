"""Shows what runs here and why; `build` compiles the extension for this torch, or its kernels; `merge` averages
checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import sys
from pathlib import Path

import torch

import fused_ema

from . import _cost
from ._build import cache, kernels, library, nvrtc, toolkit
from ._build.compile import PACKAGE, BuildError, Record, built_for
from ._build.switch import switch
from .merging import command as merge_command
from .runners import RUNNERS, choose
from .runners.slower import has_compiler, why_slower


def _described(record: Record) -> str:
    cuda = f"with CUDA {record['cuda']} for {record.get('archs')}" if record.get("cuda") else "without CUDA"
    return f"built for {built_for(record)}, {cuda}"


def _nvcc() -> str:
    found = toolkit.find_toolkit(torch)
    home = found.home if isinstance(found, toolkit.Toolkit) else toolkit.find_cuda_home()
    if home is None:
        return "not found"
    version = toolkit.nvcc_version(home)
    return f"{version[0]}.{version[1]} in {home}" if version else f"in {home}, but its --version failed"


def _gpus() -> list[str]:
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def _active(device_type: str) -> str:
    """The name of the runner that updates run on; none where FUSED_EMA_RUNNER asks for what can't be had."""
    try:
        return choose(device_type).name
    except (RuntimeError, ValueError):
        return "none"


def _runners(device_type: str, said: str | None = None, there: bool = True) -> list[str]:
    """A line for each runner: whether it is active on these devices, or why not.

    `said`: a reason that was given before. `there`: False without such a device, where a runner is ready at most.
    """
    active = _active(device_type) if there else None
    forced = os.environ.get("FUSED_EMA_RUNNER")
    lines = []
    for runner in RUNNERS:
        # Without a GPU, the driver is not missed.
        reason = nvrtc.why_not() if runner.name == "nvrtc" and not there else runner.why_not(device_type)
        if runner.name == active:
            state = "active"
        elif reason is None:
            first = f"FUSED_EMA_RUNNER={forced} asks for another" if forced else f"{active} comes first"
            state = f"ready, but {first}" if there else "ready"
        elif reason == said:
            state = "not active, for the same reason as on cpu"
        else:
            lacks = runner.name == "extension" and library.load() is None and not has_compiler()
            state = f"not active: {reason}{' (it needs a C++ compiler, and there is none here)' if lacks else ''}"
        lines.append(f"{runner.name:<10} {state}")
    return lines


def _table(device: str) -> tuple[list[str], str | None]:
    """What updates cost on the device, and a complaint if they are slow without a known reason."""
    try:
        cost = _cost.measure(torch.device(device))
    except (RuntimeError, ValueError) as error:
        return [f"{device} could not be measured: {str(error).splitlines()[0]}"], None
    (tensors, elements), (_, large) = _cost.MANY, _cost.LARGE
    active = _active(torch.device(device).type)
    gb = 12 * large / 1e9  # the average is read and written, the model read

    def row(name: str, many: str, one: str, speed: str) -> str:
        return f"  {name:<30}{many:>18}{one:>18}{speed:>16}"

    def measured(name: str, many: float | None, one: float) -> str:
        return row(name, f"{many * 1e6:,.0f} us" if many else "", f"{one * 1e3:,.2f} ms", f"{gb / one:,.1f} GB/s")

    lines = [
        row(f"float32 on {device}, now", f"{tensors} of {elements}", f"1 of {large / 1e6:.1f}M", ""),
        measured(f"fused_ema ({active})", *cost.fused),
        measured("torch._foreach_lerp_", *cost.foreach),
        measured("a.add_(b), the same bytes", None, cost.stream),
    ]
    if active == "foreach" or (cost.share > 0.7 and cost.fused[0] < cost.foreach[0]):
        return lines, None
    load = f" (load average {os.getloadavg()[0]:.1f} on {_cost.cores()} cores)" if hasattr(os, "getloadavg") else ""
    return lines, f"On {device} this measurement was slower than it should be; are other programs running there{load}?"


def _slower(device_type: str) -> str | None:
    """Why updates run as PyTorch's own operations, where something faster could be had, or don't run at all."""
    try:
        runner = choose(device_type)
    except (RuntimeError, ValueError) as error:
        return f"On {device_type}, no update runs: {error}"
    if runner.name != "foreach":
        return None
    forced = os.environ.get("FUSED_EMA_RUNNER")
    first = next(runner.name for runner in RUNNERS if runner.why_not(device_type) is None)
    if first != "foreach":
        reason: str | None = f"FUSED_EMA_RUNNER={forced} asks for that; unset it"
    elif device_type == "cpu" and switch("FUSED_EMA_EXT") is False and has_compiler():
        reason = library.why_not()
    elif device_type == "cuda" and switch("FUSED_EMA_CUDA") is False and torch.version.cuda:
        reason = toolkit.no_cuda_in(torch)
    else:
        reason = why_slower(device_type)
    return reason and f"On {device_type}, updates run as PyTorch's own operations: {reason}"


def _reasons() -> list[str]:
    """Why updates are slow here, as far as the installation can tell, where something better can be had."""
    gpus = _gpus()
    reasons = [reason for kind in ("cpu", "cuda")[: 1 + bool(gpus)] if (reason := _slower(kind))]
    threads, cores = torch.get_num_threads(), _cost.cores()
    if threads < cores:
        variable = os.environ.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS={variable}; torchrun sets it to 1" if variable else "see torch.set_num_threads"
        reasons.append(f"On the CPU, PyTorch uses {threads} of {cores} cores ({why})")
    archs = str(library.record().get("archs") or "")
    for gpu in gpus if _active("cuda") == "extension" else []:
        architecture = "{}.{}".format(*torch.cuda.get_device_capability(gpu))
        built = re.findall(r"\d+\.\d+", archs)  # of "8.0;9.0a 12.0+PTX"; names like "Hopper" say nothing
        if built and not any(_runs_on(each, architecture) for each in built):
            reasons.append(
                f"{gpu} has compute capability {architecture}, but the kernel was built for {archs}, so its first "
                f"launch is slow, or fails; {library.REBUILD}"
            )
    return reasons


def _runs_on(built: str, architecture: str) -> bool:
    """Machine code for 8.0 runs on 8.6 too, but not on 9.0."""
    (major, minor), (wanted, least) = (tuple(map(int, text.split("."))) for text in (built, architecture))
    return major == wanted and minor <= least


def info() -> int:
    lines = [
        ("fused_ema", f"{fused_ema.__version__} in {PACKAGE}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("python", platform.python_version()),
        ("nvcc", _nvcc()),
    ]
    if path := library.path():
        lines += [("extension", str(path)), ("", _described(library.record()))]
    threads = torch.get_num_threads()
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"
    lines.append(("on cpu", cpu))
    lines += [("", line) for line in _runners("cpu")]
    gpus = _gpus()
    if (reason := toolkit.no_cuda_in(torch)) and not gpus:
        lines.append(("on cuda", reason))
    else:
        names = ", ".join(f"{gpu} is {torch.cuda.get_device_name(gpu)}" for gpu in gpus)
        lines.append(("on cuda", names or "no GPU is visible; with one:"))
        lines += [("", line) for line in _runners("cuda", library.why_not(), there=bool(gpus))]
    for name, text in lines:
        print(f"{name:<10} {text}".rstrip())
    reasons = _reasons()
    for device in ["cpu", *gpus[:1]]:
        table, slow = _table(device)
        print("\n" + "\n".join(map(str.rstrip, table)))
        reasons += [slow] if slow else []
    limit = "" if has_compiler() or library.load() else " without a C++ compiler"
    fast = f"as fast here as they can be{limit}."
    print(f"\nUpdates are {'slower here than they could be:' if reasons else fast}")
    for reason in reasons:
        print(f"- {reason}")
    print("If they are slow in your program, see fused_ema.bind(ema, model).describe() and docs/faq.md.")
    return 0


def build(into: Path | None, force: bool) -> int:
    try:
        path, compiled = cache.build(into, force)
    except (BuildError, OSError, ValueError) as error:
        print(f"fused_ema: no extension was built: {error}", file=sys.stderr)
        return 1
    record = cache.read_record(path.parent) or {}
    print(f"{path}\n{'This was compiled now' if compiled else 'This is up to date'}: {_described(record)}.")
    if reason := record.get("cuda_why_not"):
        print(f"It has no CUDA kernel: {reason}.")
    return 0


def build_kernels(archs: list[str], into: Path | None, force: bool) -> int:
    """Compiles the kernels, which needs no GPU: they may be for another machine, or for a container image."""
    try:
        numbers = sorted({_number_of(arch) for each in archs for arch in re.split("[; ,]+", each) if arch})
        done = kernels.build(numbers or _archs_here(), into, force)
    except (BuildError, OSError, RuntimeError, ValueError) as error:
        advice = "; name another folder by --into, or set XDG_CACHE_HOME" if isinstance(error, OSError) else ""
        print(f"fused_ema: no kernels were built: {error}{advice}", file=sys.stderr)
        return 1
    for path, compiled in done:
        print(f"{path}{'' if compiled else ' (this is up to date)'}")
    looked_in = [PACKAGE]
    with contextlib.suppress(RuntimeError):  # no home folder
        looked_in.append(kernels.kernels_folder().resolve())
    if done[0][0].parent.resolve() not in looked_in:
        print(f"fused_ema looks for them in {' and in '.join(map(str, looked_in))}: put them there.")
    return 0


def _number_of(arch: str) -> int:
    """90 for "9.0"."""
    found = re.fullmatch(r"(\d+)\.(\d)", arch)
    if found is None:
        raise ValueError(f"--arch: expected compute capabilities, such as 9.0, found {arch!r}")
    number = int(found[1]) * 10 + int(found[2])
    if number < 70:
        raise ValueError(f"--arch: expected 7.0 or above, which the kernels need, found {arch}")
    return number


def _archs_here() -> list[int]:
    """Of the GPUs that are here."""
    found = sorted({_number_of("{}.{}".format(*torch.cuda.get_device_capability(gpu))) for gpu in _gpus()})
    if not found:
        raise ValueError("there is no GPU here to build for; name one, such as --arch 9.0")
    return found


def _about_build() -> str:
    more = ""
    if not toolkit.no_cuda_in(torch):
        more = f"Where a CUDA toolkit is found, it has the CUDA kernels too; to get one, {toolkit.how_to_get(torch)}. "
    return (
        "Compiles the extension for the torch that is installed; this needs setuptools and a C++ compiler. "
        f"{more}With --kernel, compiles the kernels that run on CUDA without the extension, ahead of their first use; "
        "this needs neither a compiler nor a GPU."
    )


def main() -> int:
    os.environ["FUSED_EMA_QUIET"] = "1"  # what is slow is said at the end
    parser = argparse.ArgumentParser(prog="python -m fused_ema", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_ema {fused_ema.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{build,merge}")
    command = commands.add_parser(
        "build", help="compile the extension, or the CUDA kernels", description=_about_build()
    )
    command.add_argument("--force", action="store_true", help="compile even if the extension is up to date")
    command.add_argument("--into", type=Path, metavar="DIR", help="put it into this folder instead of the user's cache")
    command.add_argument("--kernel", action="store_true", help="compile the CUDA kernels by NVRTC, not the extension")
    command.add_argument(
        "--arch",
        action="extend",
        nargs="+",
        default=[],
        metavar="9.0",
        help="for these GPUs, not for those that are here",
    )
    merge_command.add_to(commands)
    arguments = parser.parse_args()
    if arguments.command == "merge":
        return merge_command.run(arguments)
    if arguments.command != "build":
        return info()
    if arguments.kernel:
        return build_kernels(arguments.arch, arguments.into, arguments.force)
    if arguments.arch:
        parser.error("--arch goes with --kernel; the extension is built for TORCH_CUDA_ARCH_LIST")
    return build(arguments.into, arguments.force)


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as `| head` leaves it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again when it ends
        code = 1
    sys.exit(code)
