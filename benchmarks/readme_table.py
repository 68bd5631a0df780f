"""Writes what stands between the markers of README.md and docs/ from result files, so that no number there is typed.

python benchmarks/readme_table.py [--check]

A marker names what is to be written, and from which file: <!-- models from benchmarks/results/x.json -->.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods import FOREACH_CACHED, LOOP, MANAGER, OURS
from report import machine

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- (\w+) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {  # case in the file → heading
    "GPT-2 small, float32←float32": "GPT-2 small,<br>124M float32",
    "GPT-2 small, float32←bfloat16": "the same, float32<br>average of bfloat16",
    "ResNet-50, float32←float32": "ResNet-50,<br>26M and buffers",
    "2000 tensors of 256, float32←float32": "2000 tensors<br>of 256",
    "2000 tensors of 256, float32←float32, called in a row": "the same,<br>in a row",
}


def duration(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} µs"


def error(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def source(content: dict[str, Any], path: str) -> str:
    return f"`{content['env']['command']}`, {machine(content['env'])}, [all numbers]({path})"


def escaped(method: str) -> str:
    return method.replace("_", r"\_")  # else Markdown takes them for emphasis


def models(content: dict[str, Any], path: str) -> list[str]:
    rows = {(row["case"], row["method"]): row for row in content["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in content["rows"]))
    first = next(iter(COLUMNS))
    lines = ["| time per update | " + " | ".join(COLUMNS.values()) + " | error |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) + 1))
    for method in methods:
        cells = []
        for case in COLUMNS:
            row = rows.get((case, method))
            ratio = f" ({row['ratio']:.2f})" if row and row["ratio"] else ""
            cells.append(duration(row["device_us"]["median"]) + ratio if row else "")
        worst = error(rows[first, method]["max_err_over_bound"]) if (first, method) in rows else ""
        lines.append(f"| {escaped(method)} | " + " | ".join(cells) + f" | {worst} |")
    ceiling = {each["case"]: each["streams"] for each in content["ceiling"]}
    for stream in dict.fromkeys(name for streams in ceiling.values() for name in streams):
        found = [ceiling[case][stream]["us"]["median"] if case in ceiling else None for case in COLUMNS]
        lines.append(f"| ({stream}) | " + " | ".join(duration(us) if us else "" for us in found) + " | |")
    lines += [
        "",
        "Median, and in brackets how many times that of the bound handle (the median over the rounds, each of which "
        "meets one state of the machine); error of one step in the first column, the "
        "largest, in units of [what is promised](#numerics). One run, methods in turns, and sets of "
        "tensors in turns too, so that none is in a cache; only in the last column five calls in a row of each on the "
        f"same tensors: {source(content, path)}.",
    ]
    return lines


def averages(content: dict[str, Any], path: str) -> list[str]:
    gains = {}
    for case in content["averages"]:
        if "averages of" in case["case"]:
            gains[case["case"]] = list(case["ratio"].values())[1]
    listed = "; ".join(f"{case}: {gain:.2f}" for case, gain in gains.items())
    return [
        f"How many times as fast as one manager for each: {listed} ({source(content, path)}).",
    ]


def training(content: dict[str, Any], path: str) -> list[str]:
    cases = content["training"]
    methods = [name for name in cases[0]["share_of_step"] if name not in OURS or name == MANAGER]
    lines = ["| share of a training step | " + " | ".join(case["case"] for case in cases) + " |"]
    lines.append("| --- |" + " ---: |" * len(cases))
    for name in methods:
        shares = " | ".join(f"{case['share_of_step'][name]:.1%}" for case in cases)
        lines.append(f"| {escaped(name)} | {shares} |")
    gain = max(case["share_of_step"][LOOP] - case["share_of_step"][MANAGER] for case in cases)
    words = f"{source(content, path)}. So in these trainings, on this machine, fused_ema "
    words += f"saves at most {gain:.1%} of the step against the tutorial loop"
    found = content["scaling"]
    end, largest = found["break_even_bytes"].get(FOREACH_CACHED), max(each["bytes"] for each in found["by_size"])
    if end is not None and 0 < end <= largest:
        words += (
            f"; and for a float32 model of {found['tensors']} tensors, from {end / 12 / 1e6:.1f}M parameters on, the "
        )
        words += "gain over `torch._foreach_lerp_` on lists that you keep yourself is under a tenth"
    lines += ["", words + "."]
    return lines


def errors(content: dict[str, Any], path: str) -> list[str]:
    lines = ["| decay | method | one step | moved | drift |", "| ---: | --- | ---: | ---: | ---: |"]
    for row in content["rows"]:
        cells = f"{row['one_step']:.2f} | {row['moved']:.1%} | {row['drift_ulp']:.0f} |"
        lines.append(f"| {row['decay']} | {escaped(row['method'])} | {cells}")
    lines += [
        "",
        "One step: the largest error against float64, in units of what is promised. Moved: the share of averages "
        "that an update changes though they equal the model. Drift: how far the farthest such average is after "
        f"{content['steps']:,} updates, in units of its last place. "
        f"{source(content, '../' + path)}.",
    ]
    return lines


WRITERS: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    "models": models,
    "averages": averages,
    "training": training,
    "errors": errors,
}


def written(marked: re.Match[str]) -> str:
    content = json.loads((ROOT / marked[3]).read_text(encoding="utf-8"))
    return marked[1] + "\n".join(WRITERS[marked[2]](content, marked[3])) + "\n" + marked[4]


def main() -> int:
    stale = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = MARKED.sub(written, before)
        if "--check" in sys.argv[1:]:
            stale += before != after
        else:
            page.write_text(after, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
