"""Compiles csrc's kernels with NVRTC, the compiler in every CUDA build of PyTorch: no nvcc, no headers, no C++ compiler.

It compiles one operation for one architecture at a time. kernels.py keeps what it makes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .compile import BuildError, source_folder
from .toolkit import no_cuda_in

OPS = ("update", "copy", "swap", "restore", "update_stochastic")  # of `enum class Op` in csrc/types.h
OPTIONS = ("-std=c++17", "-fmad=false")  # as nvcc_flags() in compile.py; line numbers would triple the image
PROGRAM = '#include "nvrtc.h"\n#include "kernel.h"\n'
STAND_INS = ("cstdint", "cstring", "type_traits", "cuda_fp16.h", "cuda_bf16.h")  # empty: nvrtc.h has what they declare


class Image(NamedTuple):
    kernel: str  # its name in the code
    code: bytes  # a cubin, or the text of PTX


class Compiler:
    """One libnvrtc. Raises BuildError with its own words where a call fails."""

    def __init__(self, library: str | Path) -> None:
        try:
            self._library: Any = ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"{library} can't be loaded ({error})") from None
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.archs = sorted(archs)

    def target(self, arch: int) -> str:
        """What it compiles for a GPU: machine code where it knows the GPU, else PTX that the driver translates."""
        older = [known for known in self.archs if known <= arch]
        if not older:
            raise BuildError(
                f"NVRTC {self.version} knows no GPU older than sm_{self.archs[0]}, and this one is sm_{arch}; install "
                "a PyTorch that was built with an older CUDA"
            )
        return f"sm_{arch}" if older[-1] == arch else f"compute_{older[-1]}"

    def compile(self, op: str, arch: int) -> Image:
        target = self.target(arch)
        headers = {**dict.fromkeys(STAND_INS, b""), **{path.name: path.read_bytes() for path in headers_of_kernel()}}
        names, texts = _strings([name.encode() for name in headers]), _strings(list(headers.values()))
        options = [f"--gpu-architecture={target}".encode(), *(option.encode() for option in OPTIONS)]
        wanted, lowered = f"fused_ema::ema_kernel<fused_ema::Op::{op}>".encode(), ctypes.c_char_p()
        program = ctypes.c_void_p()
        source = PROGRAM.encode(), b"fused_ema.cu"
        self._call("nvrtcCreateProgram", ctypes.byref(program), *source, len(headers), texts, names)
        try:
            self._call("nvrtcAddNameExpression", program, wanted)
            failed = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            if failed:
                log = self._output("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
                raise BuildError(
                    f"NVRTC {self.version} can't compile the kernel {op!r} from {source_folder()} for {target} "
                    f"({self._words(failed)}):\n{log}"
                )
            self._call("nvrtcGetLoweredName", program, wanted, ctypes.byref(lowered))
            assert lowered.value is not None
            what = "nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX"
            return Image(lowered.value.decode(), self._output(what, program))
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _call(self, name: str, *arguments: Any) -> None:
        failed = getattr(self._library, name)(*arguments)
        if failed:
            raise BuildError(f"{name} failed: {self._words(failed)}")

    def _words(self, code: int) -> str:
        return str(self._library.nvrtcGetErrorString(code).decode())

    def _output(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, program, text)
        return text.raw


def _strings(texts: list[bytes]) -> Any:
    return (ctypes.c_char_p * len(texts))(*texts)


@functools.cache
def headers_of_kernel() -> tuple[Path, ...]:
    """The files of csrc that the program includes, directly or not."""
    found: dict[Path, None] = {}
    texts = [PROGRAM]
    for text in texts:  # grows while it is read
        for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE):
            path = source_folder() / name
            if path not in found:
                found[path] = None
                texts.append(path.read_text(encoding="utf-8"))
    return tuple(found)


def kernel_digest() -> str:
    """A digest that changes with anything that goes into an image."""
    digest = hashlib.sha256(repr([PROGRAM, STAND_INS, OPTIONS]).encode())
    for path in headers_of_kernel():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def find() -> Compiler | str:
    """The libnvrtc of the installed torch, or a sentence that says why there is none."""
    if reason := no_cuda_in(torch):
        return reason
    reasons = []
    for library in _libraries(str(torch.version.cuda).partition(".")[0]):
        try:
            return Compiler(library)
        except (BuildError, AttributeError) as error:
            reasons.append(str(error))
    return f"NVRTC, which comes with torch {torch.__version__}, was not found: {'; '.join(reasons)}; reinstall torch"


def _libraries(cuda: str) -> Iterator[str | Path]:
    """Where to look, for a major version of CUDA."""
    if sys.platform == "win32":
        yield f"nvrtc64_{cuda}0_0.dll"
        return
    yield f"libnvrtc.so.{cuda}"  # torch has loaded it, or the system has it
    packages = Path(torch.__file__).parent.parent
    for folder in (packages / "torch" / "lib", *sorted(packages.glob("nvidia/*/lib"))):
        for path in sorted(folder.glob(f"libnvrtc[-.]*so.{cuda}*")):
            if "builtins" not in path.name and ".alt." not in path.name:
                load_builtins(path.parent)
                yield path


def load_builtins(folder: Path) -> None:
    """Loads the other half of a libnvrtc, which looks for that by its bare name."""
    for path in folder.glob("libnvrtc-builtins*"):
        with contextlib.suppress(OSError):  # without it, NVRTC says itself what it misses
            ctypes.CDLL(str(path))


def nvrtc() -> Compiler:
    """Raises BuildError where there is none."""
    found = find()
    if isinstance(found, str):
        raise BuildError(found)
    return found


def why_not() -> str | None:
    """Why no kernel can be compiled here; None where one can."""
    found = find()
    return found if isinstance(found, str) else None
