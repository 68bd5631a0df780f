"""A stay of the averages in the model: what `EMA.swapped` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .averages import Averages
from .checks import storage_refusal
from .plan import Call, Plan
from .shards import local

MakePlan = Callable[[Sequence[Tensor] | None], Plan]  # for the model as it is, or for these tensors in its place


class Exchange:
    """Puts average `index` into the model, and takes it out again.

    The values change places in one launch, each way; where the types differ, the model's are set aside instead.
    Without the extension all of the model's values are copied aside. What is held here is enough to undo it, whatever
    becomes of the model's tensors meanwhile.

    Every step leaves behind what the next try needs: `leave` may be interrupted anywhere, and called again.
    """

    def __init__(self, averages: Averages, index: int, current: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """`current`: the model's tensors that are averaged; `buffers`: those of its buffers that are not."""
        self.index = index
        self.over = False
        self._averages = averages
        self._tensors = current
        self._memory = {name: local(tensor).detach() for name, tensor in self._tensors.items()}
        self._buffers = [(name, tensor, _version(tensor)) for name, tensor in buffers.items()]
        self._versions: list[int] = []
        self._plan: Plan | None = None
        self._call = Call((0.0,))
        self._copies: dict[str, Tensor] = {}
        self.replaced = False  # the block put other tensors into the model

    def enter(self, plan: Plan | None, make_plan: MakePlan) -> Plan:
        """Returns the plan that did it."""
        _exchanges[:] = [*(each for each in _exchanges if not each.over), self]
        if not (plan and self._run(plan, fresh=False)):
            plan = make_plan(None)
            plan.refuse("swap")
            if plan.reusable:
                self._run(plan, fresh=True)
            else:
                self._copy_in()
        self._versions = self._versions_now()
        return plan

    def _run(self, plan: Plan, *, fresh: bool) -> bool:
        self._plan, self._call = plan, Call((0.0,), average=self.index, aside=plan.aside())
        return plan.run_call("swap", self._call, fresh=fresh)

    def _copy_in(self) -> None:
        self._copies = {name: memory.clone() for name, memory in self._memory.items()}
        _write({name: self._averages.get(name, self.index) for name in self._averages}, self._memory)

    def leave(self, make_plan: MakePlan, current: Callable[[], dict[str, Tensor]]) -> None:
        """`current` gives the model's tensors as they are now, by name."""
        if self.over:
            return
        written = self._written() if self._plan and self._plan.exchanged() else []
        if self._copies:
            _write(self._copies, self._memory)
            self.replaced = True  # or not: _follow sees
        elif self._plan and self._plan.exchanged() and not self._plan.run_call("restore", self._call):
            # Undone in the tensors that it was done with.
            self.replaced = True
            plan = make_plan(list(self._memory.values()))
            plan.mark_exchanged()
            self._plan = plan
            plan.run_call("restore", self._call, fresh=True)
        if self.replaced:
            try:
                self._follow(current())
            except Exception:
                self.over = True  # as far as it goes: the averages are whole
                raise
        self.over = True
        if self in _exchanges:
            _exchanges.remove(self)
        if changed := [name for name, tensor, before in self._buffers if _version(tensor) != before]:
            warnings.warn(
                f"EMA.swapped: the block wrote to the model's buffers {', '.join(map(repr, changed[:5]))}, which are "
                "not averaged and keep it; to measure statistics for the averages, copy_to a copy of the model",
                stacklevel=5,
            )
        if written:
            warnings.warn(
                f"EMA.swapped: the block wrote to {', '.join(map(repr, written[:5]))} in the model, where the averages "
                "were: they keep what it wrote",
                stacklevel=5,
            )

    def true_average(self, name: str, k: int, average: Tensor) -> Tensor:
        """A copy from the model, where the average is there; of sharded ones, what lies on this rank."""
        exchanged = self._plan is not None and self._plan.exchanged()
        if not (exchanged and k == self.index and self._same_type(name)):
            return average
        if refusal := storage_refusal(f"the average of {name!r}, which is in the model", self._memory[name]):
            raise refusal
        return self._memory[name].clone()

    def _same_type(self, name: str) -> bool:
        return self._memory[name].dtype == self._averages.get(name, 0).dtype

    def _versions_now(self) -> list[int]:
        return [_version(tensor) for tensor in self._memory.values()]

    def _written(self) -> list[str]:
        changes = zip(self._memory, self._versions, self._versions_now(), strict=False)
        return [name for name, before, now in changes if before != now and self._same_type(name)]

    def _follow(self, current: dict[str, Tensor]) -> None:
        """The model's own values, into the tensors that the block put in the place of the first ones."""
        lost = []
        for name, values in self._memory.items():
            tensor = local(current[name]) if name in current else None
            try:
                if tensor is None or tensor.shape != values.shape:
                    lost.append(name)
                elif self._is_new(name, tensor):
                    _write({name: values}, {name: tensor})
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # of a kind that takes no values
                lost.append(name)
        if lost:
            raise RuntimeError(
                f"EMA.swapped: expected the model's tensors of before, found others for {lost[:5]}; the averages are "
                "whole again, those tensors keep what the block gave them"
            )

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        memory = self._memory[name]
        same = tensor is local(self._tensors[name]) and tensor.data_ptr() == memory.data_ptr()
        return not (same and tensor.stride() == memory.stride())


# Those under way, and at most one that is over, where an interrupt kept it here. (Not weak references: a Ctrl-C that
# comes while one is cleared is lost.)
_exchanges: list[Exchange] = []


def exchanging() -> bool:
    """Whether any model may hold an average now."""
    return bool(_exchanges)


def hold_average(tensors: Iterable[Tensor]) -> bool:
    """Whether any of a model's tensors holds an average now, of whichever manager."""
    ids = set(map(id, tensors))
    return any(not each.over and not ids.isdisjoint(map(id, each._tensors.values())) for each in list(_exchanges))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _write(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    torch.clear_autocast_cache()
    for name, tensor in into.items():
        tensor.copy_(values[name])
