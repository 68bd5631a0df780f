"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import sys
import threading
import time


class Progress:
    """Counts bytes, from any thread, and draws them ten times a second at most.

    Args:
        total: the bytes to come.
        shown: None: where stderr is a terminal.
    """

    def __init__(self, total: int, shown: bool | None = None) -> None:
        self._total, self._done = max(1, total), 0
        self._shown = bool(sys.stderr and sys.stderr.isatty()) if shown is None else shown
        self._start = self._drawn = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._shown and now > self._drawn + 0.1:
                self._drawn = now
                self._draw(now)

    def _draw(self, now: float) -> None:
        share = min(1.0, self._done / self._total)
        speed = self._done / max(1e-9, now - self._start)
        left = (self._total - self._done) / max(1.0, speed)
        bar = ("#" * round(30 * share)).ljust(30, ".")
        sys.stderr.write(f"\rmerge [{bar}] {share:4.0%} {speed / 1e9:.2f} GB/s, {left:.0f} s left \x1b[K")
        sys.stderr.flush()

    def close(self) -> None:
        """Removes the bar."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
