"""EMA: the manager. Averages that are easy to keep, evaluate, save and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..pairs import shards
from ..pairs.arguments import average_index, check_buffers
from ..pairs.checks import check_targets, check_tensor, dtype_name, write_refusal
from ..pairs.pairing import Pairs, difference
from ..plan import Buffers, Call, OpName, Plan, one_at_a_time, watch, watchable
from ..schedules import Schedule
from . import report as view
from . import state
from .attach import Attachment
from .averages import Averages
from .selection import Select, Selection, tensors_of
from .swap import Exchange, exchanging, hold_average
from .timetable import Rounding, Timetable, schedules_of


class EMA:
    """Exponential moving averages of a model's parameters, in one kernel launch per update.

    Args:
        model: the module that is trained. Its tensors are found by name at each call; it is never copied, so that
            parametrized, wrapped and compiled modules work.
        decay: a number in [0, 1], a schedule (`fused_ema.schedules`, or any function from the number of the step after
            `update_after_step`, counted from 1, to a decay), or up to 8 of them: as many averages, for which each
            parameter is read once.
        dtype: of the averages: float32 (the default) or float64, in which wider parameters keep their own type, or
            bfloat16 or float16, in which all real ones are kept. Complex ones keep theirs, complex64 at least.
        device: None: each average lies on its parameter's device. "cpu", for a model on CUDA devices: in pinned memory
            of the host, written by the same kernel over the bus. For a model on the CPU it makes no difference.
        buffers: "copy" or "ignore": buffers are not kept, wherever they are needed they are the model's. "average":
            floating buffers are averaged as parameters are, but for those that are not persistent.
        select: `select(name, tensor) -> bool`, asked when the manager is made for each name, which is without the
            segments of wrappers; of tied names, one yes is enough. What it turns down takes no memory, and counts as
            the model's. Default: everything real or complex.
        update_every: k: only each k-th `update()` moves the averages, with the k-th power of the decay at that step.
            (Schedules with `per_step = False`, as `power_function`, are asked by the number of the update instead, and
            their decay is taken as it is.)
        update_after_step: up to this step the averages are copies of the model; schedules count from here.
        rounding: "nearest", or "stochastic" for averages in 16 bits, which stand still with the former: up or down by
            chance, so that the mean is right. Reproducible: the bits depend on `seed`, the step and the element alone.
        seed: of stochastic rounding.

    Raises:
        ValueError, TypeError, RuntimeError: the argument or the tensor that can't be used, what was expected and what
            was found.

    Equivalent to::

        averages = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        ...                                          # at each step
        for name, p in model.named_parameters():
            averages[name].lerp_(p.detach().float(), 1 - decay)

    Example::

        ema = fused_ema.EMA(model, decay=0.9999)
        for batch in loader:
            ...
            optimizer.step()
            ema.update()
        with ema.swapped():
            validate(model)
        torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, path)     # to go on
        torch.save(ema.averaged_state_dict(), path)                                  # to use: a model's state
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule | Sequence[float | Schedule] = 0.9999,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffers: Buffers = "copy",
        select: Select | None = None,
        update_every: int = 1,
        update_after_step: int = 0,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, found {dtype}")
        if rounding == "stochastic" and dtype.itemsize != 2:
            raise ValueError(f"rounding: expected 'nearest' for averages in {dtype}; 'stochastic' is for 16 bits")
        check_buffers(buffers)
        shards.reshard(model)
        self._model = model
        self._timetable = Timetable(schedules_of(decay), update_every, update_after_step, rounding, seed)
        self._step = 0
        self._decays: tuple[float, ...] = ()  # of the latest update
        self._plan: Plan | None = None
        self._swap: Exchange | None = None
        self._attachment: Attachment | None = None
        self._selection = Selection(model, buffers, select)
        where = None if device is None else torch.device(device)
        self._averages = Averages(self._selection.chosen(model), len(self.schedules), dtype, where)
        self._check_unswapped("__init__")
        self._run("copy", Call((0.0,) * len(self.schedules)))

    @property
    def model(self) -> nn.Module:
        """The one that is averaged. Another one takes another manager."""
        return self._model

    @property
    def timetable(self) -> Timetable:
        """From the step to decays, keys of random bits, and updates: the options that decide it, as a frozen value."""
        return self._timetable

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedule of each average."""
        return self._timetable.schedules

    @property
    def update_every(self) -> int:
        """Each so-many-th step moves the averages."""
        return self._timetable.update_every

    @property
    def update_after_step(self) -> int:
        """Up to this step the averages are copies of the model."""
        return self._timetable.update_after_step

    @property
    def rounding(self) -> Rounding:
        """ "nearest" or "stochastic"."""
        return self._timetable.rounding

    @property
    def seed(self) -> int:
        """The seed of stochastic rounding."""
        return self._timetable.seed

    # ---- Updating

    @property
    def step(self) -> int:
        """Calls of `update` so far."""
        self._join()
        return self._step

    @property
    def updates(self) -> int:
        """How often the averages were moved: after `update_after_step`, once in `update_every` steps."""
        return self._timetable.updates_at(self.step)

    @property
    def decay(self) -> float | tuple[float, ...]:
        """The decay of the latest update (before one: of the first), one for each average where there are several."""
        self._join()
        decays = self._decays or self._timetable.decays_at(self._timetable.step_of(1))
        return decays[0] if len(decays) == 1 else decays

    def update(self) -> None:
        """One step: counts it, asks the schedules, and moves all averages in one kernel launch per device.

        Threads take turns.

        Raises:
            RuntimeError: while swapped.
            ValueError, TypeError, RuntimeError: a tensor no longer fits its average. Nothing is written or counted.
        """
        if self._attachment:
            self._attachment.join()
        self._update_attached(None)

    def _update_attached(self, skipped: Tensor | None) -> None:
        """`skipped`, where given: on the averages' device, not 0 where the optimizer's step was skipped."""
        with one_at_a_time():  # else two threads would make the same step
            self._check_unswapped("update")
            step = self._step + 1
            if self._timetable.moves_at(step):
                decays, keys = self._timetable.decays_at(step), self._timetable.keys_at(step)
                on_device = None if skipped is None else _unless(skipped, decays)
                self._run("update_stochastic" if keys else "update", Call(decays, on_device, keys))
                self._decays = decays
            self._step = step

    # ---- Evaluating

    @contextlib.contextmanager
    def swapped(self, index: int = 0) -> Iterator[nn.Module]:
        """A context in which the model holds the average, in place: its tensors keep their addresses.

        One kernel launch on the way in and one on the way out, which restores the model bitwise, whatever the block
        raised. Where an average has its parameter's type the two exchange values; where not, the parameter's bytes are
        kept aside meanwhile. So the block may replace the model's tensors, but must not train them: what it writes to
        those that exchanged values stays in the average, and what it writes to the others is gone afterwards, with a
        warning each (not seen: writes through `.data`). What it writes to buffers that are not averaged stays there:
        for BatchNorm's statistics of the averages, copy the model, `copy_to` the copy, and measure them there. A
        forward pass and its backward pass belong on one side of a swap; autograd sees it otherwise, and raises. Gives
        the model.

        Raises:
            RuntimeError: already swapped, by this manager or another. At the end: the block replaced tensors by some of
                other shapes, or put them where others lie, and they keep its values; or it freed memory that averages
                were in, which begin anew with the model's values. All other averages and tensors are what they were.
        """
        self._join()
        index = self._check_index(index)
        swap: Exchange | None = None
        try:
            with one_at_a_time():
                self._check_unswapped("swapped")
                current = self._current()
                averaged = {id(tensor) for tensor in current.values()}
                others = {name: tensor for name, tensor in self.model.named_buffers() if id(tensor) not in averaged}
                swap = Exchange(self._averages, index, current, others)
                self._swap = swap
                self._keep(swap.enter(self._plan, self._new_plan))
            yield self.model
        finally:
            problem: BaseException | None = None
            tries = 3
            while swap is not None and self._swap is swap and tries:  # no call here, which Ctrl-C could interrupt
                try:
                    with one_at_a_time():
                        tries -= 1  # not where it is interrupted while it waits
                        self._leave(swap)
                except BaseException as found:
                    problem = found
            if problem:
                raise problem

    @property
    def swapped_index(self) -> int | None:
        """The index of the average that is in the model now, inside `swapped()`; None outside."""
        return self._swap.index if self._swap else None

    def _leave(self, swap: Exchange) -> None:
        try:
            try:
                if self._averages.sharded():
                    shards.reshard(self.model)  # of which a forward pass may have made some whole
            finally:
                swap.leave(self._new_plan, lambda: tensors_of(self.model))
        finally:
            if swap.over:
                self._swap = None
                if swap.replaced:
                    self._plan = None  # it takes the model for swapped still

    def copy_to(self, model: nn.Module | None = None, index: int = 0) -> None:
        """Writes the average into `model` (default: the one that is averaged), with the casts the dtypes need.

        Another model gets everything: what is not averaged comes from the averaged model, as it is now.

        Raises:
            ValueError, TypeError: names, shapes or types differ, or tensors share memory that get different values.
                Nothing is written.
            RuntimeError: into the averaged model while it is swapped.
        """
        with one_at_a_time():
            self._copy_to(model, index)

    def _copy_to(self, model: nn.Module | None, index: int) -> None:
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
        self._join()
        index = self._check_index(index)
        target = self.model if model is None else model
        values = {name: self._average(name, index) for name in self._averages}
        self._current()  # or raises
        shards.reshard(target)
        if target is self.model:
            self._check_unswapped("copy_to")
        else:
            values = {name: values.get(name, tensor) for name, tensor in tensors_of(self.model).items()}
        into = tensors_of(target)
        if target is not self.model and hold_average(into.values()):
            raise RuntimeError("EMA.copy_to: expected a model with its own weights, found it swapped with averages")
        if target is not self.model and (differ := difference(into, values, "the model", "what was averaged")):
            raise ValueError(f"EMA.copy_to: expected the same names, found {differ}")
        for name, value in values.items():
            check_tensor(f"the average or averaged model[{name!r}]", value)
            check_tensor(f"model[{name!r}]", into[name])
            if refusal := write_refusal(f"model[{name!r}]", into[name]):
                raise refusal
            if not torch.can_cast(value.dtype, into[name].dtype):
                ours, kind = dtype_name(value), dtype_name(into[name])
                raise TypeError(f"model[{name!r}]: expected a type that {ours} casts to, found {kind}")
            if refusal := shards.refusal(f"model[{name!r}]", into[name], value):
                raise refusal
            if into[name].shape != value.shape:
                wanted, found = tuple(value.shape), tuple(into[name].shape)
                raise ValueError(f"model[{name!r}]: expected shape {wanted}, as the average's, found {found}")
        check_targets(values, into, self._averages)
        torch.clear_autocast_cache()  # of 16-bit copies of what the model held before
        with torch.no_grad():
            for name, value in values.items():
                into[name].copy_(value)

    def averaged_state_dict(self, index: int = 0) -> dict[str, Any]:
        """`model.state_dict()`, its keys in its order, with the averages in the place of what is averaged.

        Averages are in their own dtype; not copies, but where there are several, or while they are in the model. Tied
        ones are tied here too. The rest is the model's.

        Raises:
            RuntimeError: the model's state_dict has no place for some averages.
        """
        self._join()
        index = self._check_index(index)
        found = self.model.state_dict(keep_vars=True)  # which may make other tensors of sharded ones
        averages = self._by_tensor(index)
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        ids = {id(value) for value in tensors.values()}
        if missing := [name for name, tensor in self._current().items() if id(tensor) not in ids]:
            raise RuntimeError(f"model.state_dict(): expected the parameters themselves, found none for {missing[:5]}")
        for key, value in tensors.items():
            if not is_lazy(value):  # which is left out, and has no values yet
                found[key] = averages.get(id(value), value.detach())
        return found

    def _by_tensor(self, index: int) -> dict[int, Tensor]:
        """The average of each of the model's tensors, by its id, in memory that torch.save writes no more of."""
        averages: dict[int, Tensor] = {}
        for name, tensor in self._current().items():
            if id(tensor) not in averages:
                average, own = self._shard(name, index), self._averages.get(name, index)
                shared = self._averages.count > 1 and average.data_ptr() == own.data_ptr()
                averages[id(tensor)] = self._averages.spread(name, average.clone() if shared else average)
        return averages

    # ---- Saving

    def state_dict(self) -> dict[str, Any]:
        """Averages, step, schedules and options: tensors, numbers and strings, which load with `weights_only=True`.

        The averages are not copies, as in a module's `state_dict`, but while they are in the model, swapped: those are
        copies, and the true ones. To come back to a state without a file, `copy.deepcopy` it.
        """
        self._join()
        return state.to_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes over averages, step, schedules and options, so that it goes on with the bits it would have had.

        Schedules of `fused_ema.schedules` take the place of those there are; one of your own, which a state can't hold,
        has to be there already. To go on with other decays, put those into it first:
        ``saved["schedules"] = ema.state_dict()["schedules"]``.

        Raises:
            ValueError: a schedule of your own was saved and is not there; other names, shapes, wider types or another
                number of averages: the differences. Nothing is changed.
            RuntimeError: while swapped.
        """
        with one_at_a_time():
            self._checked_state(saved)()

    def _checked_state(self, saved: Any) -> Callable[[], None]:
        """What takes it over, which fails where it is swapped by then."""
        self._check_unswapped("load_state_dict")
        self._join()
        return state.checked(self, saved)

    def to(self, device: torch.device | str) -> EMA:
        """Moves the averages, in place, as `model.to(device)` moves the model; returns the manager."""
        with one_at_a_time():
            self._check_unswapped("to")
            self._join()
            self._averages.to(torch.device(device))
            self._plan = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._swap or self._attachment:
            raise RuntimeError("EMA: expected neither a swap nor an attached optimizer while it is copied or pickled")
        self._join()
        return {**self.__dict__, "_plan": None}

    # ---- Hands-free

    def attach(self, optimizer: torch.optim.Optimizer, overlap: bool = False, save: bool = False) -> Attachment:
        """Updates after each `optimizer.step()`: not after one that a GradScaler skipped.

        Args:
            optimizer: the one that steps last, where there are several; of one that wraps another, the outermost. A
                warning says where it has none of the model's parameters.
            overlap: on CUDA, the update runs on a stream of its own, during the next forward and backward pass, and
                the next optimizer step waits for it; always so for averages in host memory. Everything here waits for
                it too; what else writes to the parameters between steps, or replaces them, has to read `step` first,
                which does.
            save: the state of the manager is part of `optimizer.state_dict()`, under "fused_ema", and is loaded with
                it. Attach first: an optimizer by itself ignores that part. It warns of a state without it, and raises
                what `load_state_dict` does. Not with `torch.distributed.checkpoint.state_dict`, which drops it.

        Returns:
            A handle, whose `remove()` ends it.

        Raises:
            RuntimeError: already attached. From `optimizer.step()`: while swapped, before anything moves.
            TypeError: not an optimizer.
        """
        if self._attachment:
            raise RuntimeError("EMA.attach: expected no attached optimizer, found one; call remove() on its handle")
        self._attachment = Attachment(self, optimizer, overlap, save)
        return self._attachment

    def wait(self) -> None:
        """Makes what comes next on the current streams see the latest update, where one runs on a stream of its own.

        Needed only by code that writes to the parameters between two optimizer steps, or replaces them, with
        `attach(overlap=True)`, and by code that reads averages in host memory; every method here does it by itself.
        """
        self._join()

    def _join(self) -> None:
        """Waits for what still writes to the averages, and for the news of whether the latest step was skipped."""
        if self._attachment:
            self._attachment.join()
        if self._averages.on_host:  # the host would read what a kernel is still writing
            for device in self._cuda_devices():
                torch.cuda.synchronize(device)

    # ---- Looking

    def describe(self) -> dict[str, Any]:
        """What an update does (see `Binding.describe`), and `averages` (how many), `average_bytes` (that they take),
        `dtype`, `rounding`, `schedules`, `decay` (of the latest update), `step`, `updates`, `swapped` (the index of the
        average in the model, or None) and `not_averaged` (names); `problem`, where the model has other names."""
        return view.describe(self)

    def __repr__(self) -> str:
        return view.summary(self)

    def distance(self, index: int = 0) -> dict[str, float]:
        """How far the average is from the model, and whether it still moves; computed now, in float64.

        Returns:
            `relative`: ‖average - model‖ / ‖model‖ over all that is averaged (nan where the model is 0);
            `still`: the share of elements that differ from the model's and that an update with the latest decay,
            rounded to nearest, would leave as they are.

        Raises:
            RuntimeError: while swapped.
        """
        self._check_unswapped("distance")
        self._join()
        return view.distance(self, self._check_index(index))

    # ---- Inside

    def _current(self) -> dict[str, Tensor]:
        """The model's tensors that are averaged; raises where the names are others than when the manager was made."""
        current = self._selection.chosen(self.model)
        if self._averages.gathered(current):  # FSDP2 keeps the outermost ones so after a forward pass alone
            shards.reshard(self.model)
            current = self._selection.chosen(self.model)
        return current

    def _cuda_devices(self) -> list[torch.device]:
        """Those that updates run on."""
        if not self._averages.on_host:
            return self._averages.cuda_devices()
        return list(dict.fromkeys(tensor.device for tensor in tensors_of(self.model).values() if tensor.is_cuda))

    def _average(self, name: str, k: int) -> Tensor:
        """The true average, whether swapped or not; a copy where it is in the model."""
        return self._averages.spread(name, self._shard(name, k))

    def _shard(self, name: str, k: int) -> Tensor:
        """What of it lies on this rank."""
        average = self._averages.get(name, k)
        return self._swap.true_average(name, k, average) if self._swap else average

    def _run(self, op: OpName, call: Call) -> None:
        if self._plan and self._plan.run_call(op, call):
            return
        plan = self._new_plan()
        plan.run_call(op, call, fresh=True)
        self._keep(plan)

    def _keep(self, plan: Plan) -> None:
        self._plan = plan if plan.reusable and watchable(self.model) else None

    def _fitting_plan(self) -> Plan:
        return self._plan if self._plan and self._plan.current() else self._new_plan()

    def _new_plan(self, tensors: Sequence[Tensor] | None = None) -> Plan:
        """For the model, or for `tensors` (of sharded ones, what lies on this rank) in the place of its own."""
        names, firsts = list(self._averages), self._averages.firsts()
        watched = None
        if tensors is None:
            if self._averages.sharded():
                self._current()  # makes shards of what FSDP2 kept whole, before it is looked at
            watched = watch(self.model, firsts)
            current = self._current()
            tensors = [current[name] for name in names]
        else:
            tensors = [self._averages.spread(name, shard) for name, shard in zip(names, tensors, strict=True)]
        if watched is None:  # as for a script module: its tensors are, for the one run that such a plan is good for
            watched = watch(list(tensors), firsts)
        pairs = Pairs([f"[{name!r}]" for name in names], firsts, list(tensors), [True] * len(names))
        return Plan(
            pairs,
            "average",
            watched,
            averages=self._averages.count,
            next_averages=self._averages.apart(),
            free_types=True,
        )

    def _check_index(self, index: int) -> int:
        return average_index(index, len(self.schedules))

    def _check_unswapped(self, member: str, why: str = "") -> None:
        if self._swap:
            raise RuntimeError(
                f"EMA.{member}: {why}expected the model's own weights, found it swapped with the averages"
            )
        if exchanging() and hold_average(self._current().values()):
            raise RuntimeError(
                f"EMA.{member}: {why}expected the model's own weights, found it swapped with another manager's averages"
            )


def _unless(skipped: Tensor, decays: tuple[float, ...]) -> Tensor:
    """The decays on the device; 1 where the step was skipped, which leaves the averages as they are."""
    skip = skipped.reshape(()) != 0
    return torch.stack([torch.where(skip, 1.0, torch.full_like(skip, d, dtype=torch.float64)) for d in decays])
