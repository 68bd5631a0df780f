"""Shows how averages in bfloat16 move: rounded to nearest they stay put, rounded stochastically they follow float32.

    python benchmarks/bench_rounding.py [--json FILE] [--plot FILE]

The model's weights jump by a tenth at step 0 and then stay constant. The plot shows how much of the jump is still
missing from the average, over 10,000 steps.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import environment
from torch import Tensor, nn

import fused_ema

DECAY, STEPS, ELEMENTS = 0.999, 10_000, 1 << 16
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, nearest": {"dtype": torch.bfloat16},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
}


def missing(ema: fused_ema.EMA, start: Tensor, end: Tensor) -> float:
    average = ema.averaged_state_dict()["weight"].double()
    return float(((end - average) * (end - start)).sum() / (end - start).square().sum())


def measure() -> dict[str, list[Any]]:
    torch.manual_seed(0)
    model = nn.Linear(ELEMENTS, 1, bias=False)
    nn.init.normal_(model.weight, std=0.02)
    start = model.weight.detach().double()
    averages = {name: fused_ema.EMA(model, decay=DECAY, **options) for name, options in KINDS.items()}
    with torch.no_grad():
        model.weight.mul_(1.1)
    end = model.weight.detach().double()
    curves: dict[str, list[Any]] = {"step": [0], **{name: [1.0] for name in averages}}
    for step in range(1, STEPS + 1):
        for ema in averages.values():
            ema.update()
        if step % 100 == 0:
            curves["step"].append(step)
            for name, ema in averages.items():
                curves[name].append(missing(ema, start, end))
    for name, ema in averages.items():
        print(f"{name:22} {curves[name][-1]:9.2e} of the jump still missing; {ema.distance()}")
    return curves


def plot(curves: dict[str, list[Any]], about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in zip(KINDS, ("-", "--", ":"), strict=True):
        axes.plot(curves["step"], curves[name], style, linewidth=2.5, label=name)
    axes.set_xlabel(f"updates, decay {DECAY}")
    axes.set_ylabel("share of the jump still missing")
    axes.set_title("A model's weights jump by a tenth: how the average follows")
    axes.grid(alpha=0.3)
    axes.legend(title="average kept in")
    figure.text(0.01, -0.04, f"PyTorch {about['torch']}, {about['cpu']}, {about['date']}", fontsize=8, color="gray")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # 16-bit averages are the point here
    about, curves = environment(torch.device("cpu")), measure()
    if arguments.json:
        content = {"machine": about, "decay": DECAY, "elements": ELEMENTS, "missing": curves}
        arguments.json.write_text(json.dumps(content) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(curves, about, arguments.plot)


if __name__ == "__main__":
    main()
