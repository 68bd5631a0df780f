"""Draws the plots of a result file of bench_update.py as PNG, for light and for dark pages.

python benchmarks/plot.py [RESULTS.json ...] [--out FOLDER]

Without a file it draws those of docs/benchmarks.md and README again. The plots are `share`: the speed relative to a
plain stream, against the size; `ratios`: the time of each method relative to fused_ema's, per model; `count`: the time
against the number of tensors; `steps`: the share of a training step.
"""

from __future__ import annotations

import argparse
import io
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
    EMA_PYTORCH_FOREACH,
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from PIL import Image
from report import machine, short
from tables import ALT, drawable, times, why

RESULTS = Path(__file__).resolve().parent / "results"
OF_THE_PAGES = ("h200-torch2.11.0.json", "cpu-2core-torch2.13.0.json")
SHORT = {  # for axes
    LOOP: "tutorial loop",
    FOREACH_CACHED: "foreach lerp, cached lists",  # a legend omits labels that begin with _
    FOREACH: "foreach lerp, fresh lists",
    AVERAGED: "AveragedModel",
    TIMM: "timm",
    EMA_PYTORCH: "ema-pytorch",
    EMA_PYTORCH_FOREACH: "ema-pytorch, foreach",
    TORCH_EMA: "torch_ema",
    DIFFUSERS: "diffusers",
    DIFFUSERS_FOREACH: "diffusers, foreach",
    LIGHTNING: "Lightning",
    UPDATE: "fused_ema.update",
    BOUND: "fused_ema",
    MANAGER: "fused_ema.EMA",
    COMPILED: "torch.compile of the loop",
    APEX: "apex axpby",
    FOREACH_GRAPH: "foreach lerp, CUDA graph",
    BOUND_GRAPH: "fused_ema, CUDA graph",
}
# Method → colour on a light and on a dark page, and the marker; the order is that of the legend.
LINES = {
    BOUND: ("#cf222e", "#ff7b72", "o"),
    FOREACH_CACHED: ("#0969da", "#58a6ff", "s"),
    TIMM: ("#8250df", "#d2a8ff", "D"),
    AVERAGED: ("#bf8700", "#e3b341", "^"),
    EMA_PYTORCH_FOREACH: ("#1a7f37", "#56d364", "v"),
    EMA_PYTORCH: ("#1a7f37", "#56d364", "v"),
    DIFFUSERS_FOREACH: ("#0e8a8a", "#39c5cf", "P"),
    TORCH_EMA: ("#bf3989", "#f778ba", "X"),
    LOOP: ("#57606a", "#8b949e", "*"),
}
# Page, text, weak lines, the others' bars: those of GitHub's pages. A page with a switch of its own may show the other
# picture, which is still readable, because its background is not transparent.
THEMES = {
    "": ("#ffffff", "#1f2328", "#d1d9e0", "#8a9bb0"),
    "-dark": ("#0d1117", "#e6edf3", "#30363d", "#586679"),
}
WIDTH = 8.3  # inches, which GitHub shows as 830 pixels: then 9 points are 12.5 pixels
COLORS = 64  # of a picture
DOTS = 200  # per inch, for screens with two dots per pixel
WIDE = 100  # ratios beyond this are shown on a logarithmic scale


class Style:
    """The colours of a theme."""

    def __init__(self, suffix: str) -> None:
        self.page, self.text, self.weak, self.theirs = THEMES[suffix]
        self.number = [*THEMES].index(suffix)
        self.ours = LINES[BOUND][self.number]

    def bar(self, method: str) -> str:
        return self.ours if method in OURS else self.theirs

    def line(self, method: str) -> dict[str, Any]:
        ours = method in OURS
        return {
            "color": LINES[method][self.number],
            "marker": LINES[method][2],
            "label": SHORT[method],
            "linewidth": 2.6 if ours else 1.5,
            "markersize": 7 if ours else 5.5,
            "zorder": 4 if ours else 3,
        }

    def parameters(self) -> dict[str, Any]:
        texts = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
        lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
        pages = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        return {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(texts, self.text),
            **dict.fromkeys(lines, self.weak),
            **dict.fromkeys(pages, self.page),
        }


def caption(figure: Figure, env: dict[str, Any], what: str) -> None:
    figure.supxlabel(f"{what}\n{machine(env)}", fontsize=8, x=0.01, ha="left", linespacing=1.4)


def legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, columnspacing=1.4, handlelength=1.6)


def size(value: float, _: int | None = None) -> str:
    return short(value)


# ---- The plots


def share(content: dict[str, Any], style: Style) -> Figure:
    """Against the bytes of equal tensors; from a file without these, against those of the models, by their types."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.1), layout="constrained")
    if content.get("scaling"):
        points = content["scaling"]["by_size"]
        groups = [[(point["bytes"], point["share_of_ceiling"]) for point in points]]
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([point["bytes"] for point in points])
        axes.set_xlabel(f"bytes that an update moves; {content['scaling']['tensors']} tensors of float32")
        streams = dict.fromkeys(name for point in points for name in point["streams"])
    else:
        groups, labels = by_types(content)
        axes.set_xticks([place for group in groups for place, _ in group], labels)
        axes.set_xlabel("model, types of average and weights, and the bytes that an update moves")
        streams = dict.fromkeys(name for each in content["ceiling"] for name in each["streams"])
    known = {method for group in groups for _, shares in group for method in shares}
    for method in LINES:
        if method in known and not (method == EMA_PYTORCH and EMA_PYTORCH_FOREACH in known):
            drawn = style.line(method)
            for group in groups:
                places = [place for place, _ in group]
                axes.plot(places, [shares.get(method, float("nan")) for _, shares in group], **drawn)
                drawn["label"] = None  # the legend names it once
    axes.axhline(1, color=style.text, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of the stream's speed")
    axes.grid(axis="y")
    legend(figure, 4)
    caption(figure, content["env"], f"Dashed: {' or '.join(streams)} over as many bytes. No mark: the method raises.")
    return figure


def by_types(content: dict[str, Any]) -> tuple[list[list[tuple[float, dict[str, float]]]], list[str]]:
    """For each pair of types, the places of its models on an axis and their shares by method; and all labels."""
    shares: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        shares.setdefault(row["case"], {})[row["method"]] = row["share_of_ceiling"]
    sizes = {each["case"]: each["bytes"] for each in content["ceiling"]}
    groups, labels, place = [], [], 0.0
    for types in dict.fromkeys(case.split(", ")[1] for case in shares):
        group = []
        for case in sorted((case for case in shares if types in case), key=sizes.__getitem__):
            labels.append(f"{case.partition(', ')[0]}\n{types}\n{short(sizes[case])}")
            group.append((place, shares[case]))
            place += 1
        groups.append(group)
    return groups, labels


def ratios(content: dict[str, Any], style: Style) -> Figure:
    rows = {(row["case"], row["method"]): row["ratio"] for row in content["rows"]}
    cases = list(dict.fromkeys(case for case, _ in rows))
    left_out = {case: content["left_out"][case] for case in cases}
    known = {method for _, method in rows}.union(*left_out.values())
    methods = [name for name in SHORT if name in known and name not in (UPDATE, MANAGER)]
    high = (len(cases) + 2) // 3
    figure, panels = pyplot.subplots(
        high,
        3,
        figsize=(WIDTH, (0.18 * len(methods) + 0.5) * high + 0.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, case in zip(panels.flat, cases, strict=False):
        values = [rows.get((case, name)) for name in methods]
        bars = [value or 0.0 for value in values]
        axes.barh(range(len(methods)), bars, color=[style.bar(name) for name in methods])
        highest = max(bars, default=0.0) or 1.0
        for at, value in enumerate(values):
            text = times(value) if value else why(left_out[case].get(methods[at]))
            position = (value or 0.7) * 1.1 if highest > WIDE else (value or 0) + highest * 0.02
            axes.text(position, at, text, va="center", fontsize=8)
        axes.set_yticks(range(len(methods)), [SHORT[name] for name in methods])
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        if highest > WIDE:
            axes.set_xscale("log")
            axes.set_xlim(0.7, highest * 10)
            axes.set_xticks([])
            axes.minorticks_off()
        else:
            axes.set_xlim(0, highest * 1.25)
        title = case.replace(", float32←float32", "").replace(", ", ",\n", 1)
        axes.set_title(f"{title}{' (logarithmic)' if highest > WIDE else ''}", loc="left")
    panels.flat[0].invert_yaxis()
    for axes in panels.flat[len(cases) :]:
        axes.set_visible(False)
    caption(
        figure,
        content["env"],
        "Time of an update relative to fused_ema's bound handle, float32 unless stated; packages with their defaults",
    )
    return figure


def count(content: dict[str, Any], style: Style) -> Figure:
    points, fits = content["scaling"]["by_count"], content["scaling"]["fits"]
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for name in LINES:
        if name in fits:
            values = [point["us"][name]["median"] for point in points]
            axes.loglog([point["tensors"] for point in points], values, **style.line(name))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.set_xticks([point["tensors"] for point in points])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us / 1e3:g} ms" if us >= 1e3 else f"{us:g} µs"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"tensors, of {short(points[0]['bytes'])} to move in total")
    axes.set_ylabel("time of an update")
    axes.grid(axis="y")
    legend(figure, 4)
    caption(figure, content["env"], "Time of an update of as many bytes in more and more tensors")
    return figure


def steps(content: dict[str, Any], style: Style) -> Figure:
    cases = content["training"]
    methods = [name for name in SHORT if name in cases[0]["share_of_step"] and name != UPDATE]
    figure, panels = pyplot.subplots(
        1, len(cases), figsize=(WIDTH, 0.2 * len(methods) + 1.2), sharey=True, layout="constrained", squeeze=False
    )
    axes: Axes
    for axes, case in zip(panels.flat, cases, strict=True):
        shares = [case["share_of_step"][name] for name in methods]
        axes.barh(range(len(methods)), shares, color=[style.bar(name) for name in methods])
        for at, each in enumerate(shares):
            axes.text(each + max(shares) * 0.02, at, f"{each:.1%}", va="center", fontsize=8)
        axes.set_yticks(range(len(methods)), [SHORT[name] for name in methods])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(shares) * 1.18)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        step = case["step_us"]["median"] / 1e3
        axes.set_title(f"{case['case']}\n{case['elements'] / 1e6:.1f}M parameters, {step:.0f} ms a step", loc="left")
    panels.flat[0].invert_yaxis()
    what = "Share of a training step (forward, backward, AdamW, average) that the average takes"
    caption(figure, content["env"], what)
    return figure


PLOTS = {"share": share, "ratios": ratios, "count": count, "steps": steps}
assert PLOTS.keys() == ALT.keys()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS / name for name in OF_THE_PAGES])
    parser.add_argument("--out", type=Path, help="default: next to the results")
    arguments = parser.parse_args()
    for results in arguments.results:
        content = json.loads(results.read_text(encoding="utf-8"))
        folder = arguments.out or results.parent
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            for suffix in THEMES if drawable(name, content) else ():
                style, file = Style(suffix), folder / f"{results.stem}-{name}{suffix}.png"
                with pyplot.rc_context(style.parameters()):
                    figure = draw(content, style)
                    drawn = io.BytesIO()
                    figure.savefig(drawn, dpi=DOTS)
                    pyplot.close(figure)
                Image.open(drawn).convert("RGB").quantize(COLORS).save(file, optimize=True)  # a third of the bytes
                print(file)


if __name__ == "__main__":
    main()
