"""The compiled kernels without nvcc: csrc's own, compiled by PyTorch's NVRTC for the GPU that is there.

One launch per device, the bits of the compiled runner, and tables like its own, packed in Python.
"""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor

from .._build import nvrtc
from ..pairs.checks import Action
from . import driver
from .base import Call, Changed, Job, Tensors, Watch, is_update
from .in_python import PreparedInPython
from .tables import MAX_AVERAGES, ROW, VECTOR_BYTES, Tables, launch

_never_freed: list[Tensor] = []


class Nvrtc:
    """One kernel launch per CUDA device."""

    name = "nvrtc"

    def backend(self, device_type: str) -> str:
        return "nvrtc"

    def why_not(self, device_type: str) -> str | None:
        if device_type != "cuda":
            return f"NVRTC compiles kernels only for CUDA devices, not for {device_type} devices"
        return nvrtc.why_not() or driver.why_not() or _too_old()

    def prepare(self, job: Job, watch: Watch | None) -> PreparedNvrtc:
        return PreparedNvrtc(job, watch)


def _too_old() -> str | None:
    """Why a GPU of this process can't run the kernel. Asking initializes CUDA, so nothing is asked before something
    else has done that."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    for index in range(torch.cuda.device_count() if started else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 7:
            return f"cuda:{index} has compute capability {major}.{minor}, and the kernel needs 7.0"
    return None


class PreparedNvrtc(PreparedInPython):
    """See `Prepared`; it mirrors csrc/plan.cpp."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        super().__init__(job, watch)
        if not 1 <= job.averages <= MAX_AVERAGES:
            raise RuntimeError(f"fused_ema: expected 1 to {MAX_AVERAGES} averages, found {job.averages}")
        self._process = os.getpid()
        self._averages = job.averages
        self._active = [i for i, action in enumerate(job.actions) if action is not Action.NONE and job.ema[i].numel()]
        devices: dict[torch.device, _Device] = {}
        self._places: dict[int, tuple[_Device, int]] = {}  # of each active pair, its row
        number = 0
        for i in self._active:
            ema, model = job.ema[i], job.model[i]  # the average may be in pinned host memory
            if model.device not in devices:
                devices[model.device] = _Device(model.device)
            average, tables = job.actions[i] is Action.AVERAGE, devices[model.device].tables
            self._places[i] = devices[model.device], tables.count()
            tables.add(job.names[i], ema, model, average, job.averages, job.strides[i], number)
            number += ema.numel()
        self._devices = list(devices.values())
        for device in self._devices:
            device.upload(job.averages)

    def launches(self) -> int:
        return len(self._devices)

    def scratch(self) -> list[tuple[torch.device, int]]:
        sizes = [(each.device, each.tables.scratch_bytes) for each in self._devices]
        return [(device, size) for device, size in sizes if size]

    def current(self) -> bool:
        return not self._forked() and super().current()

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        if self._forked():
            return False
        for each in self._devices:
            each.gpu.kernel(call.op)  # may compile for seconds, so before the tensors are looked at
        return super().run(call, ema, model)

    def exchanged(self) -> bool:
        return any(each.exchanged() for each in self._devices)

    def mark_exchanged(self) -> None:
        for each in self._devices:
            each.codes = [0]

    def _forked(self) -> bool:
        """Whether a parent process made this, whose device memory must not be touched here."""
        return self._process != os.getpid()

    def _patch(self, changed: Changed) -> bool:
        rows: dict[int, bytes] = {}
        if self._forked() or not all(i in self._places for i in changed.numbers):
            return False
        devices = {id(self._places[i][0]): self._places[i][0] for i in changed.numbers}
        for i, ema, model in zip(changed.numbers, changed.ema, changed.model, strict=True):
            device, row = self._places[i]
            packed = device.tables.moved(row, ema.data_ptr(), model.data_ptr())
            if (
                packed is None
                or model.device != device.device
                or (self._averages > 1 and self._records.differs(i, ema))
            ):
                return False
            rows[row] = packed
        return len(devices) < 2 and all(device.replace(rows) for device in devices.values())

    def _run(self, call: Call, tensors: Tensors) -> None:
        first = max(call.average, 0)
        averages = range(first, self._averages if call.average < 0 else first + 1)
        self._check(call, averages)
        if is_update(call.op) and call.device_decays is None and all(decay == 1 for decay in call.decays):
            return
        devices = [each for each in self._devices if call.op != "restore" or each.exchanged()]
        scratch = {device: memory.data_ptr() for (device, _), memory in zip(self.scratch(), call.scratch, strict=False)}
        for each in devices:
            each.run(call, each.gpu.kernel(call.op), averages, scratch.get(each.device, 0))
        half = len(tensors) // 2
        for side in range(1 + (call.op in ("swap", "restore"))):
            written = [tensors[side * half + i] for i in self._active]
            if self._inference[side]:
                written = [each for each in written if not each.is_inference()]
            torch.autograd.graph.increment_version(written)

    def _check(self, call: Call, averages: range) -> None:
        count = len(averages)
        if averages.stop > self._averages or len(call.decays) != count or len(call.keys) not in (0, count):
            raise ValueError("expected one decay, and one key or none, for each average that takes part")
        if call.device_decays is not None and call.device_decays.numel() < averages.stop:
            raise ValueError("device_decays: expected one for each average")
        if call.op in ("swap", "restore"):
            needed = self.scratch()
            if len(needed) != len(call.scratch) or not all(map(_holds, call.scratch, needed)):
                raise ValueError(
                    "scratch: expected a contiguous uint8 tensor, aligned to 16 bytes, for each device in scratch()"
                )


def _holds(memory: Tensor, needed: tuple[torch.device, int]) -> bool:
    device, size = needed
    here = memory.device == device or memory.is_pinned()
    fits = here and memory.dtype is torch.uint8 and memory.numel() >= size
    return fits and memory.is_contiguous() and memory.data_ptr() % VECTOR_BYTES == 0


class _Device:
    """The tables of one device, and their copy in its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tables = Tables()
        self.codes: list[int] = []  # what the driver returned for exchanges: each 0 is one that was launched
        self._captured = False

    def upload(self, averages: int) -> None:
        """Copies the tables to the device, and loads the kernel of updates. It waits for the copy, so that every later
        launch, on any stream and in any graph capture, can read them."""
        self.gpu = driver.gpu(self.device)
        if self.gpu.capturing():
            raise RuntimeError(
                f"fused_ema: the addresses of new or replaced tensors on {self.device} can't be uploaded during a CUDA "
                "graph capture. Update them once before the capture, or call prepare() on what bind() returned"
            )
        count = self.tables.tile_count()
        if count * averages >= 1 << 31:
            raise RuntimeError(f"fused_ema: expected fewer than 2^31 blocks on {self.device}, found {count * averages}")
        self._owner = self.gpu.stream()
        packed, layouts = self.tables.rows_and_layouts()
        rows = torch.empty(len(packed), dtype=torch.uint8, device=self.device)
        rows.copy_(torch.frombuffer(packed, dtype=torch.uint8))
        tiles = self.tables.tiles(self.device)
        self._owner.synchronize()
        self.gpu.kernel("update")
        self.memory = [rows, tiles]
        self._layouts, self._count = layouts, count
        self._point()
        self.tables.forget()
        _uploaded.add(self)

    def _point(self) -> None:
        rows, tiles = (memory.data_ptr() for memory in self.memory)
        self._head = rows, rows + self._layouts, tiles, self._count

    def replace(self, rows: dict[int, bytes]) -> bool:
        """Goes on with a copy in which some rows are others, since launches under way and captured graphs read the
        present ones. It waits as `upload` does. False where a new plan is needed."""
        stream = self.gpu.stream()
        if self.gpu.capturing() or stream != self._owner:
            return False
        copy = self.memory[0].clone()
        for row, packed in rows.items():
            place = copy[row * ROW.size : (row + 1) * ROW.size]
            place.copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        stream.synchronize()
        self.memory, self._captured = [copy, self.memory[1]], False
        self._point()
        self.tables.replace(rows)
        return True

    def exchanged(self) -> bool:
        return self.codes.count(0) % 2 == 1

    def run(self, call: Call, function: int, averages: range, scratch: int) -> None:
        stream = self.gpu.stream()
        if not self._captured and self.gpu.capturing():
            # The captured graph reads the tables at each replay, and nothing tells when it is destroyed.
            _never_freed.extend(self.memory)
            self._captured = True
        if stream != self._owner:
            for memory in self.memory:
                memory.record_stream(stream)
        argument = launch(self._head, averages, call.decays, call.keys, call.device_decays, scratch)
        self.codes = [0] * self.exchanged()
        codes = self.codes if call.op in ("swap", "restore") else []
        self.gpu.launch(function, self._head[3] * len(averages), stream.cuda_stream, argument, codes)


_uploaded: weakref.WeakSet[_Device] = weakref.WeakSet()


def _keep_memory_of_parent() -> None:
    """In a forked child, where freeing memory of a device would call CUDA, which does not work there."""
    for each in list(_uploaded):
        _never_freed.extend(each.memory)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_memory_of_parent)
