"""Loads and launches NVRTC's kernels through the CUDA driver, on PyTorch's devices and streams.

A failure raises RuntimeError with the driver's own words. Nothing here is tried again or done in another way: after
most errors of the driver, the process can no longer use the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import sys
from typing import Any

import torch

from .._build import kernels
from .._build.nvrtc import Image
from .base import one_at_a_time
from .tables import LAUNCH, THREADS


class Driver:
    """The calls into libcuda."""

    def __init__(self, library: str) -> None:
        self._library: Any = ctypes.CDLL(library)  # releases the interpreter's lock during a call
        # Keeps that lock during a call, so that a launch lets no other thread replace the tensors that were checked.
        self._held: Any = ctypes.PyDLL(library)
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.launch = self._held.cuLaunchKernel
        self.launch.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
        self._held.cuCtxSetCurrent.argtypes = [pointer]
        self._library.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]

    def version(self) -> int:
        """The newest CUDA that the driver supports: 13000 is 13.0."""
        version = ctypes.c_int()
        self.check(self._library.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
        return version.value

    def check(self, code: int, call: str) -> None:
        if code:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._held.cuGetErrorName(code, ctypes.byref(name))
            self._held.cuGetErrorString(code, ctypes.byref(text))
            words = [each.value.decode() for each in (name, text) if each.value]
            raise RuntimeError(f"fused_ema: the CUDA driver failed in {call}: {': '.join(words) or f'error {code}'}")

    def primary_context(self, index: int) -> int:
        """The context that PyTorch uses on a device. It is kept for good."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.check(self._library.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        self.check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
        return context.value or 0

    def current_context(self) -> int:
        """0 in a thread in which nothing has called CUDA yet."""
        context = ctypes.c_void_p()
        self.check(self._held.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        return context.value or 0

    def set_context(self, context: int) -> None:
        self.check(self._held.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def load(self, image: Image) -> int:
        """Loads a kernel into the current context, for good: captured graphs may hold it. Returns its function."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        code = self._library.cuModuleLoadData(ctypes.byref(module), image.code)
        self.check(code, f"cuModuleLoadData, of a kernel of {len(image.code)} bytes")
        code = self._library.cuModuleGetFunction(ctypes.byref(function), module, image.kernel.encode())
        self.check(code, f"cuModuleGetFunction, of {image.kernel}")
        return function.value or 0


class Gpu:
    """One device: its kernels, and launches on it. The first three methods are all that asks torch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._driver = driver()
        self._context = self._driver.primary_context(device.index)
        self._kernels: dict[str, int] = {}

    def architecture(self) -> int:
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def kernel(self, op: str) -> int:
        """The kernel of an operation, compiled and loaded where that has not happened yet."""
        found = self._kernels.get(op)
        if found is None:
            if self.capturing():
                raise RuntimeError(
                    f"fused_ema: the kernel {op!r} can't be loaded on {self.device} during a CUDA graph capture. "
                    "Make the same call once before the capture"
                )
            with one_at_a_time(), _current(self._driver, self._context):
                found = self._kernels.get(op)
                if found is None:  # another thread may have loaded it
                    found = self._kernels[op] = self._driver.load(kernels.image(op, self.architecture()))
        return found

    def launch(self, function: int, blocks: int, stream: int, argument: bytes, codes: list[int]) -> None:
        """Launches a kernel, and appends what the driver returned to `codes`; raises where that is not 0.

        `extend` does both in one step, which Ctrl-C can't split.
        """
        buffer = ctypes.create_string_buffer(argument, LAUNCH.size)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        call = function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, None
        with _current(self._driver, self._context):
            codes.extend(itertools.starmap(self._driver.launch, [call]))
            self._driver.check(codes[-1], f"cuLaunchKernel on {self.device}")


class _current:
    """Makes a context the thread's current one, and then restores the one before it."""

    def __init__(self, driver: Driver, context: int) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._before = self._driver.current_context()
        if self._before != self._context:
            self._driver.set_context(self._context)

    def __exit__(self, error: object, *_: object) -> None:
        if self._before != self._context:
            with contextlib.suppress(*[RuntimeError] * (error is not None)):  # the first error says what happened
                self._driver.set_context(self._before)


def library_name() -> str:
    return "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@functools.cache
def find() -> Driver | str:
    """The driver, or a sentence that says why it can't be used."""
    try:
        found = Driver(library_name())
        version = found.version()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the CUDA driver, {library_name()}, can't be used ({error}); install NVIDIA's driver"
    wanted = torch.version.cuda or "0"
    if version // 1000 < int(wanted.partition(".")[0]):
        return (
            f"the CUDA driver supports CUDA {version // 1000}.{version % 1000 // 10} at most, and torch "
            f"{torch.__version__} was built with CUDA {wanted}; install a newer driver"
        )
    return found


def driver() -> Driver:
    found = find()
    if isinstance(found, str):
        raise RuntimeError(f"fused_ema: {found}")
    return found


def why_not() -> str | None:
    """Why no kernel can be launched here; None where one can."""
    found = find()
    return found if isinstance(found, str) else None


@functools.cache
def gpu(device: torch.device) -> Gpu:
    return Gpu(device)
