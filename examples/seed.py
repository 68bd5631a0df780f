"""The script of the EMA tutorial that this package grew from, line by line; "was" marks what the tutorial had.

    python examples/seed.py [folder]

writes SimpleNet.pth into the folder, or into a temporary one.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn

import fused_ema  # was: OrderedDict and update_ema(), a loop over named_parameters() with mul_ and add_


class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 5)
        self.fc2 = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = self.fc2(x)
        return x


torch.manual_seed(0)  # was: not set
# Create the model
model = SimpleNet()
# Define the optimizer, here Adam
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
# The decay of the average, in [0, 1]: the closer to 1, the slower the average
decay = 0.9999
# The average starts as a copy of the model
ema = fused_ema.EMA(model, decay)  # was: ema_model.load_state_dict(model.state_dict()), with no ema_model defined
# A dict for both sets of parameters
model_params = {}
# Train, and update the average after each step
for _epoch in range(100):
    # Data loading, forward pass and loss go here; as in the tutorial, the data are noise
    optimizer.zero_grad()
    inputs = torch.randn(32, 10)
    targets = torch.randn(32, 1)
    outputs = model(inputs)
    loss = nn.MSELoss()(outputs, targets)
    loss.backward()
    optimizer.step()
    ema.update()  # was: update_ema(ema_model, model, decay)
model_params["model"] = model.state_dict()  # was: model_parmars, an undefined name
model_params["ema_model"] = ema.averaged_state_dict()  # was: ema_model.state_dict(), with the same names and shapes
path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(), "SimpleNet.pth")
torch.save(model_params, path)  # was: into the current folder

# Not in the tutorial: load what was saved. weights_only=True never runs code from the file.
checkpoint = torch.load(path, weights_only=True)
for name, saved in model_params.items():
    loaded = SimpleNet()
    loaded.load_state_dict(checkpoint[name])
    if not all(torch.equal(tensor, saved[key]) for key, tensor in loaded.state_dict().items()):
        raise SystemExit(f"{path}: {name!r} differs from what was saved")
    print(f"{path}: {name!r} loads into a SimpleNet as it was saved")
# Not in the tutorial either: a decay of 0.9999 suits runs of about 100,000 steps. For short runs, a schedule starts
# with smaller decays: fused_ema.EMA(model, fused_ema.schedules.inverse_power(decay)).
print(f"after {ema.step} updates with decay {decay}, {decay**ema.step:.1%} of the average is the initial weights")
