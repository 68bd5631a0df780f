"""Averages tensors piece by piece, in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch

from .entries import Buffer, Entry, Place
from .progress import Progress
from .sums import PIECE, Sum

T = TypeVar("T")


class Job(NamedTuple):
    """One tensor of each checkpoint that has weight, from the oldest to the newest, and where its average goes."""

    name: str
    entry: Entry
    parts: Sequence[Place]
    out: Place


class Tools:
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.sum, self.read, self.write = Sum(), Buffer(), Buffer()


def average(jobs: Iterable[Job], weights: Sequence[float], progress: Progress) -> set[str]:
    """Writes the averages; returns the names of those that are not finite."""
    not_finite: set[str] = set()

    def piece(tools: Tools, work: tuple[Job, int, int]) -> None:
        job, begin, count = work
        out = tools.write.tensor(job.entry.real[0], count)
        parts = (part.read(begin, count, tools.read) for part in job.parts)
        if not tools.sum.write(parts, weights, out):
            not_finite.add(job.name)
        job.out.write(begin, out, tools.write)
        progress.add(out.nbytes * len(job.parts))

    in_threads(piece, ((job, begin, count) for job in jobs for begin, count in _pieces(job.entry)))
    return not_finite


def copy(jobs: Iterable[Job]) -> None:
    """Writes what the newest checkpoint has."""

    def piece(tools: Tools, work: tuple[Job, int, int]) -> None:
        job, begin, count = work
        out = tools.write.tensor(job.entry.real[0], count)
        out.copy_(job.parts[-1].read(begin, count, tools.read))
        job.out.write(begin, out, tools.write)

    in_threads(piece, ((job, begin, count) for job in jobs for begin, count in _pieces(job.entry)))


def alike(entry: Entry, places: Sequence[Place]) -> bool:
    """Whether all places hold the same bytes."""
    first, other = Buffer(), Buffer()
    for begin, count in _pieces(entry):
        expected = places[0].read(begin, count, first).view(torch.uint8)
        if not all(torch.equal(expected, each.read(begin, count, other).view(torch.uint8)) for each in places[1:]):
            return False
    return True


def _pieces(entry: Entry) -> Iterator[tuple[int, int]]:
    count = entry.real[1]
    for begin in range(0, count, PIECE):
        yield begin, min(PIECE, count - begin)


def in_threads(do: Callable[[Tools, T], None], work: Iterable[T]) -> None:
    """Calls do(tools, each) for all the work. After an error, in a thread or by Ctrl-C, all threads end before it is
    raised."""
    waiting, lock, errors = iter(work), threading.Lock(), list[BaseException]()

    def run() -> None:
        try:
            tools = Tools()
            while not errors:
                with lock:
                    each = next(waiting, None)
                if each is None:
                    return
                do(tools, each)
        except BaseException as error:
            errors.append(error)

    # Two or more, so that some read and write while others compute.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(max(2, torch.get_num_threads()))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        for thread in threads:
            while thread.is_alive():
                with suppress(KeyboardInterrupt):  # a second one: the files that they write must stay open
                    thread.join()
        raise
    if errors:
        raise errors[0]
