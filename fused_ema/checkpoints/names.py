"""Names without what wraps a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state of the model under the names of the innermost model: without the prefixes of DDP and torch.compile.

    Only prefixes go: a module of one's own may be called "module" too.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            prefix = "module"
        elif "_orig_mod" in model._modules:  # torch.compile
            prefix = "_orig_mod"
        else:
            return state
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
        model = model.get_submodule(prefix)
