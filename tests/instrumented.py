"""Runs tests against a copy of the package whose extension is built with a sanitizer, or counts what is run.

    python tests/instrumented.py address tests/test_hazards_*.py     # addresses and undefined behaviour
    python tests/instrumented.py thread tests/test_hazards_process.py
    python tests/instrumented.py coverage tests                      # branches of the package and of csrc

Under sanitizers Python and PyTorch are as they are, so only what the extension itself does is looked at. With threads
that is the concurrent calls of one process: OpenMP, whose locks the sanitizer does not know, gets one thread.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "coverage": ["-O0", "--coverage", "-fprofile-update=atomic"],
}
PRELOADED = {"address": ["libasan.so", "libubsan.so", "libstdc++.so"], "thread": ["libtsan.so", "libstdc++.so"]}
ENVIRONMENT = {
    # Python frees little when it ends, and PyTorch none of what it keeps for good.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "OMP_NUM_THREADS": "1"},
}
# Into the package that is imported, from objects in a folder that stays, with further flags for compiler and linker.
# The library's record says what it is with the flags that users get: else it would not be loaded.
BUILD = """
import pathlib, sys
from fused_ema import _build
digest, flags = _build.sources_digest(), _build.cxx_flags()
_build.sources_digest = lambda: digest
_build.cxx_flags = lambda: tuple(each + sys.argv[2:] for each in flags)
_build.place(_build.compile_extension(pathlib.Path(sys.argv[1])), _build.PACKAGE)
"""
COVERAGE = """
[run]
branch = true
source_pkgs = fused_ema
parallel = true
patch = subprocess, _exit
data_file = {copy}/.coverage
[report]
show_missing = true
skip_covered = true
exclude_also =
    if TYPE_CHECKING:
"""


def main(kind: str, *names: str) -> None:
    arguments = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
    copy = ROOT / "build" / kind
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "fused_ema", copy / "fused_ema", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    environment = {**os.environ, "PYTHONPATH": str(copy), "FUSED_EMA_CUDA": "0"}

    def run(*command: object, **more: str) -> None:
        done = subprocess.run([*map(str, command)], cwd=copy, env={**environment, **more}, check=False)
        if done.returncode:
            sys.exit(done.returncode)

    run(sys.executable, "-c", BUILD, copy / "objects", "-g", *FLAGS[kind], FUSED_EMA_EXT="")
    preload = " ".join(_runtime(name) for name in PRELOADED.get(kind, []))
    environment |= {"FUSED_EMA_EXT": "1", **ENVIRONMENT.get(kind, {})}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    if kind != "coverage":
        # The sanitizer of threads wants its memory at a fixed place, which random addresses may take.
        fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
        run(*fixed, sys.executable, *tests, LD_PRELOAD=preload)
        return
    (copy / "coveragerc").write_text(COVERAGE.format(copy=copy), encoding="utf-8")
    coverage = (sys.executable, "-m", "coverage")
    run(*coverage, "run", f"--rcfile={copy}/coveragerc", *tests)
    run(*coverage, "combine", "-q", f"--rcfile={copy}/coveragerc")
    # The kernel's tiles, run over the emulated grid.
    shutil.copytree(ROOT / "tests" / "fuzz", copy / "tests" / "fuzz")
    shutil.copy(ROOT / "tests" / "emulated_grid.cpp", copy / "tests")
    small = ["-DFUSED_EMA_THREADS=32", "-DFUSED_EMA_UNROLL=2", "-DFUSED_EMA_STEPS=2"]
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", *FLAGS[kind]]
    run(*compiler, *small, copy / "tests" / "fuzz" / "fuzz_plans.cpp", "-o", "fuzz_plans")
    run(copy / "fuzz_plans", 200_000)
    if _branches(copy) < 0.9:
        sys.exit("csrc: expected 90% of the branches to be taken")
    run(*coverage, "report", f"--rcfile={copy}/coveragerc", "--fail-under=95")


def _branches(copy: Path) -> float:
    """The share of csrc's branches that are taken; those of a template count for each of the types it is used with."""
    files: defaultdict[str, dict[int, list[bool]]] = defaultdict(dict)
    for data in copy.rglob("*.gcda"):
        command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", str(data)]
        printed = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True).stdout
        for file in (file for row in printed.splitlines() for file in json.loads(row)["files"]):
            if Path(file["file"]).resolve().parent != copy / "csrc":
                continue
            lines = files[Path(file["file"]).name]
            for line in file["lines"]:
                # A call is a branch, too: past it, or into the handling of what it threw. Those are left out.
                pairs = itertools.pairwise([*line["branches"], {"throw": False}])
                found = [one["count"] > 0 for one, after in pairs if not one["throw"] and not after["throw"]]
                before = lines.get(line["line_number"], [])
                lines[line["line_number"]] = [any(each) for each in itertools.zip_longest(before, found)]
    total = taken = 0
    for name, lines in sorted(files.items()):
        branches = [each for found in lines.values() for each in found]
        missing = [number for number, found in sorted(lines.items()) if not all(found)]
        print(f"{name:14} {sum(branches):4} of {len(branches):4} branches; not all of lines {missing}")
        total, taken = total + len(branches), taken + sum(branches)
    print(f"csrc: {taken} of {total} branches, {taken / total:.1%}", flush=True)
    return taken / total


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return os.path.realpath(found.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
