"""Fills the parts of the pages between markers from result files, so that no number there is typed by hand.

python benchmarks/readme_table.py [--check]

A marker names the writer and the result file: <!-- equal from benchmarks/results/x.json -->.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import methods
import tables
from methods import DIFFUSERS, DIFFUSERS_FOREACH, DIFFUSERS_FUSED, FOREACH_CACHED, LOOP
from report import AS_BUILT, machine
from tables import duration, escaped, source, times

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- (\w+) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def drop_in(content: dict[str, Any], link: str, call: str, ours: str, others: dict[str, str]) -> list[str]:
    """The time of a drop-in, and that of what it replaces. `others`: the titles of the columns, by method."""
    cases: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        cases.setdefault(row["case"], {})[row["method"]] = row
    lines = [
        f"| time of `{call}` | here | {' | '.join(others.values())} |",
        "| --- | ---: " + "| ---: " * len(others) + "|",
    ]
    for case, found in cases.items():
        here = found[ours]
        cells = [duration(here["device_us"]["median"])]
        for other in others:
            if other in found:
                ratio = times(found[other]["ratio"] / here["ratio"])
                cells.append(f"{duration(found[other]['device_us']['median'])} ({ratio})")
            else:
                cells.append("raises")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += [
        "",
        "Medians. All methods alternate in one run, on alternating sets of tensors, so that none is in a cache; "
        "`called in a row` has consecutive calls of each method on the same tensors. In brackets: how many times as "
        f"long as here, from ratios within each round. {source(content, link)}.",
    ]
    return lines


averaged_model = partial(
    drop_in,
    call="update_parameters(model)",
    ours=methods.AVERAGED_OURS,
    others={
        methods.AVERAGED: "torch",
        methods.AVERAGED_FUSED: "torch, with `fused_ema.get_ema_multi_avg_fn`",
    },
)
ema_model = partial(
    drop_in,
    call="step(model.parameters())",
    ours=DIFFUSERS_FUSED,
    others={DIFFUSERS: "diffusers", DIFFUSERS_FOREACH: "diffusers, `foreach=True`"},
)


def errors(content: dict[str, Any], link: str) -> list[str]:
    lines = ["| decay | method | one step | moved | drift |", "| ---: | --- | ---: | ---: | ---: |"]
    for row in content["rows"]:
        cells = f"{row['one_step']:.2f} | {row['moved']:.1%} | {row['drift_ulp']:.0f} |"
        lines.append(f"| {row['decay']} | {escaped(row['method'])} | {cells}")
    lines += [
        "",
        "One step: the largest error compared with float64, in units of the promised bound. Moved: the share of "
        "averages that an update changes although they equal the model. Drift: the largest distance of such an "
        f"average from the model after {content['steps']:,} updates, in units in the last place. "
        f"{source(content, link)}.",
    ]
    return lines


def merging(content: dict[str, Any], link: str) -> list[str]:
    rows = {row["method"]: row for row in content["rows"]}
    lines = [
        "| | time | read at | memory | of it not mapped from files | elements that differ from the formula |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, row in rows.items():
        speed = content["bytes"] / row["seconds"] / 1e9
        wrong = "" if row["differing"] is None else "none" if row["differing"] == 0 else f"{row['differing']:.1e}"
        sizes = f"{row['peak'] / 1e6:,.0f} MB | {row['anonymous'] / 1e6:,.0f} MB"
        lines.append(f"| {escaped(method)} | {row['seconds']:.2f} s | {speed:.1f} GB/s | {sizes} | {wrong} |")
    size = content["bytes"] / content["count"] / 1e9
    lines += [
        "",
        f"The mean of {content['count']} checkpoints of {size:.2f} GB in bfloat16, which are in the system's cache, "
        "until the average is on disk: medians of runs in alternation, each in a process of its own. `copy` reads the "
        "same bytes and writes one checkpoint, without any arithmetic. Memory is the peak beyond what the process has "
        f"after its imports. {source(content, link)}.",
    ]
    return lines


def sweep(content: dict[str, Any], link: str) -> list[str]:
    """The eight variants with the best worst case, the worst variant, and the references."""
    cases = {case["case"]: case["variants"] for case in content["cases"]}
    behind = {}
    for name in content["macros"]:
        spent = [
            each[name]["us"]["median"] / min(each[n]["us"]["median"] for n in content["macros"] if n in each)
            for each in cases.values()
            if name in each
        ]
        behind[name] = max(spent)
    chosen = sorted(behind, key=lambda name: behind[name])
    names = [*chosen[:8], AS_BUILT, chosen[-1], FOREACH_CACHED, "a.add_(b)", "device copy"]
    lines = ["| µs | " + " | ".join(cases) + " | worst |", "| --- |" + " ---: |" * (len(cases) + 1)]
    for name in names:
        cells = [f"{each[name]['us']['median']:.1f}" if name in each else "" for each in cases.values()]
        worst = f"+{behind[name] - 1:.1%}" if name in behind else ""
        lines.append(f"| {escaped(name)} | " + " | ".join(cells) + f" | {worst} |")
    return [
        *lines,
        "",
        f"`make gpu-sweep`, {machine(content['env'])}, [all variants]({link}).",
    ]


WRITERS: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    **tables.WRITERS,
    "averaged_model": averaged_model,
    "errors": errors,
    "merging": merging,
    "sweep": sweep,
    "ema_model": ema_model,
}


def written(page: Path, marked: re.Match[str]) -> str:
    link = Path(os.path.relpath(ROOT / marked[3], page.parent)).as_posix()
    content = json.loads((ROOT / marked[3]).read_text(encoding="utf-8"))
    return marked[1] + "\n".join(WRITERS[marked[2]](content, link)) + "\n" + marked[4]


# The column of docs/install.md that compares with the tutorial loop the runners that the two columns before it name.
SPEEDUPS = re.compile(r"(<!-- speedups from (.+) -->\n)(\|.*?\n)\n?[^|]*?(<!-- end -->)", re.DOTALL)
BY_BACKEND = {"cuda": ("CUDA", "extension"), "cpu": ("CPU", "extension"), "torch": ("CPU", "foreach")}


def speedups(marked: re.Match[str]) -> str:
    case, found, sources = "GPT-2 small, float32←bfloat16", {}, []
    for path in marked[2].split(", "):
        content = json.loads((ROOT / path).read_text(encoding="utf-8"))
        device, runner = BY_BACKEND[content["env"]["backend"]]
        (ratio,) = (row["ratio"] for row in content["rows"] if (row["case"], row["method"]) == (case, LOOP))
        found[device, runner] = f"{device} {ratio:.1f}"
        sources.append(f"{runner} on {device}, [{machine(content['env'])}](../{path})")
    lines = []
    for number, line in enumerate(marked[3].splitlines()):
        _, what, command, cuda, cpu, _, tested, _ = map(str.strip, line.split("|"))
        if number > 1:
            each = [found.get(("CUDA", cuda)), found.get(("CPU", cpu))]
            speed = "" if tested.startswith("not tested") else "<br>".join(filter(None, each))
            line = f"| {what} | {command} | {cuda} | {cpu} | {speed} | {tested} |"
        lines.append(line)
    lines += [
        "",
        f"The numbers say how many times as fast as the tutorial loop a bound handle updates {case}: "
        f"{'; '.join(sources)}. Each file has its command, and is a run of its own, so compare a number "
        "with 1, not with another number. nvrtc has not been measured.",
    ]
    return marked[1] + "\n".join(lines) + "\n" + marked[4]


def main() -> int:
    stale = 0
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "TUNING.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = SPEEDUPS.sub(speedups, MARKED.sub(partial(written, page), before))
        if "--check" in sys.argv[1:]:
            stale += before != after
        else:
            page.write_text(after, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
