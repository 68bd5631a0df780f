"""Trains a small network on handwritten digits with averaged weights, and times the update.

    python examples/demo.py [--runs N] [--out demo.pt] [--device cuda]

The digits ship with scikit-learn: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import fused_ema

DECAY = 0.99  # an average over about the last 100 steps
STEPS = 800
BATCH = 16
TRAINING_IMAGES = 900  # of 1797; the rest are held out
WRONG_LABELS = 0.1  # share of the training images

console = Console(highlight=False, markup=False)


def network() -> nn.Module:
    def block(channels: int, features: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, features, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(features), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Digits:
    """8x8 images, split at random. Some of the training labels are random, as in hastily labelled data; the labels of
    the held-out images are all correct."""

    def __init__(self, seed: int, device: torch.device) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16
        labels = torch.tensor(digits.target, device=device)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator).to(device)
        train, held_out = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
        self.images, self.labels = images[train], labels[train]
        self.held_out_images, self.held_out_labels = images[held_out], labels[held_out]
        wrong = (torch.rand(TRAINING_IMAGES, generator=generator) < WRONG_LABELS).to(device)
        random = torch.randint(10, (TRAINING_IMAGES,), generator=generator).to(device)
        self.labels = torch.where(wrong, random, self.labels)


def train(digits: Digits, seed: int, on_step: Callable[[], None]) -> tuple[nn.Module, nn.Module]:
    """The network after the last step of SGD at a constant learning rate, and the average of its weights."""
    torch.manual_seed(seed)
    model = network().to(digits.images.device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        batch = torch.randint(len(digits.labels), (BATCH,)).to(digits.labels.device)
        F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        # BatchNorm's running statistics belong to the weights they were measured with. With weights as noisy as these,
        # the latest statistics ("copy", the default) fit the averaged weights badly; averaged statistics fit well.
        fused_ema.update(ema, model, DECAY, buffers="average")
        on_step()
    return model, ema


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Accuracy on the held-out images, in percent."""
    correct = model.eval()(digits.held_out_images).argmax(1) == digits.held_out_labels
    return 100 * correct.sum().item() / len(correct)


def remeasured(model: nn.Module, digits: Digits) -> nn.Module:
    """A copy whose BatchNorm statistics are measured on all training images."""
    model = copy.deepcopy(model)
    update_bn([digits.images], model)
    return model


def show_accuracies(results: dict[str, list[float]]) -> bool:
    """Prints the accuracies, and returns whether averaged weights beat raw ones on average over the runs."""
    runs = len(results["raw"])
    title = f"Accuracy on {1797 - TRAINING_IMAGES} held-out digits after {STEPS} steps, {runs} runs"
    table = Table("weights", title=title, caption="the lowest and highest of the runs are in brackets")
    table.add_column("as training left them", justify="right")
    table.add_column("BatchNorm measured again", justify="right")

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}% ({min(values):.1f} to {max(values):.1f})"

    for weights in ("raw", "averaged"):
        table.add_row(weights, cell(results[weights]), cell(results[f"{weights}, remeasured"]))
    console.print(table)
    gains = [ours - raw for ours, raw in zip(results["averaged"], results["raw"], strict=True)]
    wins = sum(gain > 0 for gain in gains)
    console.print(f"Averaged weights beat the raw ones in {wins} of {runs} runs.\n")
    return statistics.mean(gains) > 0


def gpt2() -> nn.Module:
    """The 148 parameter tensors of GPT-2 small, 124M elements, without values."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(768, 12, 3072)
        blocks = nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)
        return nn.ModuleList([nn.Embedding(50257, 768), nn.Embedding(1024, 768), blocks])


def loop(ema: nn.Module, model: nn.Module) -> None:
    """The loop that people write today."""
    with torch.no_grad():
        averages = dict(ema.named_parameters())
        for name, parameter in model.named_parameters():
            averages[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)


def foreach(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - DECAY)


def fused(ema: nn.Module, model: nn.Module) -> None:
    fused_ema.update(ema, model, DECAY)


METHODS = {"loop, mul_ and add_": loop, "torch._foreach_lerp_": foreach, "fused_ema.update": fused}


def times(ema: nn.Module, model: nn.Module, seconds: float) -> list[list[float]]:
    """Seconds per update by each method. The methods alternate, so that other load on the machine affects all alike."""

    def wait() -> None:
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()

    found: list[list[float]] = [[] for _ in METHODS]
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end or len(found[0]) < 6:
        for method, collected in zip(METHODS.values(), found, strict=True):
            wait()
            start = time.perf_counter()
            method(ema, model)
            wait()
            collected.append(time.perf_counter() - start)
    gc.enable()
    return [collected[1:] for collected in found]  # the first is a warm-up


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def show_costs(small: nn.Module, device: torch.device) -> None:
    large = gpt2().to_empty(device=device)
    for parameter in large.parameters():
        nn.init.normal_(parameter, std=0.02)
    pairs = [(copy.deepcopy(small).requires_grad_(False), small), (copy.deepcopy(large).requires_grad_(False), large)]
    console.print("Timing the update, about 10 seconds ...")  # no progress bar, which would use a core
    timed = [times(*pair, seconds) for pair, seconds in zip(pairs, (2, 6), strict=True)]
    columns = [[statistics.median(values) for values in methods] for methods in timed]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    table = Table("method", title=f"Time per update on {device.type}{threads}")
    for name, (_, model) in zip(("this network", "GPT-2 small"), pairs, strict=True):
        elements = sum(parameter.numel() for parameter in model.parameters())
        size = f"{elements / 1e6:.0f}M" if elements > 1e6 else f"{elements / 1e3:.0f}K"
        table.add_column(f"{name}\n{len(list(model.parameters()))} tensors, {size}", justify="right")
    for row, name in enumerate(METHODS):
        table.add_row(name, *(f"{duration(column[row])} {column[row] / column[-1]:6.2f}x" for column in columns))
    table.caption = "x: relative to fused_ema.update, which also copies BatchNorm's buffers"
    console.print(table)
    cuts = [statistics.quantiles(values, n=5) for methods in timed for values in methods]
    if any(p80 > 2 * p20 for p20, *_, p80 in cuts):
        console.print("These times vary widely, because something else was running. Run it again on a quiet machine.")


def save_and_load(path: Path, model: nn.Module, ema: nn.Module, digits: Digits) -> None:
    torch.save({"model": model.state_dict(), "ema_model": ema.state_dict()}, path)
    checkpoint = torch.load(path, weights_only=True, map_location=digits.images.device)
    for name, saved in (("model", model), ("ema_model", ema)):
        loaded = network().to(digits.images.device)
        loaded.load_state_dict(checkpoint[name])
        before, after = accuracy(saved, digits), accuracy(loaded, digits)
        if before != after:
            raise RuntimeError(f"{path}: {name} had {before}% before saving and {after}% after loading")
        console.print(f"{path}: {name!r}, loaded into a new network, again has {after:.1f}%")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="training runs, with seeds 0, 1, ... (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("demo.pt"), help="the checkpoint (default: demo.pt)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    names = ("raw", "averaged", "raw, remeasured", "averaged, remeasured")
    results: dict[str, list[float]] = {name: [] for name in names}
    bar = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in a network this small, threads would mostly wait for each other
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("training", total=arguments.runs * STEPS)
        for seed in range(arguments.runs):
            digits = Digits(seed, device)
            model, ema = train(digits, seed, lambda: progress.advance(task))
            networks = (model, ema, remeasured(model, digits), remeasured(ema, digits))
            for name, trained in zip(names, networks, strict=True):
                results[name].append(accuracy(trained, digits))
    better = show_accuracies(results)

    torch.set_num_threads(threads)
    show_costs(model, device)
    backend = fused_ema.backend(device)
    console.print(f"fused_ema used its backend {backend!r}.")
    if backend == "torch":
        console.print("`python -m fused_ema` says whether a faster one could be had here, and how.")
    console.print()
    save_and_load(arguments.out, model, ema, digits)
    averaged, raw, again = (statistics.mean(results[name]) for name in ("averaged", "raw", "raw, remeasured"))
    verdict = (
        f"On unseen digits, averaged weights got {averaged:.1f}% right and raw weights {raw:.1f}% "
        f"({again:.1f}% with BatchNorm measured again)."
    )
    console.print(f"\n{verdict}" if better else f"\nNOT SHOWN that averaging helps. {verdict}")
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
