"""Puts averages into the model and takes them out again, for `EMA.swapped`."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import plan as plans
from .._warning import warn
from ..pairs.checks import PLAIN_TYPES, storage_refusal
from ..pairs.memory import address, has_address, storage
from ..pairs.pairing import listed
from ..pairs.shards import local
from ..plan import Plan
from ..runners.base import Call, OpName
from .averages import Averages
from .programs import programs_on, references

STATISTICS = "running_mean", "running_var"  # F.batch_norm writes to them without raising their versions
COUNTER = "num_batches_tracked"

MakePlan = Callable[[Mapping[str, Tensor] | None], Plan]  # for the model as it is, or for these tensors by name


class Exchange:
    """Puts average `index` into the model, and takes it out again.

    The values change places in one launch each way; where the types differ, the model's values wait in scratch memory,
    which is where the averages are: on the model's device, or in pinned host memory.
    The memory of the model's tensors is held here, so that the exchange can be undone whatever the block does to
    the tensors themselves.

    `leave` may be interrupted anywhere and called again: every step leaves what the next attempt needs.
    """

    def __init__(self, averages: Averages, index: int, current: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """`current`: the model's tensors that are averaged; `buffers`: its persistent buffers that are not."""
        self.index = index
        self.over = False
        self.replaced = False  # the block put other tensors into the model
        self._averages = averages
        self._tensors = current
        self._memory = {name: local(tensor).detach() for name, tensor in current.items()}
        self._storages = {name: tensor.untyped_storage() for name, tensor in self._memory.items()}
        self._sizes = {name: memory.nbytes() for name, memory in self._storages.items()}
        self._buffers = {name: tensor.detach() for name, tensor in buffers.items() if not is_lazy(tensor)}
        self._versions: dict[str, int] = {}
        self._statistics: dict[str, Tensor] = {}  # copies
        self._references = sys.maxsize  # to the first tensor, inside the block
        self._written: list[str] | None = None  # by the block, in place
        self._freed: set[str] = set()  # whose memory the block freed
        self._plan: Plan | None = None
        self._scratch: list[Tensor] = []
        taken = [*self._memory.values(), *(averages.get(name, index) for name in averages)]
        self._places = {id(tensor) for tensor in current.values()} | {address(t) for t in taken if t.numel()}

    def enter(self, kept: Plan | None, make: MakePlan) -> Plan:
        """Swaps, and returns the plan that did so."""
        _under_way[:] = [*(each for each in _under_way if not each.over), self]
        plan = self._run("swap", kept, lambda: make(None))
        self._versions = self._versions_now()
        self._statistics = {
            name: tensor.clone()
            for name, tensor in (self._memory | self._buffers).items()
            if _last(name) in STATISTICS and _compares(tensor)
        }
        self._references = references(self._tensors.values())
        return plan

    def leave(self, make: MakePlan, current: Callable[[], dict[str, Tensor]]) -> None:
        """`current` gives the model's tensors as they are now, by name."""
        if self.over:
            return
        references_before = self._references
        self._references = sys.maxsize  # no look after an interrupted attempt, whose frames refer to tensors
        if self._written is None:
            self._written = self._written_now()
        self._bring_back_memory()
        if self._exchanged():
            plan = self._run("restore", self._plan, lambda: self._plan_for_first_tensors(make))
            self.replaced |= not plan.lasts  # it does not watch the model, so that tensors may have been replaced
            self._wait_for_scratch()
        lost: list[str] = []
        if self.replaced:
            try:
                lost = self._follow(current())
            except Exception:
                self.over = True  # no more can be done, and the averages are back in place
                raise
        self.over = True
        if self in _under_way:
            _under_way.remove(self)
        problems = []
        if lost:
            problems.append(
                f"the block removed, tied or replaced {listed(lost)}, so that the model's own values could not be put "
                "back there"
            )
        if freed := [name for name in self._freed if self._trades(name)]:
            problems.append(
                f"the block freed the memory of {listed(freed)}, where the averages were, and these averages start "
                "again from the model's own values"
            )
        try:
            self._warn_of_writes()
            self._warn_of_programs(references_before)
        finally:  # though a warning may be an error
            if problems:
                raise RuntimeError(f"EMA.swapped: {'; '.join(problems)}")

    def _run(self, op: OpName, kept: Plan | None, make: Callable[[], Plan]) -> Plan:
        """Notes the plan before it runs, so that an interrupt right after the launch can be undone."""

        def made() -> Plan:
            self._plan = self._with_scratch(op, make())
            return self._plan

        self._plan = kept if kept is None else self._with_scratch(op, kept)
        return plans.run(self._plan, Call(op, average=self.index, scratch=self._scratch), made)

    def _with_scratch(self, op: OpName, plan: Plan) -> Plan:
        if op == "swap":
            self._scratch[:] = plan.new_scratch(on_host=self._averages.on_host)  # the list that the call has
        return plan

    def _wait_for_scratch(self) -> None:
        """PyTorch hands out freed pinned memory again at once, even while a kernel still reads it."""
        if any(memory.is_pinned() for memory in self._scratch):
            for device in {memory.device for memory in self._memory.values() if memory.is_cuda}:
                torch.cuda.current_stream(device).synchronize()

    def _plan_for_first_tensors(self, make: MakePlan) -> Plan:
        """A plan that undoes the exchange in the original tensors, where the block put others into the model."""
        self.replaced = True
        plan = make(self._memory)
        plan.prepared.mark_exchanged()
        return plan

    def _exchanged(self) -> bool:
        return self._plan is not None and self._plan.prepared.exchanged()

    def _trades(self, name: str) -> bool:
        """Whether the average and the model's values change places, as they do where they have one type."""
        return self._memory[name].dtype == self._averages.get(name, 0).dtype

    def true_average(self, name: str, k: int, average: Tensor) -> Tensor:
        """A copy from the model, where that holds the average; of a sharded one, the shard on this rank."""
        if not (self._exchanged() and k == self.index and self._trades(name)):
            return average
        if refusal := storage_refusal(f"the average of {name!r}, which is in the model", self._memory[name]):
            raise refusal
        return self._memory[name].to(average.device, copy=True)

    def _bring_back_memory(self) -> None:
        """Allocates again what the block freed. An average that was in it starts again from the model's own value."""
        self._freed |= {name for name, size in self._sizes.items() if self._storages[name].nbytes() < size}
        for name in self._freed:
            if self._storages[name].nbytes() < self._sizes[name]:
                self._storages[name].resize_(self._sizes[name])
            if self._exchanged() and self._trades(name):
                with torch.no_grad():
                    self._memory[name].copy_(self._averages.get(name, self.index))

    def _versions_now(self) -> dict[str, int]:
        return {name: _version(tensor) for name, tensor in (self._memory | self._buffers).items()}

    def _written_now(self) -> list[str]:
        """Statistics count as written where the counter beside them was, or where their values differ."""
        now = self._versions_now()
        written = {name for name, before in self._versions.items() if before != now[name]}
        written |= {name for name in now if _last(name) in STATISTICS and _beside(name, COUNTER) in written}
        written |= {name for name, before in self._statistics.items() if self._differs(name, before)}
        return [name for name in now if name in written and (name in self._buffers or self._exchanged())]

    def _differs(self, name: str, before: Tensor) -> bool:
        now = self._buffers[name] if name in self._buffers else self._memory[name]
        if storage_refusal(name, now):  # the block freed its memory
            return False
        return not torch.equal(now, before) and not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True)

    def _warn_of_writes(self) -> None:
        written = [name for name in self._written or [] if name in self._memory]
        for names, what in (
            (
                [name for name in self._written or [] if name in self._buffers],
                "stay there: these buffers are not averaged; to measure statistics for the averages, use a copy of the "
                "model that copy_to has filled",
            ),
            ([name for name in written if self._trades(name)], "went into the averages and stay there"),
            ([name for name in written if not self._trades(name)], "were discarded: the model has its own values back"),
        ):
            if names:
                warn(f"EMA.swapped: writes to {listed(names)} inside swapped() {what}")

    def _warn_of_programs(self, before: int) -> None:
        if sys.exc_info()[0]:
            return  # the frames of an exception refer to tensors too
        if references(self._tensors.values()) > before:
            gc.collect()  # of programs that no one has any more, which refer to themselves
            kinds = programs_on(self._memory.values()) if references(self._tensors.values()) > before else []
            for kind in kinds:
                warn(
                    f"EMA.swapped: the {kind} that was made inside swapped() shares the model's memory, so that it "
                    "computes with the model's own weights from now on (a file that was saved inside the block has the "
                    "average); export a copy of the model that copy_to has filled"
                )

    def _follow(self, current: dict[str, Tensor]) -> list[str]:
        """Gives the model's own values to the tensors that the block put in the place of the original ones; returns
        the names of those that can't take them."""
        here = {name: local(current[name]) for name in self._memory if name in current}
        here = {name: tensor for name, tensor in here.items() if _takes(tensor, self._memory[name])}
        new = {name: tensor for name, tensor in here.items() if self._is_new(name, tensor)}
        owner = {id(tensor): self._place(name) for name, tensor in here.items() if name not in new}
        apart = {id(tensor): storage(tensor) for tensor in here.values() if _plain(tensor)}
        shared = Counter([*apart.values(), *self._averages.storages(), *{*map(storage, self._memory.values())}])
        lost = [name for name in self._memory if name not in here]
        for name, tensor in new.items():
            if owner.setdefault(id(tensor), self._place(name)) != self._place(name):  # tied by the block
                lost.append(name)
                continue
            try:
                with torch.no_grad():
                    if id(tensor) in apart and shared[apart[id(tensor)]] > 1:  # may not be written in place
                        tensor.data = torch.empty_like(tensor).copy_(self._memory[name])
                    else:
                        tensor.copy_(self._memory[name])
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # it can't be written
                lost.append(name)
        return lost

    def _place(self, name: str) -> int:
        """Equal for tied tensors only."""
        return address(self._memory[name]) if self._memory[name].numel() else id(self._tensors[name])

    def _is_new(self, name: str, tensor: Tensor) -> bool:
        if not tensor.numel():
            return False
        before = self._memory[name]
        same = tensor is local(self._tensors[name])
        return not same or (tensor.data_ptr(), tensor.stride()) != (before.data_ptr(), before.stride())

    def holds_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of these was a tensor of the model or an average when the swap began, or lies where one was."""
        return any(id(t) in self._places or (t.numel() and address(local(t)) in self._places) for t in tensors)


def _takes(tensor: Tensor, values: Tensor) -> bool:
    return (
        not is_lazy(tensor) and tensor.shape == values.shape and not tensor.is_meta and not storage_refusal("", tensor)
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN_TYPES and has_address(tensor)


# Exchanges under way, and at most one that is over, which an interrupt left here. (They are no weak references, because
# a Ctrl-C that arrives while one of those is cleared is lost.)
_under_way: list[Exchange] = []


def holds_average(tensors: Callable[[], Iterable[Tensor]]) -> bool:
    """Whether any of a model's tensors holds an average of any manager now. Asks for the tensors only while some
    model is swapped."""
    if not _under_way:
        return False
    active = [each for each in list(_under_way) if not each.over]
    found = list(tensors()) if active else []
    return any(each.holds_any(found) for each in active)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _beside(name: str, other: str) -> str:
    """The name of another tensor of the same module."""
    return name.removesuffix(_last(name)) + other


def _compares(tensor: Tensor) -> bool:
    """Whether its values can be compared without waiting for a device."""
    return tensor.device.type == "cpu" and _plain(tensor) and not storage_refusal("", tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
