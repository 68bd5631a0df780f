"""Finds the best average of a diffusion model's weights after training, from snapshots of two (arXiv 2312.02696).

python examples/diffusion.py [--steps N] [--out diffusion.png]    # EDM's denoiser (arXiv 2206.00364) for 8x8 digits"""

import argparse
import tempfile

import torch
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fused_ema
from fused_ema.posthoc import load_into, reconstruct, save_snapshot
from fused_ema.schedules import power_function

TRACKED = [0.05, 0.10]  # sigma_rel: the width of an average (standard deviation) as a share of the time trained
SWEEP = [0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.20, 0.25, 0.28]
SPREAD = 0.75  # standard deviation of the data, whose pixels range from -1 to 1


class Denoiser(nn.Sequential):
    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + SPREAD**2).sqrt()  # dividing by it gives about unit variance at any noise level
        predicted = super().forward(torch.cat([noisy / total, sigma.log() / 4], dim=1))
        return noisy * (SPREAD / total) ** 2 + predicted * sigma * SPREAD / total


def loss(model: nn.Module, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    sigma = (torch.randn(len(images), 1, generator=generator) * 1.2 - 1.2).exp()
    noisy = images + sigma * torch.randn(images.shape, generator=generator)
    return ((SPREAD**2 + sigma**2) / (SPREAD * sigma) ** 2 * (model(noisy, sigma) - images) ** 2).mean()


@torch.no_grad()
def validate(model: nn.Module, images: Tensor) -> float:
    return loss(model, images.repeat(16, 1), torch.Generator().manual_seed(1)).item()  # the same noise each time


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--out", default="diffusion.png")
arguments = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)  # in a network this small, threads would mostly wait for each other
digits = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)] / 8 - 1
model = Denoiser(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)  # constant and large: the raw weights stay noisy
ema = fused_ema.EMA(model, decay=[power_function(sigma_rel) for sigma_rel in TRACKED])
with tempfile.TemporaryDirectory() as folder:
    for step in track(range(1, arguments.steps + 1), "training"):
        error = loss(model, digits[torch.randint(1400, (32,))])  # the other 397 are held out for validation
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        ema.update()
        if step % max(1, arguments.steps // 50) == 0 or step == arguments.steps:
            save_snapshot(folder, ema)
    raw, tracked, swept = validate(model, digits[1400:]), [], []
    for index in range(len(TRACKED)):
        with ema.swapped(index):
            tracked.append(validate(model, digits[1400:]))
    for sigma_rel in SWEEP:
        load_into(model, reconstruct(folder, sigma_rel))  # overwrites the raw weights
        swept.append(validate(model, digits[1400:]))
for name, widths, losses in (("reconstructed", SWEEP, swept), ("tracked", TRACKED, tracked)):
    print(f"{name}, sigma_rel and validation loss:", *(f"{x:.2f} {y:.4f}" for x, y in zip(widths, losses, strict=True)))
summary = f"validation loss: raw {raw:.4f}, best average {min(swept):.4f} at sigma_rel {SWEEP[swept.index(min(swept))]}"
figure = Figure(figsize=(7, 4.5), layout="constrained")
axes = figure.subplots()
axes.plot(SWEEP, swept, "o-", label="reconstructed after training")
axes.plot(TRACKED, tracked, "s", color="tab:red", ms=11, mew=2, mfc="none", label="tracked while training")
axes.axhline(raw, color="black", linestyle="--", label="raw weights")
axes.set(title=summary, ylabel="validation loss: weighted squared error (no unit)")
axes.set_xlabel("sigma_rel: width of the average / time trained (both in steps)")
axes.legend(loc="center left")
figure.savefig(arguments.out, dpi=120)
print(f"{summary}\nplot: {arguments.out}")
