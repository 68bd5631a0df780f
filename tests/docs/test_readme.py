"""README: its code runs, its numbers come from a result file."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import torch
from conftest import net

import fused_ema

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_quick_start_runs_and_is_ten_lines():
    assert len(BLOCKS[0].strip().splitlines()) <= 11
    names = {}
    exec(BLOCKS[0], names)
    model, ema = names["model"].weight, names["ema"].weight
    assert model.norm() < ema.norm() < 3, "the weights go to 0, and their average lags behind"


def test_the_quick_start_of_the_manager_runs(capsys):
    names = {}
    exec(BLOCKS[1], names)
    assert float(capsys.readouterr().out.removeprefix("tensor(").partition(",")[0].rstrip(")\n")) > 0
    assert names["ema"].step == 100
    names["ema"].load_state_dict(names["state"]["ema"])


def test_the_equivalent_loop_is_equivalent():
    names = {"torch": torch}
    exec(BLOCKS[2], names)
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
