"""The compiled runner: csrc/ through fused_ema._C, where that can be loaded."""

from __future__ import annotations

from typing import Any

from .._build.library import cuda_enabled, cuda_kernel_why_not, cuda_why_not, load, path, record, why_not
from .base import Call, Changed, Job, Prepared, Tensors, Watch

__all__ = ["Extension", "cuda_enabled", "cuda_kernel_why_not", "cuda_why_not", "load", "path", "record", "why_not"]


class Extension:
    """One kernel launch per CUDA device, one parallel loop on the CPU."""

    name = "extension"

    def backend(self, device_type: str) -> str:
        return device_type

    def why_not(self, device_type: str) -> str | None:
        if load() is None:
            return why_not() or "the extension is not loaded"
        if device_type == "cuda":
            return None if cuda_enabled else cuda_kernel_why_not()
        return None if device_type == "cpu" else f"the extension has no kernel for {device_type} devices"

    def prepare(self, job: Job, watch: Watch | None) -> Prepared:
        return _Compiled(job, watch)


class _Compiled:
    """See `Prepared`; csrc/plan.h is behind it."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        library: Any = load()
        self._ops = library.Op.__members__
        names, ema, model, actions, averages, strides = job
        self._tables = library.PreparedPairs(names, ema, model, actions, watch, averages, strides)
        self.launches = self._tables.launches
        self.scratch = self._tables.scratch_bytes
        self.current = self._tables.current
        self.exchanged = self._tables.exchanged
        self.mark_exchanged = self._tables.mark_exchanged

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        op, decays, device_decays, keys, average, scratch = call
        if ema is not None:
            return self._tables.run_with(ema, model, self._ops[op], decays, device_decays)  # type: ignore[no-any-return]
        return self._tables.run(self._ops[op], decays, device_decays, keys, average, scratch)  # type: ignore[no-any-return]

    def changed(self, ema: Tensors | None = None, model: Tensors | None = None) -> Changed | None:
        found = self._tables.changed(ema, model)
        return found and Changed(*found)

    def patch(self, changed: Changed) -> bool:
        return self._tables.patch(*changed[:4])  # type: ignore[no-any-return]
