# The compiled extension: csrc/bindings.cpp and csrc/watch.h.
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

cuda_built: bool

def _set_grain(elements: int) -> int: ...

class Op(Enum):
    update = ...
    copy = ...
    swap = ...
    restore = ...
    update_stochastic = ...

class CompiledWatch:
    def __init__(self, modules: Sequence[nn.Module], containers: Sequence[object]) -> None: ...
    def current(self) -> bool: ...
    def values(self) -> list[Any] | None: ...

class PreparedPairs:
    def __init__(
        self,
        names: Sequence[str],
        ema: Sequence[Tensor],
        model: Sequence[Tensor],
        actions: Sequence[int],
        watch: CompiledWatch | None,
        averages: int,
        strides: Sequence[int],
    ) -> None: ...
    def run(
        self,
        op: Op,
        decays: Sequence[float],
        device_decays: Tensor | None = None,
        keys: Sequence[int] = (),
        average: int = -1,
        scratch: Sequence[Tensor] = (),
    ) -> bool: ...
    def run_with(
        self,
        ema: Sequence[Tensor],
        model: Sequence[Tensor],
        op: Op,
        decays: Sequence[float],
        device_decays: Tensor | None = None,
    ) -> bool: ...
    def scratch_bytes(self) -> list[tuple[torch.device, int]]: ...
    def current(self) -> bool: ...
    def exchanged(self) -> bool: ...
    def mark_exchanged(self) -> None: ...
    def launches(self) -> int: ...
