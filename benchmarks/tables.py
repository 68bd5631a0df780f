"""Makes the tables of docs/benchmarks.md and README from a result file of bench_update.py, for readme_table.py.

Each writer takes the file's content and a link to it from the page.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from measure import waits
from methods import BOUND, DIFFUSERS_FOREACH, EMA_PYTORCH_FOREACH, FOREACH_CACHED, GRAPHS, LOOP, MANAGER, OURS, UPDATE
from report import machine, short

GPT2, RESNET = "GPT-2 small, float32←float32", "ResNet-50, float32←float32"
MIXED, NARROW = "GPT-2 small, float32←bfloat16", "GPT-2 small, bfloat16←bfloat16"
LLAMA, MANY = "Llama 1.1B, float32←bfloat16", "2000 tensors of 256, float32←float32"
IN_A_ROW = f"{MANY}, called in a row"
HEADS = {
    GPT2: "GPT-2 small,<br>124M",
    RESNET: "ResNet-50, 26M<br>and buffers",
    MANY: "2000 tensors<br>of 256",
    IN_A_ROW: "the same,<br>in a row",
    MIXED: "GPT-2 small, float32<br>of bfloat16",
    NARROW: "GPT-2 small, bfloat16<br>of bfloat16",
    LLAMA: "Llama 1.1B, float32<br>of bfloat16",
}


def duration(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us >= 1e3 else f"{us:.0f} µs" if us >= 10 else f"{us:.1f} µs"


def times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"


def error(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def memory(size: float) -> str:
    return short(size) if size else "0"


def source(content: dict[str, Any], link: str) -> str:
    return f"`{content['env']['command']}`, {machine(content['env'])}, [all numbers]({link})"


def repeated(content: dict[str, Any], link: str, options: str) -> str:
    """How to measure a table again, in a run that has no more than its cases, and where its numbers come from."""
    settings = content["env"]["command"].partition("python ")[0]  # environment variables
    command = f"`{settings}python benchmarks/bench_update.py {options}`"
    return f"{command} measures this anew. {machine(content['env'])}, [all numbers]({link})."


def run(content: dict[str, Any], link: str) -> list[str]:
    """The run as a whole."""
    env = content["env"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    return [f"{source(content, link)}; Python {env['python']}, {packages}."]


def escaped(method: str) -> str:
    return method.replace("_", r"\_")  # Markdown would take them for emphasis


MISSING = {  # what a method raised → the word in place of its number
    "ModuleNotFoundError": "not installed",
    "ImportError": "not installed",
    "NotImplementedError": "not tried",
    "ArithmeticError": "inexact",
}


def why(left_out: str | None) -> str:
    return MISSING.get(left_out.partition(":")[0], "raises") if left_out else ""


class Rows:
    """A file's rows by case and method, and those of the wanted cases that it has."""

    def __init__(self, content: dict[str, Any], cases: tuple[str, ...]) -> None:
        self.found = {(row["case"], row["method"]): row for row in content["rows"]}
        self.cases = [case for case in cases if any(row["case"] == case for row in content["rows"])]
        named = dict.fromkeys(row["method"] for row in content["rows"])
        self.methods = [name for name in named if any((case, name) in self.found for case in self.cases)]
        self.left_out = content["left_out"]
        self.cuda = content["env"]["device"] != "cpu"

    def of(self, method: str) -> list[dict[str, Any] | None]:
        return [self.found.get((case, method)) for case in self.cases]

    def cells(self, method: str, show: Callable[[Any], str]) -> list[str]:
        each = zip(self.cases, self.of(method), strict=True)
        return [show(row) if row else why(self.left_out.get(case, {}).get(method)) for case, row in each]

    def head(self, first: str, *more: str) -> list[str]:
        cells = [first, *(HEADS[case] for case in self.cases), *more]
        return [f"| {' | '.join(cells)} |", f"| --- |{' ---: |' * (len(cells) - 1)}"]

    def repeated(self, content: dict[str, Any], link: str) -> str:
        names = dict.fromkeys(case.partition(",")[0] for case in self.cases)
        return repeated(content, link, f"--parts models --cases '{','.join(names)}'")


def line(method: str, cells: list[str]) -> str:
    name = f"**{escaped(method)}**" if method in OURS else escaped(method)
    return f"| {name} | {' | '.join(cells)} |"


# ---- Time


def spent(cases: tuple[str, ...], content: dict[str, Any], link: str) -> list[str]:
    """Times and their ratio to the bound handle's, the largest error, and the row of the plain bound."""
    rows = Rows(content, cases)
    lines = rows.head("time per update", "error")
    for method in rows.methods:
        worst = max(row["max_err_over_bound"] for row in rows.of(method) if row)
        lines.append(line(method, [*rows.cells(method, measured), error(worst)]))
    streams = {each["case"]: each["streams"] for each in content["ceiling"]}
    for stream in dict.fromkeys(name for case in rows.cases for name in streams.get(case, ())):
        cells = [duration(streams[case][stream]["us"]["median"]) for case in rows.cases]
        lines.append(line(f"({stream})", [*cells, ""]))
    return [*lines, "", rows.repeated(content, link)]


def measured(row: dict[str, Any]) -> str:
    mark = "\\*" if waits(row["launches"]) else ""
    return f"{mark}{duration(row['device_us']['median'])} ({times(row['ratio'])})"


# ---- Memory, launches, and the host


def extra(content: dict[str, Any], link: str) -> list[str]:
    """The memory that an update needs beyond the averages and the model, at its peak."""
    rows = Rows(content, (GPT2, RESNET, MIXED, LLAMA))
    lines = rows.head("extra memory")
    for method in rows.methods:
        if method not in GRAPHS:
            lines.append(line(method, rows.cells(method, lambda row: memory(row["peak_extra_bytes"]))))
    return [*lines, "", rows.repeated(content, link)]


def launches(content: dict[str, Any], link: str) -> list[str]:
    rows = Rows(content, (GPT2, RESNET, MIXED, LLAMA))
    lines = rows.head("kernels")
    for method in rows.methods:
        lines.append(line(method, rows.cells(method, counts)))
    return [*lines, "", rows.repeated(content, link)]


def counts(row: dict[str, Any]) -> str:
    found = row["launches"]
    if found is None:
        return "?"  # the profiler counted nothing
    words = {"copies": ("copy", "copies"), "syncs": ("wait", "waits")}
    more = [f"{found[kind]} {words[kind][found[kind] > 1]}" for kind in words if found[kind]]
    return " + ".join([str(found["kernels"]), *more])


def host(content: dict[str, Any], link: str) -> list[str]:
    """The device's time beside the host's, and how the bound handle's compares with cached lists."""
    rows = Rows(content, (GPT2, RESNET, MANY))
    lines = rows.head("device / host" if rows.cuda else "whole / host")
    for method in rows.methods:
        if any(row and row["host_us"] for row in rows.of(method)):
            lines.append(line(method, rows.cells(method, beside)))
    ours, theirs = (rows.found[RESNET, method]["host_us"]["median"] for method in (BOUND, FOREACH_CACHED))
    words = f"On ResNet-50, the host spends {duration(ours)} on a bound handle's update, which covers the buffers too, "
    words += f"and {duration(theirs)} on `_foreach_lerp_` on cached lists."
    return [*lines, "", f"{words} {rows.repeated(content, link)}"]


def beside(row: dict[str, Any]) -> str:
    return " / ".join(duration(us["median"]) if us else "?" for us in (row["device_us"], row["host_us"]))


# ---- Training, several averages, and without a compiler


def training(content: dict[str, Any], link: str) -> list[str]:
    cases = content["training"]
    methods = [name for name in cases[0]["share_of_step"] if name not in OURS or name == MANAGER]
    lines = ["| share of a training step | " + " | ".join(case["case"] for case in cases) + " |"]
    lines.append("| --- |" + " ---: |" * len(cases))
    for name in methods:
        lines.append(line(name, [f"{case['share_of_step'][name]:.1%}" for case in cases]))
    gain = max(case["share_of_step"][LOOP] - case["share_of_step"][MANAGER] for case in cases)
    words = "In these training loops, on this machine, fused_ema "
    words += f"saves at most {gain:.1%} of the step compared with the tutorial loop"
    found = content["scaling"]
    end, largest = found["break_even_bytes"].get(FOREACH_CACHED), max(each["bytes"] for each in found["by_size"])
    if end is not None and 0 < end <= largest:
        words += f". For a float32 model of {found['tensors']} tensors and more than {end / 12 / 1e6:.1f}M parameters, "
        words += "the gain over `torch._foreach_lerp_` on lists that you keep yourself is under a tenth"
    return [*lines, "", f"{words}. {repeated(content, link, '--parts training,scaling')}"]


def averages(content: dict[str, Any], link: str) -> list[str]:
    lines = ["| | times as fast as a manager for each |", "| --- | ---: |"]
    for case in content["averages"]:
        if "averages of" in case["case"]:
            together, apart = (us["median"] for us in case["us"].values())
            gain = [*case["ratio"].values()][1] if "ratio" in case else apart / together  # older files have no ratio
            lines.append(f"| {case['case']} | {gain:.2f} |")
    return [*lines, "", repeated(content, link, "--parts averages")]


def foreach(content: dict[str, Any], link: str) -> list[str]:
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
        f"handle copy them. {source(content, link)}.",
    ]
    return lines


# ---- README, and the plots


def front(content: dict[str, Any], link: str) -> list[str]:
    """Four rows of one case: what people write, two packages, and this one."""
    rows = Rows(content, (LLAMA,))
    lines = ["| one update of Llama 1.1B | time | kernels | extra memory |", "| --- | ---: | ---: | ---: |"]
    names = {
        LOOP: "tutorial loop: `mul_`, `add_`",
        DIFFUSERS_FOREACH: "diffusers `EMAModel`, foreach",
        EMA_PYTORCH_FOREACH: "ema-pytorch `EMA`, foreach",
        MANAGER: "**fused_ema `EMA`**",
    }
    for method, name in names.items():
        row = rows.found[LLAMA, method]
        cells = [duration(row["device_us"]["median"]), str(row["launches"]["kernels"]), memory(row["peak_extra_bytes"])]
        lines.append(f"| {name} | " + " | ".join(f"**{cell}**" if method in OURS else cell for cell in cells) + " |")
    return [
        *lines,
        "",
        "A float32 average of bfloat16 weights; medians of the GPU's own time. "
        + repeated(content, link, "--parts models --cases 'Llama 1.1B'"),
    ]


LARGE = 300_000_000  # bytes that an update moves, from which on the fixed costs hardly count


def share(content: dict[str, Any], link: str) -> list[str]:
    """The plot, and the range of our shares for large updates."""
    lines = picture("share", content, link)
    if content.get("scaling"):
        found = [(each["bytes"], each.get("share_of_ceiling", {}).get(BOUND)) for each in content["scaling"]["by_size"]]
    else:
        found = [(row["bytes"], row["share_of_ceiling"]) for row in content["rows"] if row["method"] == BOUND]
    shares = [each for size, each in found if size >= LARGE and each]
    if lines and shares:
        words = f"Where an update moves {short(LARGE)} or more, a bound handle runs at {min(shares):.1%} to "
        lines += ["", f"{words}{max(shares):.1%} of the plain stream's speed. {machine(content['env'])}."]
    return lines


ALT = {
    "share": "Speed of an update relative to a plain stream over the same memory, against the size of the model",
    "ratios": "Time of each method's update relative to fused_ema's, for each model",
    "count": "Time of an update against the number of tensors",
    "steps": "Share of a training step that each method's update takes",
}


def picture(plot: str, content: dict[str, Any], link: str) -> list[str]:
    """The plot as plot.py names it, for a light and a dark page; nothing if the file has no numbers for it."""
    if not drawable(plot, content):
        return []
    stem = posixpath.join(posixpath.dirname(link), f"{PurePosixPath(link).stem}-{plot}")
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.png">',
        f'  <img alt="{ALT[plot]}" src="{stem}.png">',
        "</picture>",
    ]


def drawable(plot: str, content: dict[str, Any]) -> bool:
    if plot == "ratios":
        return bool(content["rows"])
    if plot == "steps":
        return bool(content.get("training"))
    if plot == "count":
        return bool(content.get("scaling"))
    if content["env"]["device"] != "cpu" and not content.get("scaling"):
        return any(row["share_of_ceiling"] for row in content["rows"])
    return all(point.get("share_of_ceiling") for point in content.get("scaling", {}).get("by_size", [{}]))


WRITERS = {
    "run": run,
    "equal": partial(spent, (GPT2, RESNET, MANY, IN_A_ROW)),
    "wider": partial(spent, (MIXED, NARROW, LLAMA)),
    "extra": extra,
    "launches": launches,
    "host": host,
    "training": training,
    "averages": averages,
    "foreach": foreach,
    "front": front,
    **{plot: partial(picture, plot) for plot in ALT},
    "share": share,
}
