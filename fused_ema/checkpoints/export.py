"""The averages of a manager as the state of another package."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..manager.ema import EMA
from .layouts import named_layout


def export(
    ema: EMA,
    layout: str,
    index: int = 0,
    *,
    parameters: Iterable[Tensor] | None = None,
    include_online: bool = True,
) -> dict[str, Any]:
    """Returns the average as the state of another package: what its `load_state_dict` takes, in tensors and numbers.

    Averages keep their dtype, and all tensors are copies. What is not averaged comes from the model. Names are those of
    `model.state_dict()`; for timm, the prefixes of DDP and torch.compile are removed.

    The states of diffusers and torch_ema can describe some schedules: diffusers continues with the decays of
    `constant`, `half_life`, `inverse_power` and `tf_warmup`, torch_ema with those of `constant`, `half_life` and
    `tf_warmup`, and it keeps a count only for the last. Any other schedule becomes a constant, the decay of the latest
    update. No layout holds `update_every`, and `shadow_params` has no place for averages of buffers.

    Args:
        layout: one of `LAYOUTS`.
        index: which average.
        parameters: for `shadow_params`, the parameters that the other package has, if not `model.parameters()`.
        include_online: for "ema_pytorch", adds the model's own weights, as its `include_online_model` does by default.

    Raises:
        ValueError: an unknown layout, or `parameters` that are not the model's.
        IndexError: there is no average of that index.
        RuntimeError: the model's own weights are asked for while it is swapped.
    """
    kind = named_layout(layout)
    averages = kind.averages(ema, index, parameters)
    state = {**kind.scalars(ema, index), **averages}
    if include_online and kind.online is not None:
        if ema.swapped_index is not None:
            raise RuntimeError(
                "export: the model's own weights are not in the model inside swapped(); leave the block first, or pass "
                "include_online=False"
            )
        state |= {kind.online + key: value for key, value in copy.deepcopy(ema.model.state_dict()).items()}
    return state
