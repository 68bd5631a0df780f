"""Trains on 8x8 digits with accelerate and an average: several processes, gradient accumulation, resuming.

python examples/accelerated.py FOLDER [--steps N]    # or: accelerate launch examples/accelerated.py FOLDER
Called again with the same folder and more steps, it resumes from the checkpoint there."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fused_ema

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=400, help="total optimizer steps")
arguments = parser.parse_args()
set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
digits = load_digits()
images, labels = torch.tensor(digits.images).float().flatten(1) / 16, torch.tensor(digits.target)
known, unseen = TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
model, optimizer, train, test = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=0.01),
    DataLoader(known, batch_size=16, shuffle=True, drop_last=True),
    DataLoader(unseen, batch_size=256),
)
ema = fused_ema.EMA(model, decay=fused_ema.schedules.inverse_power(0.99))
ema.attach(optimizer)  # ignores steps that only accumulate or that the gradient scaler skips
accelerator.register_for_checkpointing(ema)
if (arguments.folder / "checkpoint").is_dir():
    accelerator.load_state(arguments.folder / "checkpoint")
    accelerator.print(f"resumed at step {ema.step}")
    accelerator.wait_for_everyone()  # all have read the checkpoint before one of them replaces it


@torch.no_grad()
def accuracy() -> float:
    """The share of unseen digits classified correctly, in percent."""
    model.eval()
    right = [accelerator.gather_for_metrics(model(x).argmax(1) == y) for x, y in test]
    model.train()
    return 100 * torch.cat(right).float().mean().item()


while ema.step < arguments.steps:
    for x, y in train:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        if ema.step == arguments.steps:
            break

accelerator.save_state(arguments.folder / "checkpoint")
raw = accuracy()
with ema.swapped():
    averaged = accuracy()
    accelerator.save_model(model, arguments.folder / "averaged")  # saves the average as model.safetensors
accelerator.print(f"step {ema.step}: {averaged:.1f}% of unseen digits right with the average, {raw:.1f}% without")
accelerator.end_training()  # ends the process group
