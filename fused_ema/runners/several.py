"""Pairs on devices that different runners serve, such as a model with some of its tensors on the CPU."""

from __future__ import annotations

import torch

from ..pairs.checks import Action
from .base import Call, Changed, Job, Prepared, Runner, Tensors, Watch, one_at_a_time


class Several:
    """See `Prepared`. Each runner prepares all pairs, but leaves out those of the others.

    The random bits of stochastic rounding are counted for each runner by itself.

    Args:
        job, watch: see `Runner.prepare`.
        runners: one for each pair.
    """

    def __init__(self, job: Job, watch: Watch | None, runners: list[Runner]) -> None:
        self._parts: list[Prepared] = []
        # Launches are asynchronous, so the CPU's part comes last.
        ordered = sorted(zip(job.model, runners, strict=True), key=lambda pair: pair[0].device.type == "cpu")
        for runner in dict.fromkeys(runner for _, runner in ordered):
            actions = [
                action if each is runner else Action.NONE for action, each in zip(job.actions, runners, strict=True)
            ]
            self._parts.append(runner.prepare(job._replace(actions=actions), watch))
        self._writes_nothing = Call("update", (1.0,) * job.averages)

    def launches(self) -> int:
        return sum(part.launches() for part in self._parts)

    def scratch(self) -> list[tuple[torch.device, int]]:
        return [each for part in self._parts for each in part.scratch()]

    def current(self) -> bool:
        return all(part.current() for part in self._parts)

    def run(self, call: Call, ema: Tensors | None = None, model: Tensors | None = None) -> bool:
        with one_at_a_time():
            if not all(part.run(self._writes_nothing, ema, model) for part in self._parts):
                return False
            ran = False
            waiting = list(call.scratch)
            for part in self._parts:
                size = len(part.scratch()) if waiting else 0
                own, waiting = call._replace(scratch=waiting[:size]), waiting[size:]
                undone = call.op == "restore" and not part.exchanged()
                if undone:
                    continue
                if not part.run(own, ema, model):
                    if not ran:
                        return False
                    raise RuntimeError(
                        f"fused_ema: the tensors changed during the {call.op}, which was done on some devices only; "
                        "another thread may be replacing them"
                    )
                ran = True
        return True

    def changed(self, ema: Tensors | None = None, model: Tensors | None = None) -> Changed | None:
        return None  # what one part took in, another might refuse

    def patch(self, changed: Changed) -> bool:
        return False

    def exchanged(self) -> bool:
        return any(part.exchanged() for part in self._parts)

    def mark_exchanged(self) -> None:
        for part in self._parts:
            part.mark_exchanged()
