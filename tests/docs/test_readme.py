"""README: its code runs, its numbers come from a result file."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import clones, equal, net, parameters

import fused_ema

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_quick_start_runs():
    model = net()
    raw, averaged = {}, {}
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def train(model, optimizer):
        for _ in range(5):
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
        raw.update(clones(parameters(model)))

    exec(BLOCKS[0], names | {"train": train, "evaluate": lambda model: averaged.update(clones(parameters(model)))})
    assert raw.keys() == averaged.keys()
    assert not any(torch.equal(averaged[name], raw[name]) for name in raw if name.endswith("weight"))
    assert equal(clones(parameters(model)), raw)


def test_it_is_one_screen_after_another():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_equivalent_loop_is_equivalent():
    names = {"torch": torch}
    exec(BLOCKS[1], names)
    model = net()
    ours = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(torch.randn_like(tensor))
    theirs = copy.deepcopy(ours)
    fused_ema.update(ours, model, 0.9)
    names["update"](theirs, model, 0.9)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_the_table_is_made_from_its_result_file():
    subprocess.run([sys.executable, ROOT / "benchmarks" / "readme_table.py", "--check"], check=True)
