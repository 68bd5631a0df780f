"""Fills the parts of the pages between markers from result files, so that no number there is typed by hand.

python benchmarks/readme_table.py [--check]

A marker names the writer and the result file: <!-- models from benchmarks/results/x.json -->.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import waits
from methods import (
    BOUND,
    DIFFUSERS,
    DIFFUSERS_FOREACH,
    DIFFUSERS_FUSED,
    FOREACH_CACHED,
    LOOP,
    MANAGER,
    OURS,
    UPDATE,
)
from report import AS_BUILT, machine

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- (\w+) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
CPU_COLUMNS = {  # case in the file → heading
    "GPT-2 small, float32←float32": "GPT-2 small,<br>124M float32",
    "GPT-2 small, float32←bfloat16": "the same, float32<br>average of bfloat16",
    "ResNet-50, float32←float32": "ResNet-50,<br>26M and buffers",
    "2000 tensors of 256, float32←float32": "2000 tensors<br>of 256",
    "2000 tensors of 256, float32←float32, called in a row": "the same,<br>in a row",
}

CUDA_COLUMNS = {
    "GPT-2 small, float32←float32": "GPT-2 small,<br>124M float32",
    "GPT-2 small, float32←bfloat16": "float32 average<br>of bfloat16",
    "GPT-2 small, bfloat16←bfloat16": "bfloat16<br>of bfloat16",
    "ResNet-50, float32←float32": "ResNet-50,<br>26M and buffers",
    "Llama 1.1B, float32←bfloat16": "Llama 1.1B, float32<br>average of bfloat16",
    "2000 tensors of 256, float32←float32": "2000 tensors<br>of 256",
}


def duration(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} µs" if us >= 10 else f"{us:.1f} µs"


def error(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def source(content: dict[str, Any], path: str) -> str:
    return f"`{content['env']['command']}`, {machine(content['env'])}, [all numbers]({path})"


def escaped(method: str) -> str:
    return method.replace("_", r"\_")  # Markdown would take them for emphasis


def models(content: dict[str, Any], path: str) -> list[str]:
    rows = {(row["case"], row["method"]): row for row in content["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in content["rows"]))
    cuda = content["env"]["device"] != "cpu"
    cases = CUDA_COLUMNS if cuda else CPU_COLUMNS
    first = next(iter(cases))
    lines = ["| time per update | " + " | ".join(cases.values()) + " | error |"]
    lines.append("| --- |" + " ---: |" * (len(cases) + 1))
    for method in methods:
        cells = []
        for case in cases:
            row = rows.get((case, method))
            ratio = f" ({row['ratio']:.2f})" if row and row["ratio"] else ""
            mark = "\\*" if row and waits(row["launches"]) else ""
            cells.append(mark + duration(row["device_us"]["median"]) + ratio if row else "")
        worst = error(rows[first, method]["max_err_over_bound"]) if (first, method) in rows else ""
        lines.append(f"| {escaped(method)} | " + " | ".join(cells) + f" | {worst} |")
    ceiling = {each["case"]: each["streams"] for each in content["ceiling"]}
    for stream in dict.fromkeys(name for streams in ceiling.values() for name in streams):
        found = [ceiling[case][stream]["us"]["median"] if case in ceiling else None for case in cases]
        lines.append(f"| ({stream}) | " + " | ".join(duration(us) if us else "" for us in found) + " | |")
    of = "medians of the device's own time" if cuda else "medians"
    rest = "`in a row` has five consecutive calls of each method on the same tensors instead."
    if cuda:
        rest = "\\* marks methods that wait for the device or launch more than its queue holds, so that their time "
        rest += "includes some of the host's."
    lines += [
        "",
        f"Times are {of}. The number in brackets is the ratio to the time of the bound handle: the median of the "
        "ratios within each round, in which both meet the same state of the machine. `error` is the largest error of "
        "one step in the first case, in units of [the promised bound](#numerics). All methods ran in one run, in "
        f"alternation, on alternating sets of tensors, so that none is in a cache. {rest} {source(content, path)}.",
    ]
    return lines


def foreach(content: dict[str, Any], path: str) -> list[str]:
    """For the runner that needs no compiler: how it compares with the loop, and with PyTorch's own operation."""
    ratios: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        ratios.setdefault(row["case"], {})[row["method"]] = row["ratio"]
    lines = [
        "| | compared with the tutorial loop | compared with `_foreach_lerp_` on cached lists |",
        "| --- | ---: | ---: |",
    ]
    for case, found in ratios.items():
        cells = [
            " / ".join(f"{found[other] / found[method]:.2f}" for method in (UPDATE, BOUND, MANAGER))
            if other in found
            else "raises"
            for other in (LOOP, FOREACH_CACHED)
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += [
        "",
        "How many times as fast `update` / a bound handle / `EMA` are: ratios of medians within one run, in which all "
        "methods alternate. The loop and `_foreach_lerp_` leave the buffers of ResNet-50 alone; `update` and the "
        f"handle copy them. {source(content, '../' + path)}.",
    ]
    return lines


def ema_model(content: dict[str, Any], path: str) -> list[str]:
    """For the drop-in for diffusers' EMAModel: its time, and theirs."""
    rows: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        rows.setdefault(row["case"], {})[row["method"]] = row
    lines = ["| time of a step | here | diffusers | diffusers, `foreach=True` |", "| --- | ---: | ---: | ---: |"]
    for case, found in rows.items():
        ours, cells = found[DIFFUSERS_FUSED], [duration(found[DIFFUSERS_FUSED]["device_us"]["median"])]
        for other in (found[DIFFUSERS], found[DIFFUSERS_FOREACH]):
            times = other["ratio"] / ours["ratio"]
            cells.append(f"{duration(other['device_us']['median'])} ({times:.1f})")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += [
        "",
        "Medians of `ema.step(model.parameters())`. All methods alternate in one run, on alternating sets of tensors, "
        "so that none is in a cache; `called in a row` has consecutive calls of each method on the same tensors. In "
        "brackets: how many times as long as here, a ratio of medians within that run. "
        f"{source(content, '../' + path)}.",
    ]
    return lines


def averages(content: dict[str, Any], path: str) -> list[str]:
    gains = {}
    for case in content["averages"]:
        if "averages of" in case["case"]:
            gains[case["case"]] = list(case["ratio"].values())[1]
    listed = "; ".join(f"{case}: {gain:.2f}" for case, gain in gains.items())
    return [
        f"Speed-up of one manager over a manager for each average: {listed} ({source(content, path)}).",
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
    words = f"{source(content, path)}. In these training loops, on this machine, fused_ema "
    words += f"saves at most {gain:.1%} of the step compared with the tutorial loop"
    found = content["scaling"]
    end, largest = found["break_even_bytes"].get(FOREACH_CACHED), max(each["bytes"] for each in found["by_size"])
    if end is not None and 0 < end <= largest:
        words += (
            f". For a float32 model of {found['tensors']} tensors and more than {end / 12 / 1e6:.1f}M parameters, the "
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
        "One step: the largest error compared with float64, in units of the promised bound. Moved: the share of "
        "averages that an update changes although they equal the model. Drift: the largest distance of such an "
        f"average from the model after {content['steps']:,} updates, in units in the last place. "
        f"{source(content, '../' + path)}.",
    ]
    return lines


def sweep(content: dict[str, Any], path: str) -> list[str]:
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
        f"`make gpu-sweep`, {machine(content['env'])}, [all variants]({Path(path).relative_to('benchmarks')}).",
    ]


WRITERS: dict[str, Callable[[dict[str, Any], str], list[str]]] = {
    "models": models,
    "foreach": foreach,
    "ema_model": ema_model,
    "averages": averages,
    "training": training,
    "errors": errors,
    "sweep": sweep,
}


def written(marked: re.Match[str]) -> str:
    content = json.loads((ROOT / marked[3]).read_text(encoding="utf-8"))
    return marked[1] + "\n".join(WRITERS[marked[2]](content, marked[3])) + "\n" + marked[4]


def main() -> int:
    stale = 0
    for page in (ROOT / "README.md", ROOT / "benchmarks" / "TUNING.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        after = MARKED.sub(written, before)
        if "--check" in sys.argv[1:]:
            stale += before != after
        else:
            page.write_text(after, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
