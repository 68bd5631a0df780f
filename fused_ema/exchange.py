"""A stay of the averages in the model: what `EMA.swapped` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .averages import Averages
from .plan import Call, Plan

MakePlan = Callable[[Sequence[Tensor] | None], Plan]  # for the model as it is, or for these tensors in its place


class Exchange:
    """Puts average `index` into the model, and takes it out again.

    The values change places in one launch, each way; where the types differ, the model's are set aside instead.
    Without the extension all of the model's values are copied aside. What is held here is enough to undo it, whatever
    becomes of the model's tensors meanwhile.
    """

    def __init__(self, averages: Averages, index: int, current: dict[str, Tensor]) -> None:
        self.index = index
        self._averages = averages
        self._tensors = {name: current[name] for name in averages}
        self._memory = {name: tensor.detach() for name, tensor in self._tensors.items()}
        self._plan: Plan | None = None
        self._call = Call((0.0,))
        self._copies: dict[str, Tensor] = {}

    def enter(self, plan: Plan | None, make_plan: MakePlan) -> Plan:
        """Returns the plan that did it."""
        if plan and plan.watches and self._run(plan, fresh=False):
            return plan
        plan = make_plan(None)
        plan.refuse("swap")
        if not plan.reusable:
            self._copy_in()
        elif not self._run(plan, fresh=True):
            raise RuntimeError("fused_ema: the tensors changed while they were paired; is another thread at work?")
        return plan

    def _run(self, plan: Plan, *, fresh: bool) -> bool:
        self._plan, self._call = plan, Call((0.0,), average=self.index, aside=plan.aside())
        return plan.run_call("swap", self._call, fresh=fresh)

    def leave(self, make_plan: MakePlan, current: Callable[[], dict[str, Tensor]]) -> None:
        if self._copies:
            self._write(self._copies, self._memory)
        elif self._plan is None or not self._plan.exchanged():
            return  # interrupted before anything was written
        elif self._plan.run_call("restore", self._call):
            return
        else:  # the block replaced tensors of the model: the exchange is undone in those it was made with
            done = make_plan(list(self._memory.values())).run_call("restore", self._call, fresh=True)
            assert done, "nobody else has these tensors"
        self._follow(current())

    def true_average(self, name: str, k: int, average: Tensor) -> Tensor:
        """A copy from the model, where the average is there."""
        there = self._memory[name]
        exchanged = self._plan is not None and self._plan.exchanged() and there.dtype == average.dtype
        return there.clone() if exchanged and k == self.index else average

    def _copy_in(self) -> None:
        self._copies = {name: memory.clone() for name, memory in self._memory.items()}
        self._write({name: self._averages.get(name, self.index) for name in self._averages}, self._memory)

    def _follow(self, current: dict[str, Tensor]) -> None:
        """The model's own values, into the tensors that the block put in the place of the first ones."""
        lost = [name for name in self._memory if name not in current or current[name].shape != self._memory[name].shape]
        values = {name: memory for name, memory in self._memory.items() if name not in lost}
        self._write(
            values,
            {
                name: current[name]
                for name in values
                if current[name] is not self._tensors[name] or current[name].data_ptr() != self._memory[name].data_ptr()
            },
        )
        if lost:
            raise RuntimeError(
                f"EMA.swapped: expected the model's tensors of before, found others for {lost[:5]}; the averages are "
                "whole again, those tensors keep what the block gave them"
            )

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
        for name, tensor in into.items():
            tensor.copy_(values[name])
