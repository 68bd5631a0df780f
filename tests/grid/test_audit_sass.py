"""The audit of machine code finds nothing in a sound listing, and finds each fault that is put into one."""

import re
import subprocess
import sys
from pathlib import Path

import audit_sass
import pytest
from sass import KERNELS, parse_sass, parse_usage

UNROLL = 2
OPS = {kernel: op for op, kernel in KERNELS.items()}
NAME = "_ZN9fused_ema44_GLOBAL__N__5af9eaa2_11_ema_cuda_cu_26a2516810ema_kernelILNS_2OpE{}EEEvNS_6LaunchE"


def listing(instructions, op):
    """A function as cuobjdump prints it, with made-up encodings."""
    lines = [f"\t\tFunction : {NAME.format(op)}", '\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"']
    for n, text in enumerate(instructions):
        guard = "" if text.startswith("@") else "     "
        lines.append(f"        /*{16 * n:04x}*/              {guard}{text} ;    /* 0x00000a00ff017624 */")
        lines.append("                                                             /* 0x000fe400078e00ff */")
    return "\n".join(lines)


def main_path(average_loads, model_loads, model, adds=0, add="FADD", multiply_add="FFMA"):
    """One straight run with UNROLL vectors: entry, loads, arithmetic, stores, exit."""
    code = ["LDG.E.U8 R2, desc[UR4][R8.64+0x28]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x0"]
    for u in range(UNROLL):
        code += [f"LDG.E.128 R{12 + 4 * u}, desc[UR4][R2.64+{u:#x}000]"] * average_loads
        code += [f"LDG.E.{model} R{40 + 4 * u}, desc[UR4][R26.64+{u:#x}800]"] * model_loads
    for u in range(UNROLL):
        for lane in range(adds):
            code.append(f"{add} R34, -R{12 + 4 * u}, R{40 + 4 * u}.reuse")
            code.append(f"@P0 {multiply_add} R{12 + 4 * u + lane % 4}, R9, R34, R24")
    for u in range(UNROLL):
        code += [f"STG.E.128 desc[UR4][R2.64+{u:#x}000], R{12 + 4 * u}"] * max(1, average_loads)
    return [*code, "EXIT"]


def sound():
    """(machine code, resource usage) of kernels that have just what the audit demands."""
    copies = []
    for count, model in [(1, "128."), (1, "64."), (1, ""), (2, "128."), (4, "128.")]:
        copies += main_path(0, count, model + "CONSTANT")
    averages = main_path(1, 1, "128.CONSTANT", 4) + main_path(1, 1, "64.CONSTANT", 4) * 2
    averages += main_path(1, 1, "128.CONSTANT", 8) * 4
    for model, count in [("128.CONSTANT", 1), ("64.CONSTANT", 1), ("CONSTANT", 2)]:
        averages += main_path(1, 1, model, 2, "DADD", "DFMA") * count
    finite = []
    for count, model in [(6, "128.CONSTANT"), (3, "64.CONSTANT"), (2, "CONSTANT")]:
        finite += main_path(1, 1, model) * count
    exchange = main_path(2, 0, "")
    code = {"copy": copies, "swap": exchange, "restore": exchange}
    code |= dict.fromkeys(audit_sass.UPDATES, averages + copies)
    code |= dict.fromkeys(audit_sass.FINITE, averages + copies + finite)
    sass = "\tcode for sm_90\n" + "\n".join(listing(code[kernel], op) for kernel, op in OPS.items())
    used = "  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    usage = "arch = sm_90\nResource usage:\n" + "".join(f" Function {NAME.format(op)}:\n{used}" for op in OPS.values())
    return sass, usage


def complaints(sass, usage):
    return audit_sass.audit(parse_sass(sass), parse_usage(usage), ("sm_90",), UNROLL)[1]


def swapped_lines(text, first, second):
    """Exchanges the first instruction of one kind with the next one of another."""
    a = re.search(first, text)
    b = re.compile(second).search(text, a.end())
    return text[: a.start()] + b[0] + text[a.end() : b.start()] + a[0] + text[b.end() :]


def test_a_sound_listing_passes():
    sass, usage = sound()
    rows, found = audit_sass.audit(parse_sass(sass), parse_usage(usage), ("sm_90",), UNROLL)
    assert found == []
    assert "float32 <- 16-bit" in audit_sass.table(rows)
    assert {row.verdict for row in rows} == {"ok"}


FAULTS = {
    "spill": (
        lambda s: s.replace("ISETP.NE.AND P0, PT, R2, RZ, PT", "STL [R1+0x8], R2", 1),
        "local memory (a spill), the first STL at 0x10",
    ),
    "narrow loads": (
        lambda s: s.replace("LDG.E.128 R12", "LDG.E R12", 1),
        "the path at 0x40 fits no kind of pair: loads 2x128 nc + 1x128, stores 2x128",
    ),
    "a class in 32 bits": (
        lambda s: s.replace("LDG.E.128 R", "LDG.E R").replace("STG.E.128", "STG.E"),
        "expected 1 main paths float32 <- float32, found 0",
    ),
    "narrow store": (lambda s: s.replace("STG.E.128", "STG.E.64", 1), "stores in other widths than 128 bits"),
    "load after arithmetic": (
        lambda s: swapped_lines(s, r"LDG\.E\.128\.CONSTANT R44[^;]*", r"FADD R34[^;]*"),
        "after the first use (FADD at 0x60)",
    ),
    "load after a conversion": (
        lambda s: s.replace("LDG.E.128 R16", "PRMT R34, R40, 0x9910, RZ ;\n /*0048*/ LDG.E.128 R16", 1),
        "after the first use (PRMT at 0x50)",
    ),
    "missing class": (lambda s: s.replace("DADD", "DMUL").replace("DFMA", "DMUL"), "float64 <- 16-bit, found 0"),
    "too many adds": (lambda s: s.replace("FFMA", "FADD", 1), "has 9 add instructions"),
    "no fused multiply-add": (lambda s: s.replace("FFMA", "FMUL", 1), "has 7 fused multiply-add instructions"),
    "average through the read-only path": (
        lambda s: s.replace("R40, desc[UR4][R26.64+0x0800]", "R40, desc[UR4][R2.64+0x0000]", 1),
        "which it read through the read-only path",
    ),
    "average as the only read-only load": (
        lambda s: s.replace("LDG.E.128 R12", "LDG.E.128.CONSTANT R12", 1),
        "fits no kind of pair",
    ),
    "generic accesses": (lambda s: s.replace("STG.E.128", "ST.E.128", 2), "uses generic accesses (LD, ST)"),
    "generic accesses elsewhere": (
        lambda s: s.replace("LDG.E.U8", "LD.E.U8", 3),
        "3 generic accesses (LD, ST), the first LD.E.U8 at 0x0",
    ),
    "guarded store": (lambda s: s.replace("     STG.E.128", "@!P0 STG.E.128", 1), "has predicated loads or stores"),
    "missing architecture": (lambda s: s.replace("sm_90", "sm_80"), "sm_90, copy kernel: not in this file"),
    "missing kernel": (lambda s: s.replace("OpE2E", "OpE9E"), "sm_90, swap kernel: not in this file"),
    "empty": (lambda s: "", "sm_90, update kernel: not in this file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    sass, usage = sound()
    doctor, sentence = FAULTS[fault]
    doctored = doctor(sass)
    assert doctored != sass
    found = complaints(doctored, usage)
    assert any(sentence in complaint for complaint in found), found


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("REG:64", "REG:65", "expected at most 64 registers, found 65"),
        ("STACK:0", "STACK:16", "expected no stack memory, found 16 bytes"),
        ("LOCAL:0", "LOCAL:8", "expected no local memory, found 8 bytes"),
        ("arch = sm_90", "arch = sm_80", "its resource usage is not listed"),
    ],
)
def test_resource_usage_is_checked(old, new, sentence):
    sass, usage = sound()
    assert any(sentence in complaint for complaint in complaints(sass, usage.replace(old, new, 1)))


def test_a_larger_unroll_than_found_is_a_complaint():
    sass, usage = sound()
    found = audit_sass.audit(parse_sass(sass), parse_usage(usage), ("sm_90",), 4)[1]
    assert any("stores 2 vectors where FUSED_EMA_UNROLL plans 4" in complaint for complaint in found)


def test_the_plan_is_read_from_the_source():
    assert audit_sass.planned_unroll() >= 1


def test_the_script_fails_loudly(tmp_path):
    script = Path(audit_sass.__file__)
    done = subprocess.run([sys.executable, script, tmp_path / "none.so"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such file" in done.stderr
