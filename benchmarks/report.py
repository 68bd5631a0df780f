"""Prints what the benchmarks found."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

AS_BUILT = "as built"  # the name of the extension's own kernel in a sweep

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@contextmanager
def progress(title: str, seconds: float) -> Iterator[Callable[[], None]]:
    """Shows a bar that fills within `seconds` and disappears when the block ends; yields a function that updates it."""
    shown = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, start = bar.add_task(title, total=seconds), time.perf_counter()
        yield lambda: bar.update(task, completed=time.perf_counter() - start)


def columns(title: str, first: str, others: list[str]) -> Table:
    table = Table(first, title=title, title_justify="left", title_style="bold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def machine(env: dict[str, Any]) -> str:
    """The machine, as named under a table or a plot."""
    name = env["cpu"] if env["device"] == "cpu" else env["device"]
    return f"{name}, {env['threads']} threads, PyTorch {env['torch']}, {env['date']}"


def short(size: float) -> str:
    """A number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def parts_of(
    text: str, option: str, offered: list[str], parser: argparse.ArgumentParser, between: str = ","
) -> list[str]:
    """The offered names that contain one of the parts in `text`."""
    parts = [part.strip().lower() for part in text.split(between)]
    for part in parts:
        if not part or not any(part in name.lower() for name in offered):
            parser.error(f"{option}: expected parts of these: {'; '.join(offered)}; found {part!r}")
    return [name for name in offered if any(part in name.lower() for part in parts)]
