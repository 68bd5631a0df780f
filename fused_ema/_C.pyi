# The compiled extension: csrc/bindings.cpp.
from collections.abc import Sequence
from enum import Enum

from torch import Tensor, nn

cuda_built: bool

class Op(Enum):
    update = ...
    copy = ...
    swap = ...

class Plan:
    def __init__(
        self,
        names: Sequence[str],
        ema: Sequence[Tensor],
        model: Sequence[Tensor],
        actions: Sequence[int],
        modules: Sequence[nn.Module],
        containers: Sequence[object],
    ) -> None: ...
    def run(self, op: Op, decay: float, device_decay: Tensor | None) -> bool: ...
    def run_with(
        self,
        ema: Sequence[Tensor],
        model: Sequence[Tensor],
        op: Op,
        decay: float,
        device_decay: Tensor | None,
    ) -> bool: ...
    def launches(self) -> int: ...
