"""Self-distillation as in DINO (arXiv 2104.14294): the teacher is an average of the student. Digits of 8x8, no labels.

python examples/dino.py [--steps N]    # judged by nearest neighbours: views of unseen digits among labelled ones"""

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
    """Each image moved by up to a pixel in both directions, with noise."""
    move = torch.eye(2, 3).repeat(len(images), 1, 1)
    move[:, :, 2].uniform_(-0.25, 0.25)  # the 8 pixels reach from -1 to 1
    moved = F.grid_sample(images, F.affine_grid(move, images.shape, align_corners=False), align_corners=False)
    return moved + 0.2 * torch.randn_like(moved)


@torch.no_grad()
def accuracy(features: nn.Module) -> float:
    """Of the vote of the 10 nearest neighbours among the training images, in percent."""
    unseen, known = (F.normalize(features.eval()(x).flatten(1)) for x in (views_of_unseen, images[:TRAINING_IMAGES]))
    votes = labels[(unseen @ known.T).topk(10).indices]
    return 100 * (votes.mode().values == labels[TRAINING_IMAGES:]).float().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1200)
steps = parser.parse_args().steps
torch.manual_seed(0)
torch.set_num_threads(1)  # so small a network's threads would mostly wait for one another
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
untrained = accuracy(copy.deepcopy(body))  # of both
# The teacher runs at each step, so its BatchNorm has statistics of its own: "copy" would put the student's there.
average = fused_ema.bind(teacher, student, buffers="ignore")
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
center = torch.zeros(PROTOTYPES)
for step in track(range(1, steps + 1), "training"):
    views = view(images[torch.randint(TRAINING_IMAGES, (BATCH,))].repeat(2, 1, 1, 1))  # two of each image
    said = teacher(views)
    # Centering keeps the teacher from always saying the same, sharpening (0.04 < 0.1) from saying nothing.
    targets = ((said - center) / 0.04).softmax(1).roll(BATCH, 0)  # what it says of the other view
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
