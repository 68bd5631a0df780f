"""What all runners in Python share: seeing whether the tensors are still what they were.

To derive from `PreparedInPython`, work out in `__init__` what depends on the pairs alone, and implement `_run`, which
gets tensors that fit, `_patch` where addresses are kept, and the rest of `Prepared` in base.py.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..pairs import shards
from ..pairs.memory import has_address, place
from .base import Call, Changed, Job, Slots, Tensors, Watch, one_at_a_time

try:
    from torch._C._dynamo import guards as _guards  # private, and the same from PyTorch 2.6 to 2.14

    _TensorGuards: Any = _guards.TensorGuards
except (ImportError, AttributeError):
    _TensorGuards = None

_data_ptr = torch._C.TensorBase.data_ptr
Record: TypeAlias = tuple[object, ...]


class PreparedInPython:
    """See `Prepared`, whose `current` and `run` are here."""

    def __init__(self, job: Job, watch: Watch | None) -> None:
        tensors = [*job.ema, *job.model]
        self._records = Records(tensors)
        self._inference = [any(map(Tensor.is_inference, side)) for side in (job.ema, job.model)]
        self._watch = watch
        values = (watch and watch.values()) or []
        self._sharded = any(map(shards.is_sharded, values))
        slots: dict[int, list[int]] = {}
        for i, value in enumerate(values):
            slots.setdefault(id(shards.local(value)), []).append(i)
        among = [slots.get(id(tensor), [-1])[-1] for tensor in tensors]
        self._complete = watch is not None and -1 not in among
        self._of_watched = getter(among)
        held = Counter(among)
        self._place = {slot: place for place, slot in enumerate(among)}
        self._tied = {slot for each in slots.values() for slot in each if len(each) > 1 or held[slot] > 1}

    def _run(self, call: Call, tensors: Tensors) -> None:
        """Runs the call on the averages and, behind them, the model's tensors, in the order of the job.

        It raises the version counters of what it writes. One thread at a time calls it, with gradients off.
        """
        raise NotImplementedError

    def _patch(self, changed: Changed) -> bool:
        """Takes in other addresses, as `Prepared.patch` does."""
        return True

    def changed(self, ema: Tensors | None = None, model: Tensors | None = None) -> Changed | None:
        tensors: Tensors
        with one_at_a_time(), torch.no_grad():
            slots: Slots = []
            if ema is not None and model is not None:
                tensors = (*ema, *model)
            else:
                found = self._watch.changed() if self._watch and self._complete and not self._sharded else None
                if found is None or any(slot in self._tied for slot, _ in found[1]):
                    return None
                tensors, slots = self._of_watched(found[0]), found[1]
            moved = self._records.moved(tensors)
            if moved is None:
                return None
            half = len(tensors) // 2
            places = {*moved, *(self._place[slot] for slot, _ in slots if slot in self._place)}
            numbers = sorted({place % half for place in places})
            others = any(slot not in self._place for slot, _ in slots)
            return Changed(numbers, [tensors[i] for i in numbers], [tensors[half + i] for i in numbers], slots, others)

    def patch(self, changed: Changed) -> bool:
        half = self._records.count() // 2
        numbers = [*changed.numbers, *(half + i for i in changed.numbers)]
        with one_at_a_time(), torch.no_grad():
            new = self._records.alike(numbers, [*changed.ema, *changed.model])
            if new is None or not self._patch(changed):
                return False
            self._records.replace(numbers, new)
            if self._watch:
                self._watch.adopt(changed.slots)
        return True

    def current(self) -> bool:
        with torch.no_grad():
            watched = self._watched()
            return watched is not None and self._records.fit(self._local(watched))

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        with one_at_a_time():
            enabled = torch.is_grad_enabled()
            try:
                torch._C._set_grad_enabled(False)  # torch.no_grad() takes a tenth of an update of two small tensors
                return self._run_if_current(call, None if ema is None or model is None else (*ema, *model))
            finally:
                torch._C._set_grad_enabled(enabled)

    def _run_if_current(self, call: Call, given: Tensors | None) -> bool:
        whole = self._watched() if given is None else given
        if whole is None:
            return False
        writes_model = call.op in ("swap", "restore")
        if any(self._inference[: 1 + writes_model]) and not torch.is_inference_mode_enabled():
            return False  # a new plan raises the error
        tensors = self._local(whole)
        if not self._records.fit(tensors):
            return False
        self._run(call, tensors)
        if self._sharded:
            shards.written(whole if writes_model else whole[: len(whole) // 2])
        return True

    def _local(self, tensors: Tensors) -> Tensors:
        return list(map(shards.local, tensors)) if self._sharded else tensors

    def _watched(self) -> Tensors | None:
        """The tensors that the watched sources hold. None where those have changed, or held others from the start,
        since another thread replaced some before they were paired."""
        values = self._watch.values() if self._watch and self._complete else None
        return None if values is None else self._of_watched(values)


def getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], Any]:
    """Returns a function that picks these positions of a sequence, in a loop in C."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: [values[position] for position in positions]


class Records:
    """What tensors were when they were prepared: their addresses, types, shapes and strides. Holds none of them.

    Comparing record by record takes a microsecond or two for each tensor. Two calls that loop in C take a twentieth of
    that: torch.compile's guards, which never fit by mistake but do not fit in another mode, such as autocast or
    inference mode, and a list of addresses. Where they don't fit, the records decide.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._records = list(map(_record, tensors))
        first: dict[int, int] = {}
        for position, tensor in enumerate(tensors):
            first.setdefault(id(tensor), position)
        self._once = getter(list(first.values()))  # the guards want each tensor once
        self._repeated = [(i, first[id(tensor)]) for i, tensor in enumerate(tensors) if first[id(tensor)] != i]
        addresses = _TensorGuards is not None and bool(tensors) and all(map(has_address, tensors))
        self._addresses = [record[1] for record in self._records] if addresses else None
        self._guards: Any = None

    def fit(self, tensors: Tensors) -> bool:
        """Whether all tensors, which may be other objects, are what they were. Call it with gradients off."""
        if len(tensors) != len(self._records):
            return False
        if self._guards is not None and self._guarded(tensors):
            return list(map(_data_ptr, tensors)) == self._addresses
        if list(map(_record, tensors)) != self._records:
            return False
        if self._addresses is not None and all(tensors[i] is tensors[before] for i, before in self._repeated):
            self._guards = _TensorGuards(*self._once(tensors), dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return True

    def _guarded(self, tensors: Tensors) -> bool:
        once = tensors
        if self._repeated:
            if not all(tensors[i] is tensors[before] for i, before in self._repeated):
                return False
            once = self._once(tensors)
        return bool(self._guards.check(*once))

    def count(self) -> int:
        return len(self._records)

    def moved(self, tensors: Tensors) -> list[int] | None:
        """Which tensors have other addresses; None where one differs in more than that, or there are no guards yet, so
        that a look at all would take long."""
        if len(tensors) != len(self._records) or self._guards is None or not self._guarded(tensors):
            return None
        addresses = zip(map(_data_ptr, tensors), self._addresses or (), strict=True)
        return [i for i, (now, before) in enumerate(addresses) if now != before]

    def differs(self, number: int, tensor: Tensor) -> bool:
        """Whether a tensor has another record, such as another address or a storage of another size."""
        return _record(tensor) != self._records[number]

    def alike(self, numbers: list[int], tensors: list[Tensor]) -> list[Record] | None:
        """The records of tensors that may replace those; None where one differs in more than its memory."""
        new = list(map(_record, tensors))
        old = [self._records[i] for i in numbers]
        alike = all((*a[:1], *a[2:6], *a[7:]) == (*b[:1], *b[2:6], *b[7:]) for a, b in zip(new, old, strict=True))
        return new if alike else None

    def replace(self, numbers: list[int], records: list[Record]) -> None:
        for i, record in zip(numbers, records, strict=True):
            self._records[i] = record
            if self._addresses is not None:
                self._addresses[i] = record[1]


def _record(tensor: Tensor) -> Record:
    """A record that stays equal as long as the tensor keeps its type and its memory."""
    size = tensor.untyped_storage().nbytes() if has_address(tensor) else 0
    return (type(tensor), *place(tensor), tensor.device, size, tensor.is_conj(), tensor.is_neg(), tensor.is_inference())
