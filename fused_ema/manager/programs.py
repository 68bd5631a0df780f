"""Finds exported programs that share the model's memory, for `EMA.swapped`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from ..pairs.memory import storage
from ..pairs.shards import is_sharded


def references(tensors: Iterable[Tensor]) -> int:
    """How often the first tensor is referred to: a program that is exported adds to it, a graph for autograd does not.

    Its parameters are those of the model, so the first stands for all.
    """
    tensor = next(iter(tensors), None)
    if tensor is None or is_sharded(tensor):
        return 0
    node = None
    if tensor.requires_grad and tensor.is_leaf and not torch.is_inference_mode_enabled():
        node = torch.autograd.graph.get_gradient_edge(tensor)  # by which a graph refers to it: counts once in any case
    uses: int = tensor._use_count()  # type: ignore[attr-defined]
    uses += sys.getrefcount(tensor)
    del node
    return uses


def programs_on(tensors: Collection[Tensor]) -> list[str]:
    """The kinds of exported programs whose parameters lie in the memory of these tensors. Looks at all objects."""
    library = sys.modules.get("torch.export.exported_program")
    exported = library.ExportedProgram if library else ()
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (torch.jit.ScriptModule, exported))}
    ours = {storage(tensor) for tensor in tensors if tensor.numel()}
    found = set()
    for each in objects if kinds else ():
        if type(each) in kinds:
            with suppress(RuntimeError, AttributeError):  # from a module that another thread is still making
                theirs = each.state_dict.values() if isinstance(each, exported) else each.parameters()
                if any(storage(tensor) in ours for tensor in theirs if tensor.numel()):
                    found.add("ExportedProgram" if isinstance(each, exported) else "ScriptModule")
    return sorted(found)
