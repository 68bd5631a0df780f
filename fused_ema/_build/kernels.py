"""Keeps what nvrtc.py compiles: one file for each operation and architecture, in the user's cache.

A file begins with a line of JSON that says what it was compiled from and has a digest of the image, which follows. It
is loaded only from a folder and a file that nobody else can write, or from the package itself, where
`python -m fused_ema build --kernel --into` may have put it. Whatever does not fit is compiled again and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from .cache import cache_root, distrust, locked, make_trusted
from .compile import PACKAGE, BuildError, Record, say
from .nvrtc import OPS, Compiler, Image, kernel_digest, nvrtc

_images: dict[tuple[str, int], Image] = {}  # of this process, for its further GPUs
_said_not_kept = False


def kernels_folder() -> Path:
    return cache_root() / "kernels"


def image(op: str, arch: int) -> Image:
    """The kernel of an operation for an architecture (90 is sm_90), compiled where it has to be.

    One thread at a time may call this. Raises BuildError.
    """
    if (op, arch) not in _images:
        _images[op, arch] = _find(nvrtc(), op, arch)
    return _images[op, arch]


def build(archs: Iterable[int], into: Path | None = None, force: bool = False) -> list[tuple[Path, bool]]:
    """Compiles all operations into a folder, by default the user's cache, for GPUs that need not be here.

    Returns each file, and whether it was compiled now instead of found there. Raises BuildError.
    """
    compiler, folder, done = nvrtc(), into or kernels_folder(), []
    if into is None:
        make_trusted(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for arch in archs:
        for op in OPS:
            record = _record(compiler, op, arch)
            path = folder / _file_name(record)
            missing = partial(_missing, path, record, force, cached=into is None)
            compiled = False
            if missing():  # else the folder may be read-only
                with locked(folder):
                    compiled = missing()  # another process may have compiled it
                    if compiled:
                        _write(path, record, _compile(compiler, op, arch, folder))
            done.append((path, compiled))
    return done


def _missing(path: Path, record: Record, force: bool, cached: bool) -> bool:
    return force or not isinstance(_read(path, record, cached), Image)


def _find(compiler: Compiler, op: str, arch: int) -> Image:
    record = _record(compiler, op, arch)
    name = _file_name(record)
    with contextlib.suppress(OSError):
        found = _read(PACKAGE / name, record)
        if isinstance(found, Image):
            return found
    with contextlib.ExitStack() as stack:
        try:
            path = kernels_folder() / name
            make_trusted(path.parent)
            found = _read(path, record, cached=True)
            if not isinstance(found, Image):  # another process may be compiling it; a folder of images may be read-only
                stack.enter_context(locked(path.parent))
                found = _read(path, record, cached=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home, or no trust in the folder
            _say_not_kept(error)
            return _compile(compiler, op, arch, None)
        if isinstance(found, Image):
            return found
        if found:
            say(f"the CUDA kernel {op!r} is compiled again, because {found}")
        compiled = _compile(compiler, op, arch, path.parent)
        try:
            _write(path, record, compiled)
        except OSError as error:
            _say_not_kept(error)
        return compiled


def _compile(compiler: Compiler, op: str, arch: int, folder: Path | None) -> Image:
    kept = f"keeping it in {folder}" if folder else "for this process alone"
    say(f"compiling the CUDA kernel {op!r} for sm_{arch} with NVRTC {compiler.version}, {kept}")
    return compiler.compile(op, arch)


def _say_not_kept(error: Exception) -> None:
    global _said_not_kept
    if not _said_not_kept:
        _said_not_kept = True
        advice = "" if isinstance(error, BuildError) else "; set XDG_CACHE_HOME to a folder of your own"
        say(f"every process has to compile the CUDA kernels, because they can't be kept: {error}{advice}")


# ---- Files ---------------------------------------------------------------------------------------


def _record(compiler: Compiler, op: str, arch: int) -> Record:
    return {"op": op, "arch": arch, "nvrtc": compiler.version, "sources": kernel_digest()}


def _file_name(record: Record) -> str:
    return "kernel-{op}-sm_{arch}-nvrtc_{nvrtc}-{sources}.bin".format(**record)


def _write(path: Path, record: Record, image: Image) -> None:
    """A reader sees the whole file or none."""
    whole = {**record, "kernel": image.kernel, "sha256": hashlib.sha256(image.code).hexdigest()}
    with tempfile.TemporaryDirectory(prefix=".fused_ema-", dir=path.parent) as staging:
        file = Path(staging) / path.name
        file.write_bytes(json.dumps(whole).encode() + b"\n" + image.code)
        file.chmod(0o644)  # whatever the umask: nobody else may write it
        os.replace(file, path)


def _read(path: Path, record: Record, cached: bool = False) -> Image | str | None:
    """The image in a file, why it can't be used, or None where there is no file. `cached`: nobody else may write it."""
    if not path.exists():
        return None
    if cached and (reason := distrust(path)):
        return reason
    line, _, code = path.read_bytes().partition(b"\n")
    try:
        found = json.loads(line)
        kernel = str(found.pop("kernel"))
        whole = found.pop("sha256") == hashlib.sha256(code).hexdigest() and found == record
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    return Image(kernel, code) if whole else f"{path} is damaged"
