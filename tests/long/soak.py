"""Checks a million updates of models that keep changing against the formula in float64. Memory has to stay flat.

    python tests/long/soak.py [UPDATES]

Fails if one element is off by more than its bound, or if the process has grown by more than 16 MiB since the first
tenth of the updates.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
import time

import torch
from torch import nn

import fused_ema

GROWTH = 16 << 20  # bytes
MODEL, CHANGE = 1000, 20  # updates between two models, and between two changes of one
DECAYS = [0.0, 0.3, 0.9, 0.999, 0.9999]


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Subject:
    """A model, its averages kept by hand, and a manager."""

    def __init__(self) -> None:
        width, dtype = random.randint(1, 40), random.choice([torch.float32, torch.bfloat16, torch.float16])
        layers = [nn.Linear(width, width) for _ in range(random.randint(1, 4))]
        self.model = nn.Sequential(*layers, nn.BatchNorm1d(width)).to(dtype)
        self.ema = copy.deepcopy(self.model).float()
        self.decay = 0.9
        self.manager = fused_ema.EMA(self.model, lambda _: self.decay)
        self.handle = fused_ema.bind(self.ema, self.model)

    def change(self) -> None:
        """Changes tensors in one of the ways that training code does."""
        layer = self.model[0]
        kind = random.randrange(6)
        if kind == 0:
            layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        elif kind == 1:
            layer.weight.data = torch.randn_like(layer.weight).t().contiguous().t()
        elif kind == 2:
            state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(state, assign=True)
        elif kind == 3:
            self.model.to(random.choice([torch.float32, torch.bfloat16, torch.float16]))
        elif kind == 4:
            self.ema = copy.deepcopy(self.ema)
            self.handle = fused_ema.bind(self.ema, self.model)
        else:
            with self.manager.swapped():
                pass

    def update(self) -> int:
        """One update, in one of the ways. Returns how many elements are off."""
        self.decay = random.choice(DECAYS)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.add_(random.uniform(-1, 1))
        way = random.randrange(4)
        managed = self.manager.state_dict()["averages"][0]
        old, model = flat(managed.values() if way == 3 else self.ema.parameters()), flat(self.model.parameters())
        if way == 0:
            fused_ema.update(self.ema, self.model, self.decay)
        elif way == 1:
            self.handle.update(self.decay)
        elif way == 2:
            fused_ema.update([*self.ema.parameters()], [*self.model.parameters()], self.decay)
        else:
            self.manager.update()
        new = flat(managed.values() if way == 3 else self.ema.parameters())
        wanted = old * self.decay + model * (1 - self.decay)
        allowed = 2.0**-24 * (wanted.abs() + 2 * (model - old).abs()) + 2.0**-149
        return int((~((new - wanted).abs() <= allowed)).sum())


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def main(updates: int) -> None:
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    begin, first, wrong, changes = time.monotonic(), 0, 0, 0
    subject = Subject()
    for n in range(1, updates + 1):
        if n % MODEL == 0:
            subject = Subject()
        elif n % CHANGE == 0:
            subject.change()
            changes += 1
        wrong += subject.update()
        if n % max(1, updates // 10) == 0:
            gc.collect()
            now = resident()
            first = first or now
            print(
                f"{n:9,} updates, {changes:6,} changes, {now / 2**20:7.1f} MiB, {wrong} elements off, "
                f"{time.monotonic() - begin:5.0f} s",
                flush=True,
            )
    if wrong or now - first > GROWTH:
        sys.exit(f"{wrong} elements off, {(now - first) / 2**20:.1f} MiB more than after a tenth")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
