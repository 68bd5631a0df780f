"""EMA, the manager: keeps, evaluates, saves and resumes averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import plan as plans
from ..pairs import shards
from ..pairs.arguments import Buffers, Names, average_index, check_buffers, check_floating, check_names
from ..pairs.pairing import Pairs
from ..plan import Plan
from ..runners.base import Call, one_at_a_time
from ..runners.watch import watch
from ..schedules import Schedule
from . import report
from .attach import Attachment, Manager
from .averages import Averages
from .copying import copy_into, extra_states, placed
from .selection import Select, Selection, as_module, fleeting, lasting, tensors_of
from .state import State, Whose, check_whose, parse
from .swap import Exchange, holds_average
from .timetable import Nonfinite, Rounding, Timetable, schedules_of


class EMA:
    """Exponential moving averages of a model's parameters, in one kernel launch per update.

    Args:
        model: the module that is trained. Its tensors are found by name at each call, and it is never copied, so
            parametrized, wrapped and compiled modules work. Or a dict of names to tensors, such as the float32 master
            weights of an optimizer: `EMA.model` is then a module whose parameters are that dict.
        decay: a number in [0, 1]; a schedule (`fused_ema.schedules`, or any function from the number of the step after
            `update_after_step`, counted from 1, to a decay); or a sequence of up to 8 of them, for as many averages,
            which read each parameter once.
        dtype: of the averages. float32 (the default) or float64: wider parameters keep their own type. bfloat16 or
            float16: all real averages have this type, whatever the parameters'. Complex averages keep the parameter's
            type, complex64 at least.
        device: where the averages lie. None: each on its parameter's device. "cpu", for a model on CUDA devices: in
            pinned memory of the host, which the same kernel writes over the bus. For a model on the CPU it makes no
            difference.
        buffers: "copy" or "ignore": the manager keeps no buffers; wherever some are needed they are the model's.
            "average": floating buffers are averaged as parameters are, except those that are not persistent and the
            vectors of spectral norm's power iteration. Or a function of a name and a buffer that returns one of these,
            for one name always the same. To pickle the manager, pass one that pickle can find by name, no lambda.
        select: `select(name, tensor) -> bool`, called for each name when the manager is made, and by `reselect`; names
            are without the segments of wrappers, and for tied names one yes is enough. A tensor that it turns down
            takes no memory, and the model's own is used in its place. Default: everything real or complex. Where it
            would take a tensor that it turned down while that was frozen, a warning says so once.
        update_every: k moves the averages only at every k-th `update()`, with the k-th power of the decay at that step.
            (A schedule with `per_step = False`, such as `power_function`, gets the number of the update instead of the
            step, and its decay is taken as it is.)
        update_after_step: up to this step the averages are copies of the model; schedules count from here.
        rounding: "nearest" or "stochastic". 16-bit averages stand still when rounded to nearest; stochastic rounding
            goes up or down at random, so that the mean is right. It is reproducible: the random bits depend on `seed`,
            the step and the element alone.
        seed: of stochastic rounding.
        nonfinite: "propagate" or "skip". With "skip", an element of the model that is NaN or infinite leaves its
            average as it is, in the same launch and whatever the decay, so that one bad step does not last. The two
            parts of a complex number are two elements. An average that holds NaN or infinity already is not mended,
            except by a decay of 0. `distance()` counts what is not finite.

    Raises:
        ValueError, TypeError, RuntimeError: an argument or a tensor can't be used. The text names it, and says what was
            expected and what was found.

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
        model: nn.Module | Mapping[str, Tensor],
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
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        model = as_module(model)
        check_floating(dtype)
        self._timetable = Timetable(schedules_of(decay), update_every, update_after_step, rounding, seed, nonfinite)
        if rounding == "stochastic" and dtype.itemsize != 2:
            raise ValueError(f"rounding: expected 'nearest' for averages in {dtype}; 'stochastic' is for 16 bits")
        check_buffers(buffers)
        shards.reshard(model)
        self._model = model
        self._step = 0
        self._fresh = True  # the averages are what the model was, if no step was made
        self._decays: tuple[float, ...] = ()  # of the latest update
        self._plan: Plan | None = None
        self._swap: Exchange | None = None
        self._attachment: Attachment | None = None
        self._selection = Selection(model, buffers, select)
        where = None if device is None else torch.device(device)
        self._averages = Averages(self._selection.chosen(model), len(self.schedules), dtype, where)
        self._refuse_swapped("EMA()")
        self._run(Call("copy", (0.0,) * len(self.schedules)))

    @property
    def model(self) -> nn.Module:
        """The model that is averaged. For another model, make another manager."""
        return self._model

    @property
    def timetable(self) -> Timetable:
        """The options that decide what happens at which step, as a frozen value."""
        return self._timetable

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedule of each average."""
        return self._timetable.schedules

    @property
    def update_every(self) -> int:
        """The number of steps from one move of the averages to the next."""
        return self._timetable.update_every

    @property
    def update_after_step(self) -> int:
        """Up to this step the averages are copies of the model."""
        return self._timetable.update_after_step

    @property
    def rounding(self) -> Rounding:
        """How 16-bit averages are rounded: "nearest" or "stochastic"."""
        return self._timetable.rounding

    @property
    def seed(self) -> int:
        """The seed of stochastic rounding."""
        return self._timetable.seed

    @property
    def nonfinite(self) -> Nonfinite:
        """What elements of the model that are not finite do to their averages: "propagate" or "skip"."""
        return self._timetable.nonfinite

    # ---- Updating

    @property
    def step(self) -> int:
        """Calls of `update` so far."""
        self.wait()
        return self._step

    @property
    def updates(self) -> int:
        """How often the averages have moved: once in `update_every` steps after `update_after_step`."""
        return self._timetable.updates_at(self.step)

    @property
    def decay(self) -> float | tuple[float, ...]:
        """The decay of the latest update, or of the next before there was any; one for each of several averages.

        It can be set, to what `EMA` takes as `decay`: the averages follow that from the next update on.
        """
        self.wait()
        decays = self._decays or self._timetable.decays_at(self._timetable.step_of(self.updates + 1))
        return decays[0] if len(decays) == 1 else decays

    @decay.setter
    def decay(self, decay: float | Schedule | Sequence[float | Schedule]) -> None:
        schedules = schedules_of(decay)
        if len(schedules) != len(self.schedules):
            raise ValueError(f"decay: expected one for each of {len(self.schedules)} averages, found {len(schedules)}")
        with one_at_a_time():
            self.wait()
            self._timetable, self._decays = replace(self._timetable, schedules=schedules), ()

    def update(self) -> None:
        """One step: counts it, asks the schedules, and moves all averages in one kernel launch per device.

        Updates from several threads run one after the other.

        Raises:
            RuntimeError: inside `swapped()`, or while the manager is attached to an optimizer, whose steps update.
            ValueError, TypeError, RuntimeError: a tensor no longer fits its average. Nothing is written or counted.
        """
        if self._attachment:
            raise RuntimeError(
                "EMA.update() was called by hand while the manager is attached to an optimizer, so that a step would "
                "count twice; leave the call out, or call remove() on the handle that attach() returned"
            )
        self._update(None)

    def _update(self, skipped: Tensor | None) -> None:
        """`skipped`, where given: on the averages' device, not 0 where the optimizer's step was skipped."""
        with one_at_a_time():  # so that two threads never make the same step
            self._refuse_swapped("EMA.update()")
            step = self._step + 1
            if self._timetable.moves_at(step):
                decays, keys = self._timetable.decays_at(step), self._timetable.keys_at(step)
                on_device = None if skipped is None else _unless(skipped, decays)
                self._run(Call(self._timetable.op, decays, on_device, keys))
                self._decays = decays
            self._step = step

    def reselect(self, select: Select | None = None) -> tuple[list[str], list[str]]:
        """Applies `select` again, to the model as it is now: after layers were unfrozen, added, removed or widened.

        What is averaged now and was not before begins as a copy of the model. What is gone, or what `select` turns down
        now, is dropped. All else goes on: its averages, the step, the schedules, an attached optimizer. The average of
        a tensor whose shape has changed begins again, as a copy.

        Args:
            select: what chooses from now on; None: the manager's own. A pickle or a deep copy of a manager does not
                keep that, so that it has to be given there.

        Returns:
            The names that begin as copies, and those whose averages were dropped. A tensor of another shape is in both.

        Raises:
            ValueError, TypeError, RuntimeError: `select` takes nothing; or a tensor can't be averaged. Nothing changes.
            RuntimeError: inside `swapped()`.

        Example::

            model.head = nn.Linear(512, 1000)
            added, dropped = ema.reselect()
        """
        with one_at_a_time():
            self.wait()
            shards.reshard(self.model)
            before = self._selection, self._averages, self._plan
            try:
                self._selection = self._selection.again(self.model, select)
                self._averages, fresh = before[1].following(self._selection.chosen(self.model))
                self._refuse_swapped("EMA.reselect()")
                self._keep(self._new_plan())  # checks everything
                if fresh:
                    current = self._current()
                    begun = {name: shards.local(current[name]) for name in fresh}
                    plans.run(None, Call("copy", (0.0,) * len(self.schedules)), self._new_plan, begun)
            except BaseException:
                self._selection, self._averages, self._plan = before
                raise
        added = [name for name in self._averages if name in fresh or name not in before[1]]
        dropped = [name for name in before[1] if name in fresh or name not in self._averages]
        return added, dropped

    def begin(self) -> bool:
        """Begins again from the model as it is now, unless there was an update or the averages were loaded.

        For weights that are loaded after the manager was made: ``ema = EMA(model); ...; model.load_state_dict(state);
        ema.begin()``. It may be called at any time, and does nothing once the averages have a history. An attached
        optimizer calls it before its first step; see `attach`.

        Returns:
            Whether it began again.

        Raises:
            RuntimeError: inside `swapped()`.
        """
        with one_at_a_time():
            self.wait()
            self._refuse_swapped("EMA.begin()")
            if begins := self._fresh and self._step == 0:
                self._run(Call("copy", (0.0,) * len(self.schedules)))
            return begins

    def reset(self, *, keep_step: bool = False) -> None:
        """Begins again from the model as it is now, whatever the averages hold: all of them become copies of it.

        For a new phase of training, say another data set or learning rate. To begin again only if the averages
        have no history yet, call `begin`. An attached optimizer stays attached. Load weights before this call, not
        after it: nothing follows the model from here to the next update.

        Args:
            keep_step: False: the step is 0 again, as in a new manager, so that schedules warm up again and up to
                `update_after_step` the averages are copies. True: step, schedules and random bits go on. (The copies
                then have the weight that `power_function` gives to all earlier updates.)

        Raises:
            ValueError, TypeError, RuntimeError: a tensor no longer fits its average; see `reselect`. Nothing changes.
            RuntimeError: inside `swapped()`.
        """
        with one_at_a_time():
            self.wait()
            self._refuse_swapped("EMA.reset()")
            self._run(Call("copy", (0.0,) * len(self.schedules)))
            self._fresh = True
            if not keep_step:
                self._step, self._decays = 0, ()

    def _begin(self) -> None:
        """`begin`, before the first step of an attached optimizer. A CUDA graph would begin again at each replay."""
        if not (self._cuda_devices() and torch.cuda.is_current_stream_capturing()):
            self.begin()

    # ---- Evaluating

    @contextlib.contextmanager
    def swapped(self, index: int = 0) -> Iterator[nn.Module]:
        """A context in which the model holds the average, in place: its tensors keep their addresses.

        One kernel launch on the way in and one on the way out, which restores the model bitwise whatever the block
        raised. Where an average has its parameter's type, the two exchange values; where not, the parameter's values
        wait in scratch memory (of the host, if the averages are there). So the block may replace the model's tensors,
        but must not train them: what it writes to parameters that exchanged values stays in the average, what it writes
        to the others is discarded, and a warning names them (writes through `.data` are not seen). What it writes to
        buffers that are not averaged stays there: to measure BatchNorm's statistics for the averages, copy the model,
        `copy_to` the copy, and measure them on it. Clone what is taken out of the block: a `state_dict()` of the model,
        or a program traced or exported from it, shares the model's memory and has its own weights again afterwards; a
        warning names a program that outlives the block. `copy.deepcopy(model)`, inside, is a model with the averages
        that stays. Keep a forward pass and its backward pass on one side of a swap; autograd raises otherwise. Yields
        the model.

        Raises:
            RuntimeError: the model is already swapped, by this manager or another. At the end: the block replaced
                tensors by some that can't take the model's own values, and these keep the block's values; or it freed
                memory that held averages, and these start again from the model's values. The error names them; all
                other averages and tensors are restored.
        """
        self.wait()
        self._expect_steps()
        index = self._check_index(index)
        swap: Exchange | None = None
        try:
            with one_at_a_time():
                self._refuse_swapped("EMA.swapped()")
                current = self._current()
                known = {id(tensor) for tensor in current.values()}
                others = {name: tensor for name, tensor in lasting(self.model).items() if id(tensor) not in known}
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
                        tries -= 1  # an interrupt while it waits does not count
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
                    shards.reshard(self.model)  # a forward pass may have gathered some parameters
            finally:
                swap.leave(self._new_plan, lambda: tensors_of(self.model))
        finally:
            if swap.over:
                self._swap = None
                if swap.replaced:
                    self._plan = None  # it still counts the model as swapped

    def copy_to(
        self,
        model: nn.Module | Mapping[str, Tensor] | None = None,
        index: int = 0,
        *,
        names: Names = "equal",
    ) -> None:
        """Writes the average into `model` (default: the one that is averaged), with the casts the dtypes need.

        Another model gets everything: what is not averaged, and what modules have as `get_extra_state`, comes from the
        averaged model, as it is now. Buffers that are not persistent are left out where they differ in shape or only
        one side has them.

        With ``names="common"`` tensors whose name or shape only one side has are left out, and a warning names them
        once.

        Raises:
            ValueError, TypeError: names, shapes or types differ, or tensors that get different values share memory.
                Nothing is written.
            RuntimeError: into the averaged model inside `swapped()`.
        """
        check_names(names)
        model = self._model if model is None or model is self._model._parameters else as_module(model)
        with one_at_a_time():
            self.wait()
            self._expect_steps()
            index = self._check_index(index)
            values = {name: self._average(name, index) for name in self._averages}
            if names == "equal":
                self._current()  # raises where the model's names have changed
            if model is self.model:
                self._refuse_swapped("EMA.copy_to()")
                shards.reshard(self.model)
                into = {name: tensor for name, tensor in tensors_of(self.model).items() if name in values}
                copy_into(placed(values, into, names), into, self._averages)
                return
            shards.reshard(model)
            into = tensors_of(model)
            if holds_average(into.values):
                raise RuntimeError("EMA.copy_to(): the target model is inside swapped(); leave the block first")
            values = tensors_of(self.model) | values
            optional = {*fleeting(self.model), *fleeting(model)}
            extra = extra_states(self.model, model, names)
            copy_into(placed(values, into, names, optional), into, self._averages, extra)

    def averaged_state_dict(self, index: int = 0, *, copy: bool = True) -> dict[str, Any]:
        """`model.state_dict()`, its keys in its order, with the averages in the place of what is averaged.

        Averages keep their own dtype, everything else is the model's, and tied tensors are tied here too. A warning
        names averages that hold NaN or infinity, as in `state_dict`.

        Args:
            index: which average.
            copy: True: all tensors are copies, which later steps and `swapped()` leave alone. False: where they can,
                they share the memory of the averages and of the model, which saves memory for a file that is written
                at once: later steps change them, and inside a later `swapped()` they hold the model's own values.

        Raises:
            RuntimeError: the model's state_dict has no place for some averages.
        """
        self.wait()
        self._expect_steps()
        index = self._check_index(index)
        found = self.model.state_dict(keep_vars=True)  # it may return new tensors for sharded ones
        values = self._by_tensor(index, copy)
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        ids = {id(value) for value in tensors.values()}
        averaged = self._current()
        if missing := [name for name, tensor in averaged.items() if id(tensor) not in ids]:
            raise RuntimeError(
                f"model.state_dict(): expected the parameters themselves, found none for {missing[:5]}; average only "
                "what it has, by ema.reselect(lambda name, tensor: ...), or fill a copy of the model by ema.copy_to"
            )
        report.warn_of_nonfinite([{name: values[id(tensor)] for name, tensor in averaged.items()}], self.nonfinite)
        for key, value in tensors.items():
            if not is_lazy(value):  # a lazy one has no values yet, and is not averaged
                if id(value) not in values:
                    values[id(value)] = value.detach().clone() if copy else value.detach()
                found[key] = values[id(value)]
        return found

    def _by_tensor(self, index: int, copy: bool) -> dict[int, Tensor]:
        """The average of each of the model's tensors, by the tensor's id, in a storage without other averages."""
        averages: dict[int, Tensor] = {}
        for name, tensor in self._current().items():
            if id(tensor) not in averages:
                average, own = self._shard(name, index), self._averages.get(name, index)
                shared = (copy or self._averages.count > 1) and average.data_ptr() == own.data_ptr()
                averages[id(tensor)] = self._averages.as_sharded(name, average.clone() if shared else average)
        return averages

    # ---- Saving

    def state_dict(self) -> dict[str, Any]:
        """Averages, step, schedules and options: tensors, numbers and strings, which load with `weights_only=True`.

        The averages are not copies, as in a module's `state_dict`; inside `swapped()` the one in the model is a copy of
        the true average. Take it where you save it; to return to a state later without a file, `copy.deepcopy` it.

        A warning names averages that hold NaN or infinity; it is no error, since a training must not end at a save. To
        find them, every average is read once, which waits for its device.
        """
        self.wait()
        self._expect_steps()
        self._selection.look(self.model)
        state = self._state()
        report.warn_of_nonfinite(state.averages, self.nonfinite)
        return state.to_dict()

    def load_state_dict(self, saved: Mapping[str, Any], *, schedules: Whose = "saved", names: Names = "equal") -> None:
        """Loads averages, step, schedules and options; later updates give the same bits as in the run that was saved.

        Args:
            saved: what `state_dict()` returned.
            schedules: whose schedules, `update_every`, `update_after_step`, `seed` and `nonfinite` hold from now on.
                "saved": the state's; a warning names those that differ from the manager's. A schedule of your own,
                which a state can't hold, must be the manager's already. "mine": the manager's.
            names: "equal": the state has the averages that the manager has. "common": averages whose name or shape
                only one of them has stay as they are, and a warning names them once.

        A sharded manager takes the state of one process too: each rank cuts its own part out of the whole tensors.
        Averaged weights alone, and the states of other packages, are read by `fused_ema.checkpoints.restore`.

        Raises:
            ValueError: the state was saved with a schedule of your own that the manager lacks, or with another
                rounding; or names, shapes, types or the number of averages differ. Nothing is changed.
            RuntimeError: inside `swapped()`.
        """
        with one_at_a_time():
            self._take(self._parse(saved, schedules, names))

    def _state(self) -> State:
        averages = [{name: self._average(name, k) for name in self._averages} for k in range(self._averages.count)]
        return State(self._step, self._decays, self._timetable, tuple(averages))

    def _parse(self, saved: Any, schedules: Whose, names: Names = "equal") -> State:
        check_names(names)
        self._refuse_swapped("EMA.load_state_dict()")
        self.wait()
        return parse(saved, self._state(), schedules, names)

    @torch.no_grad()
    def _take(self, state: State) -> None:
        self._refuse_swapped("EMA.load_state_dict()")  # another thread may have swapped since
        for own, saved in zip(self._state().averages, state.averages, strict=True):
            for name, value in saved.items():
                own[name].copy_(value)
        self._step, self._decays, self._timetable = state.step, state.decays, state.timetable
        self._fresh = False

    def to(self, device: torch.device | str) -> EMA:
        """Moves the averages, in place, as `model.to(device)` moves the model; returns the manager."""
        with one_at_a_time():
            self._refuse_swapped("EMA.to()")
            self.wait()
            self._averages.to(torch.device(device))
            self._plan = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Names, numbers, tensors, the model and the schedules: a pickle names only public classes of this package."""
        if self._swap or self._attachment:
            raise RuntimeError("EMA: leave swapped() and detach the optimizer before you copy or pickle the manager")
        self.wait()
        return {
            "model": self._model,
            "step": self._step,
            "decays": self._decays,
            "timetable": dict(vars(self._timetable)),
            "selection": self._selection.to_plain(),
            "averages": self._averages.to_plain(),
            "fresh": self._fresh,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._step, self._decays = state["model"], state["step"], state["decays"]
        self._timetable = Timetable(**state["timetable"])
        self._selection = Selection.from_plain(state["selection"])
        self._averages = Averages.from_plain(state["averages"])
        self._plan = self._swap = self._attachment = None
        self._fresh = state.get("fresh", False)  # which earlier versions did not save

    # ---- Hands-free

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        overlap: bool = False,
        save: bool = False,
        *,
        schedules: Whose = "saved",
    ) -> Attachment:
        """Updates after each `optimizer.step()`, except one that a GradScaler skipped.

        `first_step()` and `second_step()` of sharpness-aware optimizers (SAM) are one step together. Where no step was
        seen though the parameters have changed, the first look at the averages warns.

        The first step calls `begin()`, so that weights may be loaded until then, if the optimizer has all averaged
        tensors that are not frozen. It leaves averages alone that something else may have trained before: another
        optimizer or, with averaged buffers, the forward pass. Call `begin()` after loading there.

        Args:
            optimizer: the one that steps last, if there are several; the outermost, if one wraps another. One that has
                none of the model's parameters gives a warning.
            overlap: on CUDA, the update runs on a stream of its own, during the next forward and backward pass, and
                the next optimizer step waits for it. Averages in host memory are always updated so. Every method here
                waits for it too; code that writes to the parameters between steps, or replaces them, calls `wait()`
                first.
            save: the state of the manager is part of `optimizer.state_dict()`, under "fused_ema", and is loaded with
                it. Attach before you load: an optimizer by itself ignores that part. A state without it gives a
                warning, and a manager without a history then begins at the next step; one that does not fit raises what
                `load_state_dict` does. Not with `torch.distributed.checkpoint.state_dict`, which drops that part.
            schedules: with `save`, whose schedules and options hold after loading: see `load_state_dict`.

        Returns:
            A handle, whose `remove()` ends it.

        Raises:
            RuntimeError: already attached. From `optimizer.step()`: inside `swapped()`, before anything moves.
            TypeError: not an optimizer.
        """
        if self._attachment:
            raise RuntimeError("EMA.attach: expected no attached optimizer, found one; call remove() on its handle")
        check_whose(schedules)
        manager = Manager(
            model=self._model,
            on_host=self._averages.on_host,
            cuda_devices=self._cuda_devices,
            refuse_swapped=self._refuse_swapped,
            averaged=lambda: self._current().values(),
            begin=self._begin,
            update=self._update,
            progress=lambda: (self._step, self._decays),
            rewind=self._rewind,
            state_dict=self.state_dict,
            parse=lambda saved: self._parse(saved, schedules),
            take=self._take,
            detached=self._detached,
        )
        self._attachment = Attachment(manager, optimizer, overlap, save)
        return self._attachment

    def _rewind(self, progress: tuple[int, tuple[float, ...]]) -> None:
        self._step, self._decays = progress

    def _detached(self, attachment: Attachment) -> None:
        if self._attachment is attachment:
            self._attachment = None

    def _expect_steps(self) -> None:
        """Warns where the model was trained, but the attached optimizer was not seen to step."""
        if not (self._attachment and self._fresh and self._step == 0 and not self._swap):
            return
        with contextlib.suppress(ValueError):  # the model's names have changed, which calls that need them say
            current = self._current()
            parameters = {id(tensor) for tensor in self.model.parameters()}
            pairs = [(self._shard(name, 0), tensor) for name, tensor in current.items() if id(tensor) in parameters]
            self._attachment.expect_steps(pairs)

    def wait(self) -> None:
        """Makes the current streams wait for the latest update, where that runs on a stream of its own.

        Needed only by code that writes to the parameters between two optimizer steps, or replaces them, with
        `attach(overlap=True)`, and by code that reads averages in host memory: every method here waits by itself.
        """
        if self._attachment:
            self._attachment.join()
        if self._averages.on_host:  # else the host could read what a kernel is still writing
            for device in self._cuda_devices():
                torch.cuda.synchronize(device)

    # ---- Looking

    def describe(self) -> dict[str, Any]:
        """What an update does (see `Binding.describe`), and `averages` (how many), `average_bytes` (that they take),
        `dtype`, `rounding`, `nonfinite`, `schedules`, `decay` (of the latest update), `step`, `updates`, `swapped` (the
        index of the average in the model, or None) and `not_averaged` (the names of all that is the model's own:
        parameters that `select` turned down, and buffers); `problem`, where the model no longer fits."""
        others: list[str] = []
        try:
            plan = (self._plan if self._plan and self._plan.fits() else self._new_plan()).describe()
            others = [name for name in tensors_of(self.model) if name not in self._averages]
        except (ValueError, TypeError, RuntimeError) as problem:
            plan = {"problem": str(problem)}
        return report.describe(
            plan,
            self._averages,
            self._timetable,
            decay=self.decay,
            step=self.step,
            updates=self.updates,
            swapped=self.swapped_index,
            not_averaged=others,
        )

    def __repr__(self) -> str:
        return report.summary(self.describe(), type(self.model).__name__)

    def distance(self, index: int = 0) -> dict[str, float]:
        """How far the average is from the model, whether it still moves, and what is not finite; computed now, in
        float64.

        Returns:
            `relative`: ‖average - model‖ / ‖model‖ over all that is averaged (nan where the model is 0, or where
            something is not finite);
            `still`: the share of elements that differ from the model's and that an update with the latest decay,
            rounded to nearest, would leave as they are;
            `nonfinite_model`, `nonfinite_average`: how many elements are NaN or infinite.

        Raises:
            RuntimeError: inside `swapped()`.
        """
        self._refuse_swapped("EMA.distance()")
        self.wait()
        index = self._check_index(index)
        decays = self.decay
        current = self._current()
        pairs = ((name, self._shard(name, index), current[name]) for name in self._averages.untied())
        return report.distance(pairs, decays[index] if isinstance(decays, tuple) else decays, self.nonfinite)

    # ---- Inside

    def _current(self) -> dict[str, Tensor]:
        """The model's tensors that are averaged; raises where its names have changed since the manager was made."""
        current = self._selection.chosen(self.model)
        if self._averages.gathered(current):  # FSDP2 leaves the outermost ones so after a forward pass alone
            shards.reshard(self.model)
            current = self._selection.chosen(self.model)
        for name, (ours, theirs) in self._averages.reshaped(current).items():
            raise ValueError(
                f"model[{name!r}]: expected shape {tuple(ours)}, as its average has, found {tuple(theirs)}; call "
                "ema.reselect(), which begins this average again, as a copy"
            )
        return current

    def _cuda_devices(self) -> list[torch.device]:
        """The CUDA devices that updates run on."""
        if not self._averages.on_host:
            return self._averages.cuda_devices()
        return list(dict.fromkeys(tensor.device for tensor in tensors_of(self.model).values() if tensor.is_cuda))

    def _average(self, name: str, k: int) -> Tensor:
        """The true average; inside `swapped()` a copy of what is in the model."""
        return self._averages.as_sharded(name, self._shard(name, k))

    def _shard(self, name: str, k: int) -> Tensor:
        """The true average's shard on this rank."""
        average = self._averages.get(name, k)
        return self._swap.true_average(name, k, average) if self._swap else average

    def _run(self, call: Call) -> None:
        self._keep(plans.run(self._plan, call, lambda _: self._new_plan(), self.model))

    def _keep(self, plan: Plan) -> None:
        self._plan = plan if plan.lasts else None

    def _new_plan(self, given: Mapping[str, Tensor] | None = None) -> Plan:
        """A plan for the model, or for tensors `given` by name in the place of its own, as the shards on this rank."""
        names = list(self._averages if given is None else given)
        firsts = self._averages.firsts(names)
        watched = None
        if given is None:
            if self._averages.sharded():
                self._current()  # reshards what FSDP2 left gathered, before it is watched
            watched = watch(self.model, firsts)
            current = self._current()
            tensors = [current[name] for name in names]
        else:
            tensors = [self._averages.as_sharded(name, given[name]) for name in names]
        pairs = Pairs([f"[{name!r}]" for name in names], firsts, tensors, [True] * len(names))
        return Plan(
            pairs,
            watched or watch(tensors, firsts),
            lasts=watched is not None,
            averages=self._averages.count,
            strides=self._averages.strides(names),
            free_types=True,
            by_name=True,
        )

    def _check_index(self, index: int) -> int:
        return average_index(index, len(self.schedules))

    def _refuse_swapped(self, call: str) -> None:
        if self._swap:
            raise RuntimeError(f"{call} was called inside swapped(); leave the block first")
        if holds_average(lambda: self._current().values()):
            raise RuntimeError(f"{call} was called inside another manager's swapped(); leave that block first")


def _unless(skipped: Tensor, decays: tuple[float, ...]) -> Tensor:
    """The decays on the device; 1 where the step was skipped, which leaves the averages as they are."""
    skip = skipped.reshape(()) != 0
    return torch.stack([torch.where(skip, 1.0, torch.full_like(skip, d, dtype=torch.float64)) for d in decays])
