"""Measures the share of a real training step that each manager's update takes."""

from __future__ import annotations

import importlib
import logging
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import reason, spread, synchronize
from methods import (
    AVERAGED,
    DIFFUSERS,
    DIFFUSERS_FOREACH,
    EMA_PYTORCH,
    FOREACH_CACHED,
    LIGHTNING,
    LOOP,
    MANAGER,
    OURS,
    TIMM,
    TORCH_EMA,
    UPDATE,
    make_step,
)
from models import average_of
from report import columns, console, progress
from torch import Tensor, nn

METHODS = (
    LOOP,
    FOREACH_CACHED,
    AVERAGED,
    TIMM,
    EMA_PYTORCH,
    TORCH_EMA,
    DIFFUSERS,
    DIFFUSERS_FOREACH,
    LIGHTNING,
    UPDATE,
    MANAGER,
)
WARM_UP = 2  # rounds


def vit(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor], str]:
    """A ViT-S on images of 64 pixels; on a GPU, a ViT-B on images of 224 pixels."""
    library, large = importlib.import_module("transformers"), device.type == "cuda"
    width, batch, side = (768, 64, 224) if large else (384, 8, 64)
    config = library.ViTConfig(
        image_size=side,
        patch_size=16 if large else 8,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=100,
    )

    def loss(model: nn.Module) -> Tensor:
        images, labels = torch.randn(batch, 3, side, side, device=device), torch.randint(100, (batch,), device=device)
        return model(pixel_values=images, labels=labels).loss  # type: ignore[no-any-return]

    return library.ViTForImageClassification(config), loss, f"ViT, width {width}, {batch} images of {side} pixels"


def gpt(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor], str]:
    library, large = importlib.import_module("transformers"), device.type == "cuda"
    width, layers, batch, length = (768, 12, 16, 1024) if large else (384, 6, 8, 128)
    config = library.GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        n_positions=length,
        vocab_size=50304 if large else 8192,
        bos_token_id=0,
        eos_token_id=0,
    )

    def loss(model: nn.Module) -> Tensor:
        tokens = torch.randint(config.vocab_size, (batch, length), device=device)
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    return library.GPT2LMHeadModel(config), loss, f"GPT, width {width}, {layers} layers, {batch} x {length} tokens"


def loop(make: Callable[..., Any], device: torch.device, budget: float, names: list[str]) -> dict[str, Any]:
    """Each step trains the model, then one of the managers makes its update, with the caches as in real training."""
    torch.manual_seed(0)
    model, loss, title = make(device)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    average = average_of(model, torch.float32)
    updates, left_out = {}, {}
    for name in names:
        try:
            with torch.no_grad():
                updates[name] = make_step(name, model, average)
                updates[name]()
        except Exception as problem:  # a missing package, or too little memory
            left_out[name] = reason(problem)
    if not updates:
        raise ValueError(f"expected one of {', '.join(METHODS)}")
    steps: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in updates}
    order, shuffle, end = list(updates), random.Random(0).shuffle, time.perf_counter() + budget
    with progress(title, budget) as tick:
        while time.perf_counter() < end or min(map(len, spent.values())) < WARM_UP + 5:
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                loss(model).backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronize(device)
                trained = time.perf_counter()
                with torch.no_grad():
                    updates[name]()
                synchronize(device)
                spent[name].append(time.perf_counter() - trained)
                steps.append(trained - start)
            tick()
    step = statistics.median(steps[WARM_UP * len(order) :])
    shares = {name: statistics.median(values[WARM_UP:]) for name, values in spent.items()}
    return {
        "case": title,
        "tensors": len(list(model.parameters())),
        "elements": sum(parameter.numel() for parameter in model.parameters()),
        "step_us": spread(steps[WARM_UP * len(order) :]),
        "update_us": {name: spread(values[WARM_UP:]) for name, values in spent.items()},
        "share_of_step": {name: seconds / (step + seconds) for name, seconds in shares.items()},
        "left_out": left_out,
    }


def measure(device: torch.device, budget: float, chosen: list[str]) -> list[dict[str, Any]]:
    cases = []
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for make in (vit, gpt):
        try:
            cases.append(loop(make, device, budget, [name for name in METHODS if name in chosen]))
        except Exception as problem:  # a missing package, or too little memory
            console.print(f"left out: training of a {make.__name__} ({reason(problem)})", markup=False)
            continue
        show(cases[-1])
    return cases


def show(case: dict[str, Any]) -> None:
    title = f"Training: {case['case']}; {case['elements'] / 1e6:.1f}M parameters, {case['tensors']} tensors, "
    title += f"AdamW; a step without the average takes {case['step_us']['median'] / 1e3:.1f} ms"
    table = columns(title, "method", ["update, ms", "p20", "p80", "share of the step"])
    for name, us in case["update_us"].items():
        cells = [f"{us[key] / 1e3:.2f}" for key in ("median", "p20", "p80")]
        share = f"{case['share_of_step'][name]:.1%}"
        table.add_row(name, *cells, share, style="bold" if name in OURS else None)
    console.print(table)
    console.print()
