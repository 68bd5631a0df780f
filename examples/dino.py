"""Self-distillation as in DINO (arXiv 2104.14294), on 8x8 digits without labels: the teacher averages the student.

python examples/dino.py [--steps N]    # evaluates features by nearest neighbours among labelled digits"""

import argparse
import copy
import math

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fused_ema

PROTOTYPES, BATCH, TRAINING_IMAGES = 64, 64, 1200  # of 1797 images; the rest are held out


class Cosines(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features), F.normalize(self.weight))


def view(images: Tensor) -> Tensor:
    """Shifts each image by up to a pixel in each direction and adds noise."""
    move = torch.eye(2, 3).repeat(len(images), 1, 1)
    move[:, :, 2].uniform_(-0.25, 0.25)  # the 8 pixels span -1 to 1
    moved = F.grid_sample(images, F.affine_grid(move, images.shape, align_corners=False), align_corners=False)
    return moved + 0.2 * torch.randn_like(moved)


@torch.no_grad()
def accuracy(features: nn.Module) -> float:
    """Of a vote of the 10 nearest neighbours among the training images, in percent."""
    unseen, known = (F.normalize(features.eval()(x).flatten(1)) for x in (views_of_unseen, images[:TRAINING_IMAGES]))
    votes = labels[(unseen @ known.T).topk(10).indices]
    return 100 * (votes.mode().values == labels[TRAINING_IMAGES:]).float().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1200)
steps = parser.parse_args().steps
torch.manual_seed(0)
torch.set_num_threads(1)  # in a network this small, threads would mostly wait for each other
order, digits = torch.randperm(1797), load_digits()
images, labels = torch.tensor(digits.images).float()[order, None] / 16, torch.tensor(digits.target)[order]
views_of_unseen = view(images[TRAINING_IMAGES:])
body = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.GELU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.GELU(), nn.Flatten(), nn.Linear(256, 64),
)  # fmt: skip
head = nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 32), Cosines(32, PROTOTYPES, bias=False)
student = nn.Sequential(body, nn.Sequential(*head))
teacher = copy.deepcopy(student).requires_grad_(False)
untrained = accuracy(copy.deepcopy(body))  # student and teacher start equal
# The teacher runs at each step and has its own BatchNorm statistics; "copy" would overwrite them with the student's.
average = fused_ema.bind(teacher, student, buffers="ignore")
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
center = torch.zeros(PROTOTYPES)
for step in track(range(1, steps + 1), "training"):
    views = view(images[torch.randint(TRAINING_IMAGES, (BATCH,))].repeat(2, 1, 1, 1))  # two views of each image
    said = teacher(views)
    # Centering keeps the teacher from always giving one answer; sharpening (0.04 < 0.1), from giving a uniform one.
    targets = ((said - center) / 0.04).softmax(1).roll(BATCH, 0)  # its answer for the other view
    loss = F.cross_entropy(student(views) / 0.1, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    center.lerp_(said.mean(0), 0.1)
    average.update(1 - 0.01 * (1 + math.cos(math.pi * step / steps)) / 2)  # momentum from 0.99 to 1

print(f"pixels: {accuracy(nn.Identity()):.1f}% of unseen digits right")
for name, network in (("student", student), ("teacher", teacher)):
    print(f"features of the {name}: untrained {untrained:.1f}%, trained {accuracy(network[0]):.1f}%")
shares = ((teacher.eval()(views_of_unseen) - center) / 0.04).softmax(1)
used, each = (torch.special.entr(p).sum(-1).exp().mean().item() for p in (shares.mean(0), shares))
print(f"prototypes in use: {used:.1f} in all, {each:.1f} by one image (collapsed: both 1, or both {PROTOTYPES})")
