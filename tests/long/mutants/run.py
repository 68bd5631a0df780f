"""Mutation testing: puts each fault of mutants.py into a copy of the checkout, builds, and runs the tests there until
one fails. `make mutants`; names, or parts of them, in ARGS run those alone.

A mutant is killed by a test that fails or crashes, by a report of the sanitizers, or by tests that never end. Tests
that kill most come first; what survives them meets the whole suite. Lists every mutant with what killed it, and fails
below 95%.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import MUTANTS, Mutant

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from instrumented import BUILD, copy_checkout

ROOT = Path(__file__).resolve().parents[3]
FIRST = {  # by what is mutated; the grid's tests build the kernel's code by themselves
    "csrc/lerp.h": "numerics grid_numerics grid_rounding ema_rounding",
    "csrc/table.h": "grid_coverage grid_strided grid_huge grid_vs_cpu",
    "csrc/launch.h": "grid_manager grid_manager_vs_cpu",
    "csrc/ops.h": "grid_manager finite",
    "csrc/tiles.h": "grid_coverage grid_strided grid_huge grid_manager",
    "csrc/cpu.h": "values sums",
    "csrc/ema_cpu.cpp": "grid_manager_vs_cpu grid_vs_cpu numerics values ema_swap",
    "csrc/plan.cpp": "stale_sources kinds calls ema_rounding patches",
    "csrc/bindings.cpp": "stale_sources names calls ema_swap threads grid_manager_vs_cpu distributed",
    "csrc/watch.cpp": "stale_sources names calls ema_swap threads patches distributed",
    "fused_ema/_build/cache.py": "build",
    "fused_ema/pairs/arguments.py": "arguments",
    "fused_ema/manager/attach.py": "ema_attach",
    "fused_ema/manager/averages.py": "ema ema_state",
    "fused_ema/checkpoints/layouts.py": "export checkpoint_peers",
    "fused_ema/checkpoints/load.py": "load",
    "fused_ema/checkpoints/restore.py": "restore",
    "fused_ema/pairs/checks.py": "overlaps memory dtypes kinds",
    "fused_ema/pairs/memory.py": "overlaps memory",
    "fused_ema/manager/copying.py": "ema ema_swap load_into reselect",
    "fused_ema/manager/ema.py": "ema ema_rounding ema_swap ema_attach ema_copies reselect faults export",
    "fused_ema/manager/report.py": "nonfinite",
    "fused_ema/manager/selection.py": "reselect ema_dict buffers ema",
    "fused_ema/manager/swap.py": "ema_swap programs",
    "fused_ema/manager/timetable.py": "ema ema_rounding",
    "fused_ema/checkpoints/files.py": "files",
    "fused_ema/functional.py": "lifetimes calls stale_sources buffers",
    "fused_ema/pairs/pairing.py": "names overlaps stale_sources buffers load_into",
    "fused_ema/plan.py": "patches calls ema_swap ema_rounding",
    "fused_ema/posthoc/profiles.py": "profiles",
    "fused_ema/posthoc/snapshots.py": "snapshots",
    "fused_ema/_build/kernels.py": "kernels",
    "fused_ema/runners/exchange.py": "foreach several ema_swap",
    "fused_ema/runners/foreach.py": "foreach numerics ema_rounding",
    "fused_ema/runners/groups.py": "foreach numerics",
    "fused_ema/runners/in_python.py": "foreach interface stale_sources patches",
    "fused_ema/runners/nvrtc.py": "nvrtc interface",
    "fused_ema/runners/pieces.py": "foreach",
    "fused_ema/runners/reference.py": "numerics ema_rounding foreach finite",
    "fused_ema/runners/several.py": "several",
    "fused_ema/runners/tables.py": "tables",
    "fused_ema/runners/watch.py": "interface stale_sources lifetimes patches",
    "fused_ema/schedules.py": "schedules",
    "fused_ema/manager/state.py": "ema_state ema_options nonfinite",
}
THEN = "overlaps memory dtypes kinds names stale_sources numerics ema ema_state stale_plans differential"
FITS = "--ignore-glob=*/test_mutants.py"  # that each fault still fits, which it does not once it is there
LIMIT = 3600  # seconds for the whole suite


class Copy:
    """A copy of the checkout with an extension of its own, whose objects are kept from one build to the next."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._quick = quick
        self.root, self._objects = folder / "checkout", folder / "objects"
        copy_checkout(self.root)
        self._environment = {**os.environ, "PYTHONPATH": str(self.root), "FUSED_EMA_EXT": "1", "FUSED_EMA_CUDA": "0"}
        self._environment.pop("PYTEST_ADDOPTS", None)

    def build(self) -> None:
        hangs, output = self._run([sys.executable, "-c", BUILD, str(self._objects)], FUSED_EMA_EXT="")
        if hangs or output:
            sys.exit(f"does not build:\n{output[-5000:]}")

    def test(self, names: str = "") -> str:
        """What failed in these files, or in all; "" where nothing did."""
        files = [str(path) for name in names.split() for path in self._files(name)]
        chosen = files or ["tests", "-n", "auto", "--dist", "worksteal"]
        hangs, output = self._run([sys.executable, "-m", "pytest", "-xq", "-rfE", FITS, *chosen])
        if hangs or not output:
            return hangs
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.M) or re.search(r"Fatal Python error: (.*)", output)
        return failed[1] if failed else sys.exit(f"the tests did not run:\n{output[-5000:]}")

    def _files(self, name: str) -> list[Path]:
        found = [*self.root.glob(f"tests/**/test_{name}.py")]
        assert found, f"tests: expected a file test_{name}.py, found none"
        return found

    def sanitized(self) -> str:
        hangs, output = self._run(["make", "-s", "sanitize-plans", "PLANS=20000"])
        return hangs or (f"sanitizers: {output.splitlines()[0]}" if output else "")

    def _run(self, command: list[str], **environment: str) -> tuple[str, str]:
        """Whether it takes too long, in words; and what was printed, where it fails."""
        environment = {**self._environment, **environment}
        try:
            done = subprocess.run(
                command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return "hangs", ""
        return "", done.stdout + done.stderr if done.returncode else ""

    def kill(self, mutant: Mutant) -> str:
        """What killed it; "" where it survives."""
        path = self.root / mutant.file
        text = path.read_text(encoding="utf-8")
        found = text.count(mutant.old)
        assert found == 1, f"{mutant.name}: expected its text once in {mutant.file}, found it {found} times"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            if mutant.file.startswith("csrc"):
                self.build()
            sanitized = mutant.file.endswith(".h") and self.sanitized()
            likely = sanitized or self.test(FIRST[mutant.file]) or self.test(THEN)
            return likely or ("" if self._quick else self.test())
        finally:
            path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all of them")
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--quick", action="store_true", help="spare survivors the whole suite")
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if not options.names or any(part in each.name for part in options.names)]
    if not chosen:
        parser.error(f"names: expected parts of those in mutants.py, found {', '.join(options.names)}")
    lines, survivors = [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder), quick=options.quick)
        copy.build()
        if failed := copy.sanitized() or copy.test(" ".join([*{FIRST[each.file] for each in chosen}, THEN])):
            sys.exit(f"the package as it is fails {failed}")
        for mutant in sorted(chosen, key=lambda each: each.file.startswith("csrc")):  # which leave another extension
            begin = time.monotonic()
            killer = copy.kill(mutant)
            survivors += [] if killer else [mutant.name]
            lines.append(f"{mutant.name:40} {mutant.file:24} {killer or 'SURVIVED'}")
            print(f"{lines[-1]} ({time.monotonic() - begin:.0f} s)", flush=True)
    share = 1 - len(survivors) / len(chosen)
    lines.append(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed, {share:.1%}")
    print(lines[-1])
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(share < 0.95)


if __name__ == "__main__":
    main()
