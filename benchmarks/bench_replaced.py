"""What an update costs after one tensor was replaced, and what many pairs of lists cost.

Times alternate with those of a steady update. They are those of the processor, on one thread, so that other programs
count for little. `FUSED_EMA_EXT=0` measures the runner without a compiler.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from report import columns, console
from torch import nn

import fused_ema

Call = Callable[[], object]


def microseconds(call: Call, others: list[Call], rounds: int) -> list[float]:
    """Medians: of the call alone, and of the call right after each of the others, which are not timed."""
    times: list[list[float]] = [[] for _ in range(1 + len(others))]
    for _ in range(rounds):
        for change, found in zip([lambda: None, *others], times, strict=True):
            change()
            start = time.thread_time()
            call()
            found.append(1e6 * (time.thread_time() - start))
    return list(map(statistics.median, times))


def replaced(tensors: int, elements: int, rounds: int) -> None:
    model = nn.ParameterList(torch.randn(elements) for _ in range(tensors))
    model.register_buffer("mean", torch.zeros(16))
    ema = copy.deepcopy(model)
    ours, theirs = list(ema.parameters()), list(model.parameters())
    numbers = iter(range(1, 1 << 30))

    def position() -> int:
        return 1 + next(numbers) * 997 % (tensors - 1)

    def parameter() -> None:
        model[position()] = nn.Parameter(torch.randn(elements))

    def data() -> None:
        model[position()].data = torch.randn(elements)

    def buffer() -> None:
        model.mean = model.mean * 0.9

    def item() -> None:
        theirs[position()] = nn.Parameter(torch.randn(elements))

    calls: dict[str, tuple[Call, list[Call]]] = {
        "update": (partial(fused_ema.update, ema, model, 0.9), [parameter, data, buffer]),
        "bind": (partial(fused_ema.bind(ema, model).update, 0.9), [parameter, data, buffer]),
        "EMA": (fused_ema.EMA(model, 0.9).update, [parameter, data, buffer]),
        "update of lists": (partial(fused_ema.update, ours, theirs, 0.9), [item]),
    }
    title = f"{tensors} tensors of {elements}: µs, and as a multiple of a steady update"
    table = columns(title, "call", ["steady", "a parameter replaced", "its .data", "a buffer"])
    for name, (call, changes) in calls.items():
        call()
        steady, *after = microseconds(call, changes, rounds)
        table.add_row(name, f"{steady:.0f}", *(f"{each:.0f} ({each / steady:.1f})" for each in after))
    console.print(table)


def lists(counts: list[int], rounds: int) -> None:
    table = columns("Pairs of lists of 6 tensors of 64: µs per call", "pairs", ["kept", "made anew", "_foreach_lerp_"])
    for count in counts:
        pairs = [[[torch.randn(64) for _ in range(6)] for _ in range(2)] for _ in range(count)]

        def run(update: Callable[..., object], make: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
            for ema, model in pairs:  # noqa: B023 (it runs before the next round)
                update(make(ema), make(model))

        ours, theirs = partial(fused_ema.update, decay=0.9), partial(torch._foreach_lerp_, weight=0.1)
        ways = [
            partial(run, ours, lambda each: each),
            partial(run, ours, list),
            partial(run, theirs, lambda each: each),
        ]
        for way in ways:
            way()
        times = [microseconds(way, [], max(5, 4 * rounds // count))[0] / count for way in ways]
        table.add_row(str(count), *(f"{each:.1f}" for each in times))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tensors", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--elements", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=101, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    replaced(arguments.tensors, arguments.elements, arguments.rounds)
    lists([1, 16, 17, 100, 500], arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
