"""A stay of the averages in the model: what `EMA.swapped` does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..pairs.checks import PLAIN_TYPES, address, has_address, memory, overlapping, storage_refusal
from ..pairs.shards import local
from ..plan import Call, Plan
from .averages import Averages

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
        self._buffers = [(name, tensor, _version(tensor)) for name, tensor in buffers.items() if not is_lazy(tensor)]
        self._versions: list[int] = []
        storages = {name: tensor.untyped_storage() for name, tensor in self._memory.items()}
        self._storages = {name: (storage, storage.nbytes()) for name, storage in storages.items()}
        self._changes: tuple[list[str], list[str]] | None = None  # by the block, in place
        self._values: dict[str, Tensor] | None = None  # for the tensors that it put in the place of the first ones
        self._freed: dict[str, bool] = {}  # by the block → whether the average was in that memory
        self._known: set[int] = set()  # of which it was made, and where they lie
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
        kept, gone = self._changes = self._changes or self._written()
        self._bring_back_memory()
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
        if kept:
            warnings.warn(
                f"EMA.swapped: the block wrote to {', '.join(map(repr, kept[:5]))} in the model, where the averages "
                "were: they keep what it wrote",
                stacklevel=5,
            )
        if gone:
            warnings.warn(
                f"EMA.swapped: the block wrote to {', '.join(map(repr, gone[:5]))} in the model, which is gone: they "
                "hold the model's own values again",
                stacklevel=5,
            )
        if lost := [name for name, average in self._freed.items() if average]:
            raise RuntimeError(
                f"EMA.swapped: expected the memory that the averages were in, found it freed for {lost[:5]}: their "
                "averages begin anew with the model's values"
            )

    def _bring_back_memory(self) -> None:
        """For tensors whose memory the block has freed. An average that was there begins anew."""
        exchanged = self._plan is not None and self._plan.exchanged()
        for name, (storage, size) in self._storages.items():
            if storage.nbytes() < size:
                self._freed[name] = exchanged and self._same_type(name)
        for name, average in self._freed.items():  # again, where an interrupt kept it from the copy
            storage, size = self._storages[name]
            if storage.nbytes() < size:
                storage.resize_(size)
            if exchanged and average:
                _write({name: self._averages.get(name, self.index)}, {name: self._memory[name]})

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

    def _written(self) -> tuple[list[str], list[str]]:
        """What the block wrote to, in place: what stays in an average, and what makes way for the model's own."""
        exchanged = self._plan is not None and self._plan.exchanged()
        changes = zip(self._memory, self._versions, self._versions_now(), strict=False)
        changed = [name for name, before, now in changes if before != now and (exchanged or self._copies)]
        stays = {name: exchanged and self._same_type(name) for name in changed}
        return [name for name in changed if stays[name]], [name for name in changed if not stays[name]]

    def _follow(self, current: dict[str, Tensor]) -> None:
        """The model's own values, into the tensors that the block put in the place of the first ones."""
        here = {name: local(current[name]) for name in self._memory if name in current}
        fits = {name: tensor for name, tensor in here.items() if _takes(tensor, self._memory[name])}
        new = {name: tensor for name, tensor in fits.items() if self._is_new(name, tensor)}
        if self._values is None:
            self._values = self._values_for(fits, new)
        values = self._values  # as they were before any of them was written
        lost = [name for name in self._memory if name not in fits or (name in new and name not in values)]
        averages = self._averages.storages()
        for name in values.keys() & fits.keys():
            value, tensor = values[name], fits[name]
            try:
                if _plain(tensor) and tensor.untyped_storage().data_ptr() in averages:  # not to be written to
                    tensor.data = value.to(tensor)
                else:
                    _write({name: value}, {name: tensor})
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # of a kind that takes no values
                lost.append(name)
        if lost:
            raise RuntimeError(
                f"EMA.swapped: expected the model's tensors of before, found others for {lost[:5]}; the averages are "
                "whole again, those tensors keep what the block gave them"
            )

    def _values_for(self, fits: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's own values for those that are new, without those that lie where other values belong."""
        places = {name: tensor for name, tensor in fits.items() if new and _plain(tensor)}
        owners = {memory(tensor): self._place(name) for name, tensor in places.items() if name not in new}
        shared = overlapping(places)
        written = {tensor.untyped_storage().data_ptr() for name, tensor in places.items() if name in new}
        values = {}
        for name, tensor in new.items():
            place = self._place(name)
            if name in places:
                own = memory(tensor)
                if own in shared or owners.setdefault(own, place) != place:
                    continue
            value = self._memory[name]
            in_the_way = self._storages[name][0].data_ptr() in written  # they have changed places
            values[name] = value.clone() if in_the_way else value
        return values

    def _place(self, name: str) -> int:
        """The same for tied ones alone."""
        return address(self._memory[name]) if self._memory[name].numel() else id(self._tensors[name])

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        if tensor is not local(self._tensors[name]):
            return bool(tensor.numel())
        before = self._memory[name]
        return bool(tensor.numel()) and (tensor.data_ptr(), tensor.stride()) != (before.data_ptr(), before.stride())

    def holds_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of these is, or lies in, what the model's tensors were, or the averages that changed places."""
        if not self._known:
            averages = [self._averages.get(name, self.index) for name in self._averages]
            places = {address(tensor) for tensor in (*self._memory.values(), *averages) if tensor.numel()}
            self._known = (places - {0}) | set(map(id, self._tensors.values()))
        return any(id(t) in self._known or (t.numel() and address(local(t)) in self._known) for t in tensors)


def _takes(tensor: Tensor, values: Tensor) -> bool:
    return tensor.shape == values.shape and not tensor.is_meta and not storage_refusal("", tensor)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN_TYPES and has_address(tensor)


# Those under way, and at most one that is over, where an interrupt kept it here. (Not weak references: a Ctrl-C that
# comes while one is cleared is lost.)
_exchanges: list[Exchange] = []


def exchanging() -> bool:
    """Whether any model may hold an average now."""
    return bool(_exchanges)


def hold_average(tensors: Iterable[Tensor]) -> bool:
    """Whether any of a model's tensors holds an average now, of whichever manager."""
    tensors = list(tensors)
    return any(not each.over and each.holds_any(tensors) for each in list(_exchanges))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _write(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    torch.clear_autocast_cache()
    for name, tensor in into.items():
        tensor.copy_(values[name])
