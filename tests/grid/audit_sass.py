"""Audits the machine code of the CUDA kernels, without a GPU:  python tests/grid/audit_sass.py [files | --nvrtc]

A file is a library, an object or a cubin; the default is the built extension. --nvrtc compiles the kernels with the
NVRTC of the installed torch, and audits those.

The main path of each kind of pair that goes by vectors is one straight run of instructions that ends in 128-bit
stores. It must load averages in 128 bits and parameters in vectors of as many elements, issue all loads before it uses
a loaded value, and do one add and one fused multiply-add per element. No kernel may use local memory or generic
accesses. Prints a table, and exits 1 with the reasons if anything differs.
"""

import argparse
import itertools
import re
import sys
import tempfile
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from typing import NamedTuple

from sass import KERNELS, LOADS, STORES, listings, of_nvrtc, registers, straight_runs

ARCHS = ("sm_80", "sm_90", "sm_100")
ARITHMETIC = re.compile("[FD](ADD|FMA)")
MAX_REGISTERS = 64  # so that 1024 threads fit an SM, as __launch_bounds__ in ema_cuda.cu demands
TILES_H = Path(__file__).resolve().parents[2] / "csrc" / "tiles.h"


class Kind(NamedTuple):
    """What the main path of one kind of pair must have, per 128-bit store."""

    name: str
    kernel: str
    average_loads: int  # plain, 128 bits each
    model_loads: int  # through the read-only path; none for an exchange, which writes the model
    model_width: int
    adds: int
    instances: int  # pairs of types of this kind
    letters: str = ""  # what its arithmetic instructions start with: F for float32, D for float64


UPDATES, FINITE = ("update", "update_stochastic"), ("update_finite", "update_stochastic_finite")
KINDS = [Kind("exchange", kernel, 1, 0, 128, 0, 1) for kernel in ("swap", "restore")]
for kernel in (*UPDATES, *FINITE):
    KINDS += [
        Kind("float32 <- float32", kernel, 1, 1, 128, 4, 1, "F"),
        Kind("float32 <- 16-bit", kernel, 1, 1, 64, 4, 2, "F"),
        Kind("float64 <- float64", kernel, 1, 1, 128, 2, 1, "D"),
        Kind("float64 <- float32", kernel, 1, 1, 64, 2, 1, "D"),
        Kind("float64 <- 16-bit", kernel, 1, 1, 32, 2, 2, "D"),
        # The stochastic kernels never run these, and may leave them out.
        Kind("16-bit <- 16-bit", kernel, 1, 1, 128, 8, 0 if "stochastic" in kernel else 4, "F"),
    ]
for kernel in FINITE:  # a copy reads the average, which stays where the model is not finite
    KINDS += [
        Kind("finite copy, equal sizes", kernel, 1, 1, 128, 0, 6),
        Kind("finite copy, from half the size", kernel, 1, 1, 64, 0, 3),
        Kind("finite copy, from a quarter", kernel, 1, 1, 32, 0, 2),
    ]
for kernel in (*UPDATES, *FINITE, "copy"):  # equal copies may share code, so one of each is enough
    KINDS += [
        Kind("copy, equal sizes", kernel, 0, 1, 128, 0, 1),
        Kind("copy, from half the size", kernel, 0, 1, 64, 0, 1),
        Kind("copy, from a quarter", kernel, 0, 1, 32, 0, 1),
        Kind("copy, from twice the size", kernel, 0, 2, 128, 0, 1),
        Kind("copy, from four times", kernel, 0, 4, 128, 0, 1),
    ]


class Run:
    """A main path, from its first load of data to its end."""

    def __init__(self, kernel, body):
        self.kernel, self.body = kernel, body
        self.loads = [i for i in body if i.name in LOADS]
        self.stores = [i for i in body if i.name in STORES]
        self.adds, self.multiplies = self.count("FADD", "DADD"), self.count("FFMA", "DFMA")
        self.kind = fitting(self)

    def count(self, *names):
        """Instructions of these names; FADD2 and FFMA2 count twice, as they work on two elements."""
        found = Counter(i.name for i in self.body)
        return sum(found[name] + 2 * found[name + "2"] for name in names)


def summary(accesses):
    kinds = Counter(f"{i.width}{' nc' if i.read_only else ''}" for i in accesses)
    return " + ".join(f"{n}x{kind}" for kind, n in sorted(kinds.items(), reverse=True))


def main_paths(kernel, code):
    for instructions in straight_runs(code):
        if any(i.name in STORES and i.width >= 128 for i in instructions):
            # A run may read table entries first, which come through narrow plain loads.
            data = [i.name in LOADS and (i.width >= 128 or i.read_only) for i in instructions]
            yield Run(kernel, instructions[data.index(True) if any(data) else 0 :])


def fitting(run):
    """The kind that has these accesses; if several have, the one with the nearest number of adds."""
    count = len(run.stores)
    reads = Counter((i.width, i.read_only) for i in run.loads)
    letters = "".join({i.name[0] for i in run.body if ARITHMETIC.match(i.name)})
    fits = []
    for kind in KINDS:
        wanted = Counter({(128, False): count * kind.average_loads, (kind.model_width, True): count * kind.model_loads})
        if (kind.kernel, kind.letters) == (run.kernel, letters) and reads == +wanted:
            fits.append(kind)
    return min(fits, key=lambda kind: abs(count * kind.adds - run.adds), default=None)


# ---- Complaints ----


def run_complaints(run, unroll):
    stores, writes = len(run.stores), summary(run.stores)
    if run.kind is None:
        yield f"fits no kind of pair: loads {summary(run.loads) or 'nothing'}, stores {writes}, adds {run.adds}"
    else:
        planned = unroll * (2 if run.kind.name == "exchange" else 1)
        if stores != planned:
            yield f"stores {stores} vectors where FUSED_EMA_UNROLL plans {planned}"
        for name, found in (("add", run.adds), ("fused multiply-add", run.multiplies)):
            if found != stores * run.kind.adds:
                yield f"has {found} {name} instructions for {stores * run.kind.adds} elements"
        if run.count("FMUL", "DMUL"):
            yield "multiplies outside a fused multiply-add"
    accesses = run.loads + run.stores
    if any(i.width != 128 for i in run.stores):
        yield f"stores in other widths than 128 bits: {writes}"
    if any(i.name in ("LD", "ST") for i in accesses):
        yield "uses generic accesses (LD, ST): the compiler does not know that the pointers are global"
    if any(i.predicate for i in accesses):
        yield "has predicated loads or stores: a whole tile needs no guards"
    yield from order_complaints(run)
    yield from read_only_complaints(run)


def order_complaints(run):
    """Using a loaded value waits for memory, so every later load waits too."""
    if sum(i.width for i in run.loads) // 32 >= MAX_REGISTERS:
        return  # more than the registers hold at once: float64 to 16 bits has to go in batches
    loaded = set()
    last = max((n for n, i in enumerate(run.body) if i.name in LOADS), default=0)
    for i in run.body[:last]:
        if i.name in LOADS:
            loaded |= i.written()
        elif ARITHMETIC.match(i.name) or i.name in STORES or registers(i.operands) & loaded:
            yield f"loads ({run.body[last]}) after the first use ({i})"
            return


def read_only_complaints(run):
    """Nothing that is written may be read through the read-only path."""
    read_only = {}  # pointer → the registers that hold it
    for i in run.body:
        if i.name in LOADS and i.read_only:
            read_only[i.pointer] = {r + n for r in registers(i.pointer) for n in (0, 1)}
        if i.name in STORES and i.pointer in read_only:
            yield f"writes {i.pointer}, which it read through the read-only path (.CONSTANT)"
            return
        read_only = {pointer: made_of for pointer, made_of in read_only.items() if not made_of & i.written()}


def memory_complaints(code, usage):
    generic = [i for i in code if i.name in ("LD", "ST")]
    if generic:
        yield f"{len(generic)} generic accesses (LD, ST), the first {generic[0]}"
    local = [i for i in code if i.name in ("LDL", "STL")]
    if local:
        yield f"{len(local)} accesses to local memory (a spill), the first {local[0]}"
    if not usage:
        yield "its resource usage is not listed"
        return
    if usage["REG"] > MAX_REGISTERS:
        yield f"expected at most {MAX_REGISTERS} registers, found {usage['REG']}"
    for what in ("STACK", "LOCAL"):
        if usage[what]:
            yield f"expected no {what.lower()} memory, found {usage[what]} bytes"


# ---- The verdict ----


# One line of the table: the main paths of one kind in one kernel. "nc" marks the read-only path.
Row = namedtuple("Row", "arch kernel main_path loads stores add fma registers stack verdict found", defaults=[0])


def planned_unroll():
    found = re.search(r"#define FUSED_EMA_UNROLL (\d+)", TILES_H.read_text())
    assert found, f"{TILES_H} does not define FUSED_EMA_UNROLL"
    return int(found[1])


def audit(code, usage, archs=ARCHS, unroll=None):
    """The table, and a sentence for each deviation from the plan."""
    rows, complaints = [], []
    for arch, kernel in itertools.product(archs, KERNELS.values()):
        found = ["not in this file"]
        if (arch, kernel) in code:
            key = arch, kernel
            more, found = audit_kernel(*key, code[key], usage.get(key, {}), unroll or planned_unroll())
            rows += more
        complaints += [f"{arch}, {kernel} kernel: {text}" for text in found]
    return rows, complaints


def audit_kernel(arch, kernel, code, usage, unroll):
    rows, kinds = Counter(), Counter()
    paths = defaultdict(list)  # complaint → addresses of the paths that have it
    for run in sorted(main_paths(kernel, code), key=lambda run: -run.adds):
        faults = list(run_complaints(run, unroll))
        for text in faults:
            paths[text].append(run.body[0].address)
        kinds[run.kind] += 1
        name, verdict = run.kind.name if run.kind else "unknown", "FAILED" if faults else "ok"
        moves = summary(run.loads), summary(run.stores), run.adds, run.multiplies
        rows[Row(arch, kernel, name, *moves, usage.get("REG", -1), usage.get("STACK", -1), verdict)] += 1
    found = list(memory_complaints(code, usage))
    for text, addresses in paths.items():
        more = f", and {len(addresses) - 1} more like it" if len(addresses) > 1 else ""
        found.append(f"the path at {min(addresses):#x} {text}{more}")
    for kind in KINDS:
        if kind.kernel == kernel and kinds[kind] < kind.instances:
            found.append(f"expected {kind.instances} main paths {kind.name}, found {kinds[kind]}")
    return [row._replace(found=count) for row, count in rows.items()], found


def table(rows):
    cells = [Row._fields, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def main():
    from fused_ema.runners import extension

    parser = argparse.ArgumentParser(description="Audits the machine code of the CUDA kernels.")
    parser.add_argument("files", nargs="*", type=Path, help="libraries, objects or cubins; default: the extension")
    parser.add_argument("--nvrtc", action="store_true", help="what the NVRTC of the installed torch compiles")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = list(of_nvrtc(arguments.arch, Path(folder))) if arguments.nvrtc else arguments.files
        files = files or [extension.path() or sys.exit(f"no extension to audit: {extension.why_not()}")]
        code, usage = listings(files)
    rows, complaints = audit(code, usage, tuple(arguments.arch))
    print(f"{'NVRTC' if arguments.nvrtc else ', '.join(map(str, files))}\n\n{table(rows)}\n")
    for complaint in complaints:
        print(complaint)
    print(f"{len(complaints)} complaints" if complaints else "all as planned")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
