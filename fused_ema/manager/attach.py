"""What `EMA.attach` returns: the hooks on an optimizer, and an update on a stream of its own."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._warning import warn
from ..pairs.checks import equal_values
from ..pairs.shards import local
from ..runners.base import one_at_a_time
from .state import State

Undo = Callable[[], None]
STATE = "fused_ema"  # the key of the averages in the state of an optimizer
# The parts of a step of sharpness-aware optimizers; the last of those that there are ends the step.
PHASES = ("first_step", "second_step", "third_step")


class Manager(NamedTuple):
    """What an attachment needs of the manager that it updates."""

    model: nn.Module
    on_host: bool  # whether the averages of a model on CUDA devices lie in host memory
    cuda_devices: Callable[[], list[torch.device]]  # the devices that updates run on
    refuse_swapped: Callable[[str], None]  # raises inside swapped(), for the call of that name
    averaged: Callable[[], Iterable[Tensor]]  # the model's tensors that are averaged
    begin: Callable[[], None]  # copies the model, unless the averages have a history
    update: Callable[[Tensor | None], None]  # one step; a tensor that is not 0 says that the optimizer skipped its own
    progress: Callable[[], Any]  # what the next update changes besides the averages
    rewind: Callable[[Any], None]  # restores such progress, because the latest update changed no average
    state_dict: Callable[[], dict[str, Any]]
    parse: Callable[[Any], State]  # raises where a saved state does not fit
    take: Callable[[State], None]
    detached: Callable[[Attachment], None]  # called when the attachment has ended


class _News(NamedTuple):
    """A copy on its way from the device, which says whether the latest step was skipped; and what to restore then."""

    skipped: Tensor
    arrived: torch.cuda.Event
    before: object


class Attachment:
    """A manager that updates after each step of an optimizer, until `remove()`.

    Where `optimizer` wraps another (as accelerate's, Lookahead and SAM do), the innermost one knows which steps were
    skipped; the update runs once the outermost has returned, which may write to the parameters last.
    """

    def __init__(self, manager: Manager, optimizer: torch.optim.Optimizer, overlap: bool, save: bool) -> None:
        layers: list[Any] = [optimizer]
        while (wrapped := _wrapped_by(layers[-1])) and wrapped not in layers:
            layers.append(wrapped)
        inner = layers[-1]
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, found {type(inner).__name__}")
        averaged = {id(tensor) for tensor in manager.model.parameters()}
        self._layers = layers
        if averaged and averaged.isdisjoint(self._stepped()):
            # Not an error: some optimizers step copies of the parameters in higher precision.
            warn(
                "EMA.attach: the optimizer has none of the averaged model's parameters in its groups; was it made for "
                "another model?"
            )
        self._manager = manager
        self._overlap = overlap or manager.on_host  # the bus is slow: nothing on the device should wait for it
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: list[tuple[torch.device, torch.cuda.Event]] = []  # of an update on other streams
        self._news: _News | None = None
        self._loading: State | None = None  # in the state that the optimizer is loading
        self._rehearsed = False  # the running step trains nothing
        self._first = True  # the next step may begin the averages
        self._left_out = False  # the averages, by the state that the optimizer has loaded
        self._running = 0  # calls of step() in layers, which may be nested
        self._pending: tuple[Tensor | None] | None = None  # found_inf of a step whose update has yet to run
        self._optimizer = type(optimizer).__name__
        self._warned = False
        if not getattr(type(inner).step, "hooked", False):  # its __init__ did not call torch's
            inner._patch_step_function()
        for name in torch.optim.Optimizer.__annotations__:
            if name.endswith("_hooks"):
                vars(inner).setdefault(name, OrderedDict())
        self._undo: list[Undo] = [
            inner.register_step_pre_hook(self._before_step).remove,
            inner.register_step_post_hook(self._after_step).remove,
        ]
        if save:  # with each layer whose state torch makes, since not all pass the innermost one's on
            keepers = [each for each in layers if "_optimizer_state_dict_post_hooks" in vars(each)]
            hooks = [hook for each in keepers for hook in each._optimizer_state_dict_post_hooks.values()]
            if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
                self.remove()
                raise ValueError(
                    "EMA.attach: another manager already saves with this optimizer; only one can have save=True"
                )
            for each in keepers:
                self._undo += [
                    each.register_state_dict_post_hook(self._save).remove,
                    each.register_load_state_dict_pre_hook(self._check_loaded).remove,
                    each.register_load_state_dict_post_hook(self._load).remove,
                ]
        # Where a class and its base both define step(), torch runs the hooks after each of the two.
        steps = [kind for kind in type(inner).__mro__ if "step" in vars(kind) and kind is not torch.optim.Optimizer]
        phases = [name for name in PHASES if hasattr(inner, name)]
        for each in layers if phases or len(steps) > 1 else layers[:-1]:
            for name in ("step", *PHASES):
                if hasattr(each, name):
                    ends = each is inner and name in phases[-1:]  # in which the hooked step() may not run
                    self._undo.append(_wrap(each, name, self._around_end if ends else self._around_step))

    def remove(self) -> None:
        """Ends the attachment, after an update that may be running. A second call does nothing."""
        self.join()
        for undo in self._undo:
            undo()
        self._undo = []
        self._manager.detached(self)

    def join(self) -> None:
        """Makes the current streams wait for the update on the others, and learns whether its step was skipped."""
        if self._news:
            skipped, arrived, before = self._news
            self._news = None
            arrived.synchronize()  # recorded a step ago
            if skipped.item():
                self._manager.rewind(before)
        for device, event in self._done:
            torch.cuda.current_stream(device).wait_event(event)
        self._done = []

    def expect_steps(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Warns once where parameters differ from the averages that were made of them and that never moved since."""
        if not self._warned and any(not equal_values(own, local(p).detach().to(own)) for own, p in pairs):
            self._warned = True
            warn(
                "EMA: the model's parameters have changed since the averages were copied from them, but the attached "
                f"{self._optimizer} was not seen to step, so the averages are still those weights. If it trains "
                "the model without a call of step(), call remove() on the handle that attach() returned, and "
                "ema.update() after each training step; if the weights were loaded, call ema.begin() after that."
            )

    def _save(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE: self._manager.state_dict()}

    def _check_loaded(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Runs before the optimizer checks its own part, so that either both are loaded or neither."""
        self._loading = None
        if STATE in state:
            try:
                self._loading = self._manager.parse(state[STATE])
            except ValueError as problem:
                raise ValueError(f"{problem} (`state`: what optimizer_state.pop({STATE!r}) returns)") from problem
        else:
            warn(
                f"EMA.attach: the optimizer's state has no averages under {STATE!r}; the manager keeps those it has, "
                "or begins with the weights that are there at the next step, if it was neither updated nor loaded yet"
            )
        return {key: value for key, value in state.items() if key != STATE}

    def _load(self, _: torch.optim.Optimizer) -> None:
        state, self._loading = self._loading, None
        self._left_out = state is None
        if state:
            with one_at_a_time():
                self._manager.take(state)
        else:
            self._first = True

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rehearsed = not optimizer.state and _makes_state()
        self._prepare()

    def _prepare(self) -> None:
        self._manager.refuse_swapped("optimizer.step(), which would train the averages,")
        if self._overlap:
            self.join()
        # Once, since the second part of SAM's step finds weights that are not the model's own.
        if self._first and not self._running and not _makes_state():
            if self._left_out or self._trains_all():
                self._manager.begin()
            self._first = False

    def _stepped(self) -> set[int]:
        """The ids of all tensors that the optimizer has in its groups."""
        groups = (group for each in self._layers for group in getattr(each, "param_groups", ()))
        return {id(tensor) for group in groups for tensor in group["params"]}

    def _trains_all(self) -> bool:
        """Whether nothing but this optimizer can have trained what is averaged: no other one, no forward pass."""
        stepped = self._stepped()
        frozen = {id(tensor) for tensor in self._manager.model.parameters() if not tensor.requires_grad}
        return all(id(tensor) in stepped or id(tensor) in frozen for tensor in self._manager.averaged())

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._rehearsed:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        found = found_inf if isinstance(found_inf, Tensor) else None
        if self._running:
            self._pending = (found,)
        else:
            self._update(found)

    @contextlib.contextmanager
    def _around_step(self) -> Iterator[None]:
        if not self._running:
            self._pending = None  # left by a call that raised
            self._prepare()  # a wrapper may write to the parameters before the innermost step
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
        if self._pending and not self._running:
            (found_inf,), self._pending = self._pending, None
            self._update(found_inf)

    @contextlib.contextmanager
    def _around_end(self) -> Iterator[None]:
        with self._around_step():
            yield
            self._pending = self._pending or (None,)

    def _update(self, found_inf: Tensor | None) -> None:
        # A GradScaler does not call step() where gradients overflowed, except for optimizers that skip by themselves:
        # they get a tensor that says so.
        self.join()
        if found_inf is not None and not found_inf.is_cuda:
            if found_inf.item():
                return
            found_inf = None
        devices = self._manager.cuda_devices() if self._overlap or found_inf is not None else []
        if found_inf is not None and devices != [found_inf.device]:
            if found_inf.item():  # averages on other devices can't read it
                return
            found_inf = None
        before = self._manager.progress()
        with contextlib.ExitStack() as streams:
            if self._overlap:
                for device in devices:
                    if device not in self._streams:
                        self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                    stream = self._streams[device]
                    stream.wait_stream(torch.cuda.current_stream(device))
                    streams.enter_context(torch.cuda.stream(stream))
                    if found_inf is not None:
                        found_inf.record_stream(stream)  # the scaler frees it when the step returns
            self._manager.update(found_inf)
            if found_inf is not None:
                skipped = torch.empty(found_inf.shape, dtype=found_inf.dtype, pin_memory=True)
                skipped.copy_(found_inf, non_blocking=True)
                self._news = _News(skipped, torch.cuda.current_stream(found_inf.device).record_event(), before)
            if self._overlap:
                self._done = [(device, self._streams[device].record_event()) for device in devices]


def _wrapped_by(optimizer: Any) -> Any:
    """The optimizer that this one holds, under whatever name; None where it holds none or several."""
    values = [*getattr(optimizer, "__dict__", {}).values(), getattr(optimizer, "optimizer", None)]
    held = {id(each): each for each in values if hasattr(each, "param_groups") and hasattr(each, "step")}
    return held.popitem()[1] if len(held) == 1 else None


def _wrap(optimizer: Any, name: str, around: Callable[[], contextlib.AbstractContextManager[Any]]) -> Undo:
    """Runs every call of that method within `around()`; returns a function that ends this."""
    original, of_the_object = getattr(optimizer, name), name in vars(optimizer)
    active = [True]

    @functools.wraps(original)
    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        with around() if active else contextlib.nullcontext():
            return original(*args, **kwargs)

    wrapped = types.MethodType(call, optimizer)  # a method, since learning-rate schedulers wrap step() again

    def undo() -> None:
        active.clear()
        if vars(optimizer).get(name) is wrapped:  # else someone else's wrapper keeps it
            if of_the_object:
                setattr(optimizer, name, original)
            else:
                delattr(optimizer, name)

    setattr(optimizer, name, wrapped)
    return undo


def _makes_state() -> bool:
    """Whether this is the step, with gradients of 0, by which torch.distributed.checkpoint makes an optimizer's state.

    Only the call stack tells; without a look at it each resumed sharded run would count one step too many.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_name != "_init_optim_state":
        frame = frame.f_back
    return frame is not None
