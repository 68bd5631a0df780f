"""Runs tests in a copy of the checkout whose extension is built with a sanitizer, or counts what is run.

    python tests/instrumented.py address tests/test_hazards_*.py     # addresses and undefined behaviour
    python tests/instrumented.py thread tests/test_hazards_process.py
    python tests/instrumented.py coverage tests                      # branches of the package and of csrc

Under sanitizers Python and PyTorch are as they are, so only what the extension itself does is looked at. With threads
that is the concurrent calls of one process: OpenMP, whose locks the sanitizer does not know, gets one thread.

Coverage needs clang++ and llvm-cov, which count a branch of a template once, whatever it is instantiated with; it is
built without OpenMP.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "coverage": ["-O0", "-fcoverage-mapping", "-fno-openmp"],
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
from fused_ema._build import cache, compile as _build
digest, flags = _build.sources_digest(), _build.cxx_flags()
_build.sources_digest = lambda: digest
_build.cxx_flags = lambda: tuple(each + sys.argv[2:] for each in flags)
cache.place(_build.compile_extension(pathlib.Path(sys.argv[1]), *_build.find_target()), _build.PACKAGE)
"""
COVERAGE = r"""
[run]
branch = true
include =
    {copy}/fused_ema/*
    */checkout/fused_ema/*
parallel = true
patch = subprocess, _exit
data_file = {copy}/.coverage
[paths]
package =
    {copy}/fused_ema
    */checkout/fused_ema
[report]
show_missing = true
skip_covered = true
exclude_also =
    if TYPE_CHECKING:
    def trace_update
    def _shard\(tensor
"""  # copies of the package that tests make count too; what torch.compile traces is never run by Python


SLOW = "tests/test_ema_swap.py", "test_interrupted_at_any_moment"  # has a time limit, and each line is traced


def copy_checkout(folder: Path) -> None:
    """All files but those that git ignores."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def main(kind: str, *names: str) -> None:
    copy = ROOT / "build" / kind
    shutil.rmtree(copy, ignore_errors=True)
    copy_checkout(copy)
    environment = {**os.environ, "PYTHONPATH": str(copy), "FUSED_EMA_CUDA": "0"}

    def run(*command: object, **more: str) -> bool:
        """Whether it succeeds."""
        return not subprocess.run([*map(str, command)], cwd=copy, env={**environment, **more}, check=False).returncode

    flags = ["-g", *FLAGS[kind]]
    if kind == "coverage":  # in the program, not in an environment that some tests clean
        flags.append(f"-fprofile-instr-generate={copy}/build/profiles/%m.profraw")
    compilers = {"CXX": "clang++", "CC": "clang"} if kind == "coverage" else {}
    if not run(sys.executable, "-c", BUILD, copy / "build" / "objects", *flags, FUSED_EMA_EXT="", **compilers):
        sys.exit("the extension does not build")
    preload = " ".join(_runtime(name) for name in PRELOADED.get(kind, []))
    environment |= {"FUSED_EMA_EXT": "1", **ENVIRONMENT.get(kind, {})}
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    if kind != "coverage":
        # The sanitizer of threads wants its memory at a fixed place, which random addresses may take.
        fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
        sys.exit(not run(*fixed, sys.executable, *tests, LD_PRELOAD=preload))
    (copy / "coveragerc").write_text(COVERAGE.format(copy=copy), encoding="utf-8")
    coverage = (sys.executable, "-m", "coverage")
    assert f"def {SLOW[1]}(" in (copy / SLOW[0]).read_text(encoding="utf-8")
    passed = run(*coverage, "run", f"--rcfile={copy}/coveragerc", *tests, "--deselect", "::".join(SLOW))
    # The kernel's tiles, run over the emulated grid.
    plans = copy / "build" / "fuzz_plans"
    passed &= run("clang++", "-std=c++17", *flags, "tests/fuzz/fuzz_plans.cpp", "-o", plans) and run(plans, 200_000)
    compiled = _branches(copy, plans)
    passed &= run(*coverage, "combine", "-q", f"--rcfile={copy}/coveragerc")
    passed &= run(*coverage, "report", f"--rcfile={copy}/coveragerc", "--fail-under=95")
    if compiled < 0.9:
        sys.exit("csrc: expected 90% of the branches to be taken")
    sys.exit(not passed)


def _branches(copy: Path, plans: Path) -> float:
    """The share of csrc's branches that are taken."""
    merged, [library] = copy / "build" / "profile", (copy / "fused_ema").glob("_C*.so")
    profiles = sorted((copy / "build" / "profiles").glob("*.profraw"))
    subprocess.run(["llvm-profdata", "merge", "-o", merged, *profiles], check=True)
    export = ["llvm-cov", "export", "-summary-only", f"-instr-profile={merged}", library, "-object", plans]
    printed = subprocess.run([*export, copy / "csrc"], check=True, capture_output=True, text=True).stdout
    taken = total = 0
    for file in json.loads(printed)["data"][0]["files"]:
        branches = file["summary"]["branches"]
        print(f"{Path(file['filename']).name:14} {branches['covered']:4} of {branches['count']:4} branches")
        taken, total = taken + branches["covered"], total + branches["count"]
    print(f"csrc: {taken} of {total} branches, {taken / total:.1%}", flush=True)
    return float(taken / total)


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return os.path.realpath(found.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
