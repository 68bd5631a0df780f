"""What runs here and why; `python -m fused_ema build` compiles the extension for this torch."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

import fused_ema

from . import _build, _native, _toolkit


def _built_for(record: dict[str, object]) -> str:
    cuda = f"CUDA {record['cuda']} ({record['archs']})" if record.get("cuda") else "no CUDA"
    return f"built for torch {record.get('torch')}, {record.get('python')}, {cuda}"


def _nvcc() -> str:
    home = _toolkit.find_cuda_home()
    if home is None:
        return "not found"
    version = _toolkit.nvcc_version(home)
    return f"{version[0]}.{version[1]} in {home}" if version else f"in {home}, but its --version fails"


def info() -> int:
    lines = [
        ("fused_ema", fused_ema.__version__),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("python", platform.python_version()),
        ("nvcc", _nvcc()),
    ]
    if path := _native.path():
        lines += [("extension", str(path)), ("", _built_for(_native.record()))]
    else:
        lines.append(("extension", "none"))
    lines.append(("backend", f"cpu: {fused_ema.backend('cpu')}"))
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    lines += [("", f"{gpu} ({torch.cuda.get_device_name(gpu)}): {fused_ema.backend(gpu)}") for gpu in gpus]
    if not gpus:
        lines.append(("", "cuda: no GPU visible"))
    for name, text in lines:
        print(f"{name:<10} {text}".rstrip())
    if reason := _native.why_not():
        print(f"\nThe compiled CPU kernel is not active: {reason}")
    reason_cuda = _native.cuda_why_not()
    if reason_cuda and reason_cuda != reason:
        print(f"\nThe CUDA kernel is not active: {reason_cuda}")
    return 0


def build(into: Path | None, force: bool) -> int:
    try:
        path, compiled = _build.build(into, force)
    except (_build.BuildError, OSError, ValueError) as error:
        print(f"fused_ema: no extension was built: {error}", file=sys.stderr)
        return 1
    record = _build.read_record(path.parent) or {}
    print(f"{path}\n{'Compiled now' if compiled else 'It was there already'}: {_built_for(record)}.")
    if reason := record.get("cuda_why_not"):
        print(f"Without CUDA: {reason}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_ema", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{build}")
    command = commands.add_parser("build", help="compile the extension for the installed torch")
    command.add_argument("--force", action="store_true", help="even where it is there already")
    command.add_argument("--into", type=Path, metavar="DIR", help="another folder than the user's cache")
    arguments = parser.parse_args()
    return build(arguments.into, arguments.force) if arguments.command == "build" else info()


if __name__ == "__main__":
    sys.exit(main())
