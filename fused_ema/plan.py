"""A plan: pairs that were checked, and a runner's preparation of them. Kept between calls, and run by `run`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ._warning import warn
from .pairs import shards
from .pairs.arguments import decay_number
from .pairs.checks import Action, check, dtype_name
from .pairs.memory import Apart, place
from .pairs.pairing import Pairs
from .runners import choose, prepare, slower
from .runners.base import Call, Job, OpName, Watch, is_update, one_at_a_time


def run(kept: Plan | None, call: Call, make: Callable[..., Plan], *sources: Any, pairs: Pairs | None = None) -> Plan:
    """Runs the kept plan or, where that no longer fits what its sources hold, `make(*sources)`; returns what ran.

    Every call takes this path. Without `pairs` a plan runs on what its watch sees; with them it runs on those tensors.
    Raises the plan's refusal of the call, before anything is written.
    """
    if kept is not None and (kept.try_run(call, pairs) or (kept.patch(pairs) and kept.try_run(call, pairs))):
        return kept
    if kept is not None and kept.sharded:
        for source in sources:
            if isinstance(source, nn.Module):
                shards.reshard(source)  # puts the shards back where a forward pass left whole parameters
        if kept.try_run(call, pairs):
            return kept
    plan = make(*sources)
    if refusal := plan.refusal(call):
        raise refusal
    if not plan.try_run(call, pairs):
        raise RuntimeError(
            "fused_ema: the tensors changed while they were paired; another thread may be replacing them"
        )
    return plan


class Plan:
    """Checked pairs, and `prepared`, what a runner made of them.

    Args:
        pairs: the tensors that belong together.
        watch: watches the sources since before they were paired; None: each call passes its own pairs.
        lasts: False for a plan that serves one call only, since its sources can't be watched.
        averages, strides: for a manager, how many averages each tensor has, and for each pair how many elements lie
            between one average and the next.
        free_types: see `check`.
        by_name: names alone decide what is paired, so that nothing depends on the other tensors of the sources.
    """

    def __init__(
        self,
        pairs: Pairs,
        watch: Watch | None = None,
        *,
        lasts: bool = True,
        averages: int = 1,
        strides: Sequence[int] = (),
        free_types: bool = False,
        by_name: bool = False,
    ) -> None:
        checked = check(pairs, free_types=free_types)
        self.lasts = lasts
        self._free_types, self._by_name = free_types, by_name
        self._labels, self._averaged, self._actions = pairs.labels, pairs.averaged, checked.actions
        self.sharded = checked.sharded
        self._refusals: dict[OpName, Exception] = {}
        if checked.no_update:
            self._refusals |= {op: checked.no_update for op in get_args(OpName) if is_update(op)}
        if checked.no_swap:
            self._refusals |= {"swap": checked.no_swap, "restore": checked.no_swap}
        active = [each for each in zip(*checked.pairs[1:3], checked.actions, strict=True) if each[2] is not Action.NONE]
        # 16-bit averages stand still where 1 - decay is below this. It is checked at each update, since schedules
        # approach 1 late in a training run.
        types = {ema.dtype for ema, _, action in active if action is Action.AVERAGE and ema.element_size() == 2}
        self._coarse = max((4 * torch.finfo(dtype).eps for dtype in types), default=0.0)
        repeated = {
            place(ema)
            for ema, action in zip(checked.pairs.ema, checked.actions, strict=True)
            if action is Action.NONE and ema.numel()
        }
        self._alone = {  # pairs without another that is tied to them; where their spans are in _apart
            i: at for at, i in enumerate(checked.spans) if not repeated or place(checked.pairs.ema[i]) not in repeated
        }
        spans = [each for both in checked.spans.values() for each in both]
        self._apart = Apart.of(spans, (tensor for pair in active for tensor in pair[:2]))  # None: can't be patched
        kinds = list(dict.fromkeys(model.device.type for _, model, _ in active)) or ["cpu"]
        runners = {kind: choose(kind) for kind in kinds}
        slower.warn_once(runners)
        job = Job(
            *checked.pairs[:3], actions=checked.actions, averages=averages, strides=[*strides] or [0] * len(pairs.ema)
        )
        self.prepared = prepare(job, watch, runners)
        self._about = {
            "backend": "+".join(sorted({runner.backend(kind) for kind, runner in runners.items()})),
            "runner": "+".join(sorted({runner.name for runner in runners.values()})),
            **_describe(active, averages),
            "launches_per_update": self.prepared.launches(),
        }

    def try_run(self, call: Call, pairs: Pairs | None = None) -> bool:
        """False, and nothing is written, where the plan may not fit what there is now, or refuses the call."""
        op, _decays, device_decays, *_ = call
        if device_decays is not None or op in self._refusals:
            if self.refusal(call):
                return False
            if device_decays is not None and device_decays.device.type == "cpu":
                call = call._replace(decays=(decay_number(device_decays.item()),), device_decays=None)
        torch.clear_autocast_cache()  # this is forget_values(), without a call, since every update comes here
        if parametrize._cache:
            parametrize._cache.clear()
        if (
            self._coarse
            and op in ("update", "update_finite")
            and any(0.0 < 1.0 - decay < self._coarse for decay in call.decays)
        ):
            # The averages may have been cast since.
            if not (self.prepared.current() if pairs is None else any(ema.element_size() == 2 for ema in pairs.ema)):
                return False
            self._coarse = 0.0
            _warn_of_standstill(call.decays)
        if pairs is None:
            return self.prepared.run(call)
        if self.sharded:
            if any(map(shards.refusal, *pairs[:3])):
                return False
            here = shards.localized(pairs)
            ran = self.prepared.run(call, here.ema, here.model)
            if ran:
                shards.written([*pairs.ema, *pairs.model] if op in ("swap", "restore") else pairs.ema)
            return ran
        return self.prepared.run(call, pairs.ema, pairs.model)

    def fits(self) -> bool:
        """Whether the plan is what its sources hold now, if need be after a patch."""
        return self.prepared.current() or self.patch()

    def patch(self, pairs: Pairs | None = None) -> bool:
        """Takes tensors that have replaced some of the plan's, or moved, into it. They pass every check that a new plan
        makes, against all others. False, with nothing changed, where a new plan is needed, or an error is due."""
        with one_at_a_time():
            apart, self._apart = self._apart, None  # so that an interrupt, or a call in it, finds nothing half done
            found = self._patched(apart, pairs) if apart else None
            self._apart = found or apart
            return found is not None

    def _patched(self, apart: Apart, pairs: Pairs | None) -> Apart | None:
        if self.prepared.exchanged():
            return None  # the values go back to the tensors that they came from
        changed = self.prepared.changed(*(pairs[1:3] if pairs else ()))
        if changed is None or not (changed.numbers or changed.slots) or (changed.others and not self._by_name):
            return None
        numbers = changed.numbers
        if not self._alone.keys() >= set(numbers):
            return None
        part = Pairs(
            [self._labels[i] for i in numbers], changed.ema, changed.model, [self._averaged[i] for i in numbers]
        )
        try:
            checked = check(part, free_types=self._free_types)
        except (TypeError, ValueError, RuntimeError):
            return None  # a new plan raises it
        refused = (checked.no_update and "update" not in self._refusals) or (
            checked.no_swap and "swap" not in self._refusals
        )
        if refused or checked.sharded or checked.actions != [self._actions[i] for i in numbers]:
            return None
        new = apart.replaced(
            {2 * self._alone[i] + side: checked.spans[k][side] for k, i in enumerate(numbers) for side in (0, 1)}
        )
        return new if new and self.prepared.patch(changed) else None

    def refusal(self, call: Call) -> Exception | None:
        """Why this plan can't do what the call asks for; None where it can."""
        devices = self._about["devices"]
        if call.device_decays is not None and devices and devices != [str(call.device_decays.device)]:
            return ValueError(
                f"decay: expected a number or a tensor on the averages' device, {' and '.join(devices)}, "
                f"found one on {call.device_decays.device}"
            )
        return self._refusals.get(call.op)

    def new_scratch(self, *, on_host: bool = False) -> list[Tensor]:
        """Memory for a swap between types: bytes for each device that needs some, on it or in pinned host memory."""

        def empty(device: torch.device, size: int) -> Tensor:
            pinned = on_host and device.type != "cpu"
            return torch.empty(size, dtype=torch.uint8, device="cpu" if pinned else device, pin_memory=pinned)

        return [empty(device, size) for device, size in self.prepared.scratch()]

    def describe(self) -> dict[str, Any]:
        return copy.deepcopy(self._about)


def forget_values() -> None:
    """Drops what PyTorch has computed of tensors that are about to be written: autocast's 16-bit copies, and what
    `torch.nn.utils.parametrize.cached()` keeps."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _describe(active: list[tuple[Tensor, Tensor, Action]], averages: int) -> dict[str, Any]:
    elements = size = 0
    counts: Counter[Action] = Counter()
    dtypes: Counter[str] = Counter()
    for ema, model, action in active:
        counts[action] += 1
        elements += ema.numel()
        accesses = 2 * averages if action is Action.AVERAGE else averages
        size += ema.numel() * (accesses * ema.element_size() + model.element_size())
        if action is Action.AVERAGE:
            dtypes[f"{dtype_name(ema)}←{dtype_name(model)}"] += 1
    return {
        "devices": list(dict.fromkeys(str(model.device) for _, model, _ in active)),
        "tensors": counts.total(),
        "averaged": counts[Action.AVERAGE],
        "copied": counts[Action.COPY],
        "elements": elements,
        "dtypes": dict(dtypes),
        "bytes_per_update": size,
    }


_warned = False


def _warn_of_standstill(decays: tuple[float, ...]) -> None:
    """Warns once per process."""
    global _warned
    if not _warned:
        _warned = True
        finest = max(decay for decay in decays if decay < 1.0)
        warn(
            f"fused_ema: averages in 16 bits stand still at decay {finest}, because most steps are smaller than half a "
            "unit in the last place and round away. Keep the averages in float32, or let fused_ema.EMA round "
            "stochastically."
        )
