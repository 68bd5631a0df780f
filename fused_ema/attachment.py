"""What `EMA.attach` returns: the hooks on an optimizer, and an update on a stream of its own."""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ema import EMA


class Attachment:
    """A manager that updates after each step of an optimizer, until `remove()`."""

    def __init__(self, ema: EMA, optimizer: torch.optim.Optimizer, overlap: bool) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # a wrapper such as accelerate's, whose own hooks never run
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, found {type(optimizer).__name__}")
        ours = {id(tensor) for tensor in ema.model.parameters()}
        if ours and not any(id(tensor) in ours for group in optimizer.param_groups for tensor in group["params"]):
            # Not an error: some optimizers step copies of the parameters in higher precision.
            warnings.warn(
                "EMA.attach: expected an optimizer of the averaged model's parameters, found none of them in its "
                "groups; is it another model's?",
                stacklevel=3,
            )
        self._ema = ema
        # Where a class and its base both define step(), torch runs the hooks after each of the two.
        steps = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not torch.optim.Optimizer]
        self._nested = len(steps) > 1
        self._overlap = overlap = overlap or ema._on_host  # the bus is slow: nothing on the device should wait for it
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: list[tuple[torch.device, torch.cuda.Event]] = []  # of an update on other streams
        self._news: tuple[Tensor, torch.cuda.Event] | None = None  # whether the latest step was skipped, on its way
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]
        if overlap:
            self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self.join()))

    def remove(self) -> None:
        """Ends it, once the update that may be under way is done. Again: does nothing."""
        self.join()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._ema._attachment is self:
            self._ema._attachment = None

    def join(self) -> None:
        """Makes the current streams wait for the update on the others, and learns whether its step was skipped."""
        if self._news:
            skipped, arrived = self._news
            self._news = None
            arrived.synchronize()  # recorded a step ago
            self._ema._step -= bool(skipped.item())
        for device, event in self._done:
            torch.cuda.current_stream(device).wait_event(event)
            if self._ema._on_host:
                event.synchronize()
        self._done = []

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        # A GradScaler does not call step() where gradients overflowed, but for optimizers that skip by themselves:
        # those get a tensor that tells.
        if self._nested and _depth(optimizer) > 1:
            return
        self.join()
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor) and not found_inf.is_cuda:
            if found_inf.item():
                return
            found_inf = None
        devices = self._ema._cuda_devices() if self._overlap or isinstance(found_inf, Tensor) else []
        if isinstance(found_inf, Tensor) and devices != [found_inf.device]:
            if found_inf.item():  # averages elsewhere can't read it there
                return
            found_inf = None
        with contextlib.ExitStack() as streams:
            if self._overlap:
                for device in devices:
                    if device not in self._streams:
                        self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                    stream = self._streams[device]
                    stream.wait_stream(torch.cuda.current_stream(device))
                    streams.enter_context(torch.cuda.stream(stream))
                    if isinstance(found_inf, Tensor):
                        found_inf.record_stream(stream)  # the scaler frees it when the step returns
            self._ema._update_attached(found_inf)
            if isinstance(found_inf, Tensor):
                news = torch.empty(found_inf.shape, dtype=found_inf.dtype, pin_memory=True)
                news.copy_(found_inf, non_blocking=True)
                self._news = news, torch.cuda.current_stream(found_inf.device).record_event()
            if self._overlap:
                self._done = [(device, self._streams[device].record_event()) for device in devices]


_WRAPPER = sys.modules[torch.optim.Optimizer.__module__].__file__


def _depth(optimizer: torch.optim.Optimizer) -> int:
    """How many of torch's wrappers around `optimizer.step` are under way."""
    depth, frame = 0, sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == _WRAPPER:
            depth += frame.f_locals.get("self") is optimizer
    return depth
