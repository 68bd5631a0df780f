"""Runs the NVRTC runner on tensors in host memory, through a stand-in for the CUDA driver.

What takes the place of a GPU: stand_in_driver.cpp, which runs the kernel's code as g++ builds it, a stream that does
nothing, and images that hold nothing but the name of their kernel.
"""

import ctypes

import emulated_grid
from emulated_grid import OPS

from fused_ema._build import kernels
from fused_ema._build.nvrtc import Image
from fused_ema.runners import driver, extension, nvrtc


class Stream:
    cuda_stream = 0

    def synchronize(self):
        pass


class HostGpu(driver.Gpu):
    """Host memory, which the stand-in takes for a device."""

    now_capturing = False
    now_stream = Stream()

    def architecture(self):
        return 90

    def stream(self):
        return self.now_stream

    def capturing(self):
        return type(self).now_capturing


class StandIn:
    """The library behind the runner: counts its launches and lets its calls fail."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def launches(self):
        return self.library.stand_in_launches()

    def loads(self):
        return self.library.stand_in_loads()

    def fail(self, call, code, after=0):
        """From now on this call fails, after it has passed some times."""
        self.library.stand_in_fail(call.encode(), code, after)


def image(op, arch):
    return Image(f"ema_kernelILNS_2OpE{OPS.index(op)}EEEv", b"\x7fELF")


def install(monkeypatch):
    """Makes the NVRTC runner the only one for tensors on the CPU, until the test ends."""
    path, _ = emulated_grid.library("stand_in_driver.cpp", ["-O1"])
    monkeypatch.setattr(driver, "library_name", lambda: str(path))
    monkeypatch.setattr(driver, "Gpu", HostGpu)
    monkeypatch.setattr(HostGpu, "now_capturing", False)
    monkeypatch.setattr(kernels, "image", image)
    monkeypatch.setattr(
        nvrtc.Nvrtc, "why_not", lambda self, kind: driver.why_not() if kind == "cpu" else "the stand-in is for the CPU"
    )
    monkeypatch.setattr(extension.Extension, "why_not", lambda self, kind: "a stand-in for the NVRTC runner is tested")
    forget()
    stand_in = StandIn(path)
    stand_in.fail("", 0)
    return stand_in


def forget():
    """Forgets the driver and the devices; what the test changed is put back by pytest."""
    driver.find.cache_clear()
    driver.gpu.cache_clear()
