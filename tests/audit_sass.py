"""Audits the machine code of the CUDA kernels, which needs no GPU:  python tests/audit_sass.py [_C.so or .o]

The main path of each kind of pair is one straight run of instructions that ends in 128-bit stores. Each must
load averages in 128 bits too (parameters in what as many elements take), issue all loads before it first uses a
loaded value, and do one add and one fused multiply-add per element; nowhere may there be local memory. Prints a
table; exits 1 and says why if anything is otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = {"0": "update", "1": "copy", "2": "swap"}  # by Op, the template argument in the mangled name
MAX_REGISTERS = 64  # so that 1024 threads fit an SM; __launch_bounds__ in ema_cuda.cu asks for it
TILES_H = Path(__file__).resolve().parent.parent / "csrc" / "tiles.h"


# ---- what the listing says


@dataclass
class Instruction:
    address: int
    predicate: str
    name: str  # LDG
    modifiers: list[str]  # E, 128, CONSTANT
    operands: str

    @property
    def width(self) -> int:
        """Bits of a memory access."""
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
        return next((widths[m] for m in self.modifiers if m in widths), 32)

    @property
    def pointer(self) -> str:
        return self.operands[self.operands.find("[") :].split(",")[0]

    def registers(self) -> set[int]:
        return {int(r) for r in re.findall(r"\bR(\d+)", self.operands)}

    def written(self) -> set[int]:
        """The registers that a load fills, or that the result of anything else may take (a pair for 64 bits)."""
        first = re.match(r"R(\d+)", self.operands)
        if not first or self.name in ("ST", "STG", "STL", "STS"):
            return set()
        count = max(1, self.width // 32) if self.name in ("LD", "LDG") else 2
        return set(range(int(first[1]), int(first[1]) + count))

    def __str__(self) -> str:
        return ".".join([self.name, *self.modifiers])


Code = dict[tuple[str, str], list[Instruction]]  # (arch, kernel) → its instructions
Usage = dict[tuple[str, str], dict[str, int]]  # (arch, kernel) → REG, STACK, LOCAL, ...


def _kernel(name: str) -> str:
    found = re.search(r"ema_kernelI\w*?OpE(\d)E", name)
    return KERNELS.get(found[1], name) if found else name


LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:(@!?U?P\w+)\s+)?([A-Z]\w*)(\S*)\s*([^;]*);")


def parse_sass(text: str) -> Code:
    code: Code = {}
    arch, current = "", None
    for line in text.splitlines():
        if found := LINE.match(line):
            address, predicate, name, modifiers, operands = found.groups()
            if current is not None:
                parts = [m for m in modifiers.split(".") if m]
                current.append(Instruction(int(address, 16), predicate or "", name, parts, operands.strip()))
        elif found := re.search(r"code for (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            current = code.setdefault((arch, _kernel(found[1])), [])
    return code


def parse_usage(text: str) -> Usage:
    usage: Usage = {}
    arch = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            kernel = _kernel(found[1])
        elif "REG:" in line:
            usage[arch, kernel] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return usage


# ---- the main paths


LOADS, STORES, ARITHMETIC = ("LDG", "LD"), ("STG", "ST"), ("FADD", "FFMA", "DADD", "DFMA")


class Kind(NamedTuple):
    """What the code of one kind of pair must be, counted per 128-bit store."""

    name: str
    kernel: str
    average_loads: int  # plain, 128 bits each
    model_loads: int  # through the read-only path (but for swap, which writes the model)
    model_width: int
    adds: int
    instances: int  # pairs of types that are of this kind
    double: bool = False


KINDS = [
    Kind("float32 <- float32", "update", 1, 1, 128, 4, 1),
    Kind("float32 <- 16-bit", "update", 1, 1, 64, 4, 2),
    Kind("16-bit <- 16-bit", "update", 1, 1, 128, 8, 4),
    Kind("float64 <- float64", "update", 1, 1, 128, 2, 1, True),
    Kind("float64 <- float32", "update", 1, 1, 64, 2, 1, True),
    Kind("float64 <- 16-bit", "update", 1, 1, 32, 2, 2, True),
]
# Code of equal copies may be shared: one instance of each is enough.
for kernel in ("update", "copy"):
    KINDS += [
        Kind("copy, equal sizes", kernel, 0, 1, 128, 0, 1),
        Kind("copy, from half the size", kernel, 0, 1, 64, 0, 1),
        Kind("copy, from a quarter", kernel, 0, 1, 32, 0, 1),
        Kind("copy, from twice the size", kernel, 0, 2, 128, 0, 1),
        Kind("copy, from four times", kernel, 0, 4, 128, 0, 1),
    ]
KINDS.append(Kind("exchange", "swap", 1, 0, 128, 0, 1))


@dataclass
class Run:
    """A straight run from its first load of data on."""

    arch: str
    kernel: str
    body: list[Instruction]
    complaints: list[str] = field(default_factory=list)
    kind: Kind | None = None

    def __post_init__(self) -> None:
        self.loads = [i for i in self.body if i.name in LOADS]
        self.stores = [i for i in self.body if i.name in STORES]
        self.reads = Counter((i.width, "CONSTANT" in i.modifiers) for i in self.loads)

    def count(self, *names: str) -> int:
        """Instructions of these names; FADD2 and FFMA2 count twice, as they work on two elements."""
        found = Counter(i.name for i in self.body)
        return sum(found[name] + 2 * found[name + "2"] for name in names)

    def adds(self) -> int:
        return self.count("FADD", "DADD")

    def multiplies(self) -> int:
        return self.count("FFMA", "DFMA")

    def summary(self) -> tuple[str, str]:
        def widths(accesses: list[Instruction]) -> str:
            kinds = Counter(f"{i.width}{' nc' if 'CONSTANT' in i.modifiers else ''}" for i in accesses)
            return " + ".join(f"{n}x{kind}" for kind, n in sorted(kinds.items(), reverse=True))

        return widths(self.loads), widths(self.stores)


def straight_runs(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Maximal runs that are entered only at the top and left only at the end."""
    targets = {
        int(target, 16)
        for i in code
        if i.name in ("BRA", "BSSY", "CALL", "JMP")
        for target in re.findall(r"\b0x([0-9a-f]+)", i.operands)
    }
    run: list[Instruction] = []
    for i in code:
        if i.address in targets and run:
            yield run
            run = []
        run.append(i)
        if i.name in ("BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT"):
            yield run
            run = []
    if run:
        yield run


def main_paths(arch: str, kernel: str, code: list[Instruction]) -> Iterator[Run]:
    for instructions in straight_runs(code):
        if any(i.name in STORES and i.width >= 128 for i in instructions):
            # Table entries, which a run may read on its way in, come through narrow plain loads.
            data = [i.name in LOADS and (i.width >= 128 or "CONSTANT" in i.modifiers) for i in instructions]
            yield Run(arch, kernel, instructions[data.index(True) if any(data) else 0 :])


def fitting(run: Run) -> Kind | None:
    """The kind whose accesses these are; of several, the one whose arithmetic it is."""
    count = len(run.stores)
    fits = []
    for kind in KINDS:
        wanted: Counter[tuple[int, bool]] = Counter()
        wanted[128, False] = count * kind.average_loads
        wanted[kind.model_width, True] += count * kind.model_loads
        double = run.count("DADD", "DFMA") > 0
        single = run.count("FADD", "FFMA") > 0
        arithmetic = (double, single) == (kind.adds > 0 and kind.double, kind.adds > 0 and not kind.double)
        if kind.kernel == run.kernel and count > 0 and run.reads == +wanted and arithmetic:
            fits.append(kind)
    return min(fits, key=lambda kind: abs(count * kind.adds - run.adds()), default=None)


def judge(run: Run, unroll: int) -> None:
    """Sets the run's kind and complaints."""
    complain = run.complaints.append
    run.kind = fitting(run)
    loads, writes = run.summary()
    if run.kind is None:
        complain(f"fits no kind of pair: loads {loads or 'nothing'}, stores {writes}, adds {run.adds()}")
    else:
        stores = len(run.stores)
        planned = unroll * (2 if run.kind.kernel == "swap" else 1)
        if stores != planned:
            complain(f"stores {stores} vectors where FUSED_EMA_UNROLL plans {planned}")
        for name, found in (("add", run.adds()), ("fused multiply-add", run.multiplies())):
            if found != stores * run.kind.adds:
                complain(f"has {found} {name} instructions for {stores * run.kind.adds} elements")
        if run.count("FMUL", "DMUL"):
            complain("multiplies outside of a fused multiply-add")
    accesses = run.loads + run.stores
    if any(i.width != 128 for i in run.stores):
        complain(f"stores in other widths than 128 bits: {writes}")
    if any(i.name in ("LD", "ST") for i in accesses):
        complain("uses generic accesses (LD, ST): the compiler does not know that the pointers are global")
    if any(i.predicate for i in accesses):
        complain("has predicated loads or stores: a whole tile needs no guards")
    _check_order(run)
    _check_read_only(run)


def _check_order(run: Run) -> None:
    """A use of a loaded value waits for memory, and what is loaded after it waits as well."""
    if sum(i.width for i in run.loads) // 32 >= MAX_REGISTERS:
        return  # more than the registers hold at once: float64 to 16 bits can't but go in batches
    loaded: set[int] = set()
    last = max((n for n, i in enumerate(run.body) if i.name in LOADS), default=0)
    for i in run.body[:last]:
        if i.name in LOADS:
            loaded |= i.written()
        elif i.name in ARITHMETIC or i.name in STORES or i.registers() & loaded:
            late = run.body[last]
            run.complaints.append(f"loads ({late} at {late.address:#x}) after the first use ({i} at {i.address:#x})")
            return


def _check_read_only(run: Run) -> None:
    """What is written must not have come through the read-only path."""
    read_only: dict[str, set[int]] = {}  # pointers, and the registers they are made of
    for i in run.body:
        if i.name in LOADS and "CONSTANT" in i.modifiers:
            read_only[i.pointer] = {r + n for r in map(int, re.findall(r"\bR(\d+)", i.pointer)) for n in (0, 1)}
        if i.name in STORES and i.pointer in read_only:
            run.complaints.append(f"writes {i.pointer}, which it read through the read-only path (.CONSTANT)")
            return
        read_only = {pointer: made_of for pointer, made_of in read_only.items() if not made_of & i.written()}


# ---- the verdict


class Row(NamedTuple):
    """One line of the table: the main paths of one kind in one kernel."""

    arch: str
    kernel: str
    main_path: str
    found: int
    loads: str  # nc: through the read-only path
    stores: str
    add: int
    fma: int
    registers: int
    stack: int
    verdict: str


def planned_unroll() -> int:
    found = re.search(r"#define FUSED_EMA_UNROLL (\d+)", TILES_H.read_text())
    assert found, f"{TILES_H} does not define FUSED_EMA_UNROLL"
    return int(found[1])


def audit(
    code: Code, usage: Usage, archs: tuple[str, ...] = ARCHS, unroll: int | None = None
) -> tuple[list[Row], list[str]]:
    """The table, and a sentence for each thing that is not as planned."""
    unroll = unroll or planned_unroll()
    rows: list[Row] = []
    complaints: list[str] = []
    for arch in archs:
        for kernel in KERNELS.values():
            instructions, used = code.get((arch, kernel)), usage.get((arch, kernel))
            if not instructions:
                complaints.append(f"{arch}, {kernel} kernel: not in this file")
                continue
            found = list(_memory_complaints(instructions, used))
            runs = list(main_paths(arch, kernel, instructions))
            paths: dict[str, list[int]] = {}  # complaint → addresses of the paths it holds for
            for run in runs:
                judge(run, unroll)
                for text in run.complaints:
                    paths.setdefault(text, []).append(run.body[0].address)
            for text, addresses in paths.items():
                more = f", and {len(addresses) - 1} more like it" if len(addresses) > 1 else ""
                found.append(f"the path at {addresses[0]:#x} {text}{more}")
            for kind in (k for k in KINDS if k.kernel == kernel):
                count = sum(run.kind == kind for run in runs)
                if count < kind.instances:
                    found.append(f"expected {kind.instances} main paths {kind.name}, found {count}")
            complaints += [f"{arch}, {kernel} kernel: {text}" for text in found]
            rows += _rows(arch, kernel, runs, used or {})
    return rows, complaints


def _memory_complaints(code: list[Instruction], usage: dict[str, int] | None) -> Iterator[str]:
    local = [i for i in code if i.name in ("LDL", "STL")]
    if local:
        first = local[0]
        yield f"{len(local)} accesses to local memory (a spill), the first {first} at {first.address:#x}"
    if usage is None:
        yield "its resource usage is not listed"
        return
    if usage["REG"] > MAX_REGISTERS:
        yield f"expected at most {MAX_REGISTERS} registers, found {usage['REG']}"
    for what in ("STACK", "LOCAL"):
        if usage[what]:
            yield f"expected no {what.lower()} memory, found {usage[what]} bytes"


def _rows(arch: str, kernel: str, runs: list[Run], usage: dict[str, int]) -> Iterator[Row]:
    groups: dict[Row, int] = {}
    for run in sorted(runs, key=lambda run: -run.adds()):
        row = Row(
            arch,
            kernel,
            run.kind.name if run.kind else "unknown",
            0,
            *run.summary(),
            run.adds(),
            run.multiplies(),
            usage.get("REG", -1),
            usage.get("STACK", -1),
            "FAILED" if run.complaints else "ok",
        )
        groups[row] = groups.get(row, 0) + 1
    for row, count in groups.items():
        yield row._replace(found=count)


def table(rows: list[Row]) -> str:
    cells = [Row._fields, *(tuple(str(value) for value in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


# ---- NVIDIA's tools


def find_tool(name: str) -> Path | None:
    """In PATH, in the CUDA toolkit, or where pip puts it: nvidia-cuda-cuobjdump, -nvdisasm, or triton."""
    if found := shutil.which(name):
        return Path(found)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders += sorted(Path(packages).glob("nvidia/*/bin"), reverse=True)
        folders.append(Path(packages) / "triton" / "backends" / "nvidia" / "bin")
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


def dump(file: Path) -> tuple[str, str]:
    """cuobjdump's listings of a file: machine code, resource usage."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        sys.exit("cuobjdump or nvdisasm not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # cuobjdump starts nvdisasm, which it looks for in PATH.
    path = os.pathsep.join([str(cuobjdump.parent), str(nvdisasm.parent), os.environ.get("PATH", "")])

    def run(option: str) -> str:
        command = [str(cuobjdump), option, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    return run("--dump-sass"), run("--dump-resource-usage")


def main() -> None:
    parser = argparse.ArgumentParser(description="Audits the machine code of the CUDA kernels.")
    parser.add_argument("file", nargs="?", type=Path, help="a library or object; default: the built extension")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="default: %(default)s")
    arguments = parser.parse_args()
    file = arguments.file
    if file is None:
        from fused_ema import _native

        file = _native.path()
        if file is None:
            sys.exit(f"no compiled extension to audit: {_native.why_not()}")
    if not file.exists():
        sys.exit(f"{file}: no such file")
    sass, usage = dump(file)
    rows, complaints = audit(parse_sass(sass), parse_usage(usage), tuple(arguments.arch))
    print(f"{file}\n\n{table(rows)}\n")
    for complaint in complaints:
        print(complaint)
    print(f"{len(complaints)} complaints" if complaints else "all as planned")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
