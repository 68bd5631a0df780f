"""Reads the listings of machine code that cuobjdump prints."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# By Op, the template argument in the mangled name.
OPS = ("update", "copy", "swap", "restore", "update_stochastic", "update_finite", "update_stochastic_finite")
KERNELS = {str(number): op for number, op in enumerate(OPS)}
LOADS, STORES = ("LDG", "LD"), ("STG", "ST")
LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:(@!?U?P\w+)\s+)?([A-Z]\w*)(\S*)\s*([^;]*);")
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass
class Instruction:
    address: int
    predicate: str | None
    name: str  # LDG
    modifiers: list[str]  # E, 128, CONSTANT
    operands: str

    @property
    def width(self):
        """Bits of a memory access."""
        return next((WIDTHS[m] for m in self.modifiers if m in WIDTHS), 32)

    @property
    def read_only(self):
        return "CONSTANT" in self.modifiers

    @property
    def pointer(self):
        return self.operands[self.operands.find("[") :].split(",")[0]

    def written(self):
        """The registers that a load fills, or that any other instruction may write (two, for 64 bits)."""
        first = re.match(r"R(\d+)", self.operands)
        if not first or self.name in (*STORES, "STL", "STS"):
            return set()
        count = max(1, self.width // 32) if self.name in LOADS else 2
        return set(range(int(first[1]), int(first[1]) + count))

    def __str__(self):
        return f"{'.'.join([self.name, *self.modifiers])} at {self.address:#x}"


def registers(operands):
    return {int(r) for r in re.findall(r"\bR(\d+)", operands)}


def _lines(text):
    """Each line, and the (arch, kernel) it belongs to."""
    arch = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"(?:arch = |\s*code for )(sm_\d+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (?:: )?([^\s:]+)", line):
            name = re.search(r"ema_kernelI\w*?OpE(\d)E", found[1])
            kernel = KERNELS.get(name[1], found[1]) if name else found[1]
        yield (arch, kernel), line


def parse_sass(text):
    """(arch, kernel) → its instructions."""
    code = {}
    for key, line in _lines(text):
        if found := LINE.match(line):
            address, predicate, name, modifiers, operands = found.groups()
            parts = [m for m in modifiers.split(".") if m]
            instruction = Instruction(int(address, 16), predicate, name, parts, operands.strip())
            code.setdefault(key, []).append(instruction)
    return code


def parse_usage(text):
    """(arch, kernel) → REG, STACK, LOCAL, ..."""
    found = ((key, re.findall(r"(\w+):(\d+)", line)) for key, line in _lines(text) if "REG:" in line)
    return {key: {name: int(value) for name, value in pairs} for key, pairs in found}


def straight_runs(code):
    """Maximal runs that are entered only at the top and left only at the end."""
    jumps = [i for i in code if i.name in ("BRA", "BSSY", "CALL", "JMP")]
    targets = {int(target, 16) for i in jumps for target in re.findall(r"\b0x([0-9a-f]+)", i.operands)}
    run = []
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


def _tool_path():
    """PATH, then the CUDA toolkit, then where pip puts its tools: nvidia-cuda-cuobjdump and -nvdisasm, or triton."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders += sorted(Path(packages).glob("nvidia/*/bin"), reverse=True)
        folders.append(Path(packages) / "triton" / "backends" / "nvidia" / "bin")
    return os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])


def dump(file):
    """cuobjdump's listings of a library, an object or a cubin: machine code, resource usage."""
    path = _tool_path()
    cuobjdump, nvdisasm = (shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:  # cuobjdump starts nvdisasm
        sys.exit("cuobjdump or nvdisasm not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")

    def run(option):
        command = [cuobjdump, option, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    code, usage = run("--dump-sass"), run("--dump-resource-usage")
    if (arch := re.search(r"code for (sm_\d+)", code)) and "arch = " not in usage:  # of a cubin
        usage = f"arch = {arch[1]}\n{usage}"
    return code, usage


def listings(files):
    """The machine code and the resource usage in all these files."""
    code, usage = {}, {}
    for file in files:
        if not file.exists():
            sys.exit(f"{file}: no such file")
        sass, used = dump(file)
        code |= parse_sass(sass)
        usage |= parse_usage(used)
    return code, usage


def of_nvrtc(archs, folder):
    """Cubins of all kernels for these architectures, compiled into the folder by the NVRTC of the installed torch."""
    from fused_ema._build.nvrtc import OPS, nvrtc

    for arch, op in itertools.product(archs, OPS):
        file = folder / f"{arch}-{op}.cubin"
        file.write_bytes(nvrtc().compile(op, int(arch.removeprefix("sm_"))).code)
        yield file
