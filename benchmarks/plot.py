"""Draws the plots of a result file of bench_update.py, as PNG and SVG.

python benchmarks/plot.py RESULTS.json [--out FOLDER]

The plots are `ratios`: the time of each method relative to fused_ema's, per model; `ceiling`: how close each comes to a
plain loop over the same memory; `scaling`: the cost against the number of tensors and their bytes; `training`: the
share of a training step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from methods import (
    APEX,
    AVERAGED,
    BOUND,
    BOUND_GRAPH,
    COMPILED,
    DIFFUSERS,
    DIFFUSERS_FOREACH,
    EMA_PYTORCH,
    FOREACH,
    FOREACH_CACHED,
    FOREACH_GRAPH,
    LIGHTNING,
    LOOP,
    MANAGER,
    OURS,
    TIMM,
    TORCH_EMA,
    UPDATE,
)

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from report import machine

SHORT = {  # for axes
    LOOP: "tutorial loop",
    FOREACH_CACHED: "foreach lerp, cached lists",  # a legend omits labels that begin with _
    FOREACH: "foreach lerp, fresh lists",
    AVERAGED: "AveragedModel",
    TIMM: "timm",
    EMA_PYTORCH: "ema-pytorch",
    TORCH_EMA: "torch_ema",
    DIFFUSERS: "diffusers",
    DIFFUSERS_FOREACH: "diffusers, foreach",
    LIGHTNING: "Lightning",
    UPDATE: "fused_ema.update",
    BOUND: "fused_ema.bind",
    MANAGER: "fused_ema.EMA",
    COMPILED: "torch.compile of the loop",
    APEX: "apex axpby",
    FOREACH_GRAPH: "foreach lerp, CUDA graph",
    BOUND_GRAPH: "fused_ema, CUDA graph",
}
MISSING = {  # what a method raised → the text in place of its bar
    "ModuleNotFoundError": "not installed",
    "ImportError": "not installed",
    "NotImplementedError": "not tried",
    "ArithmeticError": "inexact",
}
PALETTE = [
    pyplot.colormaps["tab20"].colors[i] for i in (0, 2, 3, 4, 8, 10, 12, 14, 16, 18, 5, 9, 1, 11, 13, 15, 17)
]  # without red, which is ours
COLORS = dict(zip(SHORT, PALETTE, strict=True))
OUR_COLOR, THEIR_COLOR = "#c1272d", "#8a9bb0"
WIDTH = 8.3  # inches; at README's width, 8 points match the surrounding text
WIDE = 100  # ratios beyond this are shown on a logarithmic scale
pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})


def times(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def caption(figure: Figure, env: dict[str, Any], what: str) -> None:
    figure.supxlabel(f"{what}\n{machine(env)}", fontsize=7, color="dimgray", x=0.01, ha="left")


def ratios(content: dict[str, Any]) -> Figure:
    rows = {(row["case"], row["method"]): row["ratio"] for row in content["rows"]}
    cases = list(dict.fromkeys(case for case, _ in rows))
    left_out = {case: content["left_out"][case] for case in cases}
    known = {method for _, method in rows}.union(*left_out.values())
    methods = [name for name in SHORT if name in known and name not in (UPDATE, MANAGER)]
    high = (len(cases) + 2) // 3
    figure, panels = pyplot.subplots(high, 3, figsize=(WIDTH, 2.0 * high + 0.5), sharey=True, layout="constrained")
    for axes, case in zip(panels.flat, cases, strict=False):
        values = [rows.get((case, name)) for name in methods]
        bars = [value or 0.0 for value in values]
        axes.barh(range(len(methods)), bars, color=[OUR_COLOR if name in OURS else THEIR_COLOR for name in methods])
        highest = max(bars, default=0.0) or 1.0
        for at, value in enumerate(values):
            why = left_out[case].get(methods[at], "")
            text = times(value) if value else MISSING.get(why.partition(":")[0], "raises") if why else ""
            position = (value or 0.7) * 1.1 if highest > WIDE else (value or 0) + highest * 0.02
            axes.text(position, at, text, va="center", fontsize=7)
        axes.set_yticks(range(len(methods)), [SHORT[name] for name in methods])
        if highest > WIDE:
            axes.set_xscale("log")
            axes.set_xlim(0.7, highest * 8)
        else:
            axes.set_xlim(0, highest * 1.18)
        axes.set_title(case.replace(", float32←float32", "").replace(", called", ",\ncalled"), fontsize=8)
    panels.flat[0].invert_yaxis()
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    caption(
        figure,
        content["env"],
        "Time of an update relative to fused_ema's bound handle (float32 unless stated; "
        "packages with their defaults, so timm rounds bfloat16 stochastically)",
    )
    return figure


def ceiling(content: dict[str, Any]) -> Figure:
    rows = {(row["case"], row["method"]): row["share_of_ceiling"] for row in content["rows"]}
    cases = list(dict.fromkeys(case for case, _ in rows))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.32 * len(cases) + 1.4), layout="constrained")
    for name, marker in zip((BOUND, FOREACH_CACHED, AVERAGED, TIMM, TORCH_EMA, DIFFUSERS), "osD^vP", strict=True):
        there = [(i, rows[case, name]) for i, case in enumerate(cases) if rows.get((case, name))]
        if not there:
            continue
        color, size = (OUR_COLOR, 60) if name in OURS else (COLORS[name], 25)
        axes.scatter(
            *zip(*((share, i) for i, share in there), strict=True),
            size,
            [color],
            marker=marker,
            label=SHORT[name],
            zorder=3,
        )
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    streams = dict.fromkeys(name for each in content["ceiling"] for name in each["streams"])
    axes.set_xlabel(f"speed relative to the {' or '.join(streams)} over as much memory, which checks nothing")
    axes.grid(axis="both", alpha=0.25)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, handletextpad=0.1, columnspacing=1.2)
    caption(figure, content["env"], "How close an update comes to what the memory allows")
    return figure


def scaling(content: dict[str, Any]) -> Figure:
    found = content["scaling"]
    figure, panels = pyplot.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True, layout="constrained")
    moved = found["by_count"][0]["bytes"] / 1e6
    for axes, points, key, label in (
        (panels[0], found["by_count"], "tensors", f"tensors, {moved:.0f} MB moved in total"),
        (panels[1], found["by_size"], "bytes", f"bytes moved, {found['tensors']} tensors"),
    ):
        for name in found["fits"]:
            if name in (UPDATE, MANAGER):
                continue
            values = [point["us"][name]["median"] for point in points]
            style = {"color": OUR_COLOR, "linewidth": 2.6, "zorder": 4} if name in OURS else {"color": COLORS.get(name)}
            axes.loglog(
                [point[key] for point in points], values, "o-", markersize=3, label=SHORT.get(name, name), **style
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    for axis in (panels[0].yaxis, panels[1].yaxis):
        axis.set_major_formatter(FuncFormatter(lambda us, _: f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs"))
        axis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("time of an update")
    panels[1].xaxis.set_major_formatter(
        FuncFormatter(lambda b, _: f"{b / 1e9:g} GB" if b >= 1e9 else f"{b / 1e6:g} MB")
    )
    panels[0].legend(fontsize=7, frameon=False)
    caption(figure, content["env"], "Cost against the number of tensors (left) and against their size (right)")
    return figure


def training(content: dict[str, Any]) -> Figure:
    cases = content["training"]
    figure, panels = pyplot.subplots(
        1, len(cases), figsize=(WIDTH, 2.9), sharey=True, layout="constrained", squeeze=False
    )
    for axes, case in zip(panels.flat, cases, strict=True):
        methods = [name for name in SHORT if name in case["share_of_step"] and name != UPDATE]
        shares = [case["share_of_step"][name] for name in methods]
        axes.barh(range(len(methods)), shares, color=[OUR_COLOR if name in OURS else THEIR_COLOR for name in methods])
        for at, share in enumerate(shares):
            axes.text(share + max(shares) * 0.02, at, f"{share:.1%}", va="center", fontsize=7)
        axes.set_yticks(range(len(methods)), [SHORT[name] for name in methods])
        axes.set_xlim(0, max(shares) * 1.18)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        step = case["step_us"]["median"] / 1e3
        axes.set_title(f"{case['case']}\n{case['elements'] / 1e6:.1f}M parameters, {step:.0f} ms a step", fontsize=8)
    panels.flat[0].invert_yaxis()
    caption(
        figure,
        content["env"],
        "Share of a training step (forward, backward, AdamW, average) that the average takes",
    )
    return figure


PLOTS = {"rows": ratios, "ceiling": ceiling, "scaling": scaling, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="default: next to the results")
    arguments = parser.parse_args()
    content = json.loads(arguments.results.read_text(encoding="utf-8"))
    folder = arguments.out or arguments.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    for part, draw in PLOTS.items():
        if content.get(part) and (part != "ceiling" or any(row["share_of_ceiling"] for row in content["rows"])):
            name = f"{arguments.results.stem}-{draw.__name__}"
            figure = draw(content)
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=130, metadata=metadata)
            print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
