"""The examples, each in a process of its own with small settings: they end well, and what they print is so."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments, folder):
    command = [sys.executable, "-W", "error::UserWarning:__main__", EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of the one match, as floats."""
    (found,) = re.findall(pattern, text)
    return [float(each) for each in ([found] if isinstance(found, str) else found)]


@pytest.mark.parametrize("name", ["seed.py", "diffusion.py", "dino.py", "accelerated.py"])
def test_an_example_is_a_page(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 80


def test_the_seed_saves_what_the_tutorial_meant_to(tmp_path):
    output = run("seed.py", tmp_path, folder=tmp_path)
    assert "99.0% of the average is the initial weights" in output
    checkpoint = torch.load(tmp_path / "SimpleNet.pth", weights_only=True)
    assert checkpoint.keys() == {"model", "ema_model"}

    with torch.random.fork_rng():  # the tutorial's loop, with its mistakes corrected
        torch.manual_seed(0)
        model = nn.Sequential()
        model.fc1, model.relu, model.fc2 = nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)
        ema_model = copy.deepcopy(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        for _ in range(100):
            optimizer.zero_grad()
            inputs = torch.randn(32, 10)
            nn.MSELoss()(model(inputs), torch.randn(32, 1)).backward()
            optimizer.step()
            ema_params = dict(ema_model.named_parameters())
            with torch.no_grad():
                for name, param in model.named_parameters():
                    ema_params[name].mul_(0.9999).add_(param.data, alpha=1 - 0.9999)
    for name, expected in (("model", model), ("ema_model", ema_model)):
        torch.testing.assert_close(checkpoint[name], expected.state_dict(), rtol=0, atol=3e-6)


@pytest.mark.slow
def test_diffusion_finds_an_average_better_than_the_raw_weights(tmp_path):
    for module in ("matplotlib", "rich", "safetensors", "sklearn"):
        pytest.importorskip(module)
    from matplotlib import colors, image

    output = run("diffusion.py", "--steps", 500, "--out", "plot.png", folder=tmp_path)
    sweep, tracked = (
        dict(re.findall(r"(0\.\d\d) (\d\.\d{4})", re.search(rf"^{name}, .*$", output, re.MULTILINE)[0]))
        for name in ("reconstructed", "tracked")
    )
    assert len(sweep) == 12
    assert tracked.items() <= sweep.items(), "a tracked average is reconstructed exactly"
    losses = [float(each) for each in sweep.values()]
    raw, best, sigma_rel = numbers(r"validation loss: raw (\S+), best average (\S+) at sigma_rel (\S+)", output)
    assert best == min(losses) < 0.95 * raw
    assert best == float(sweep[f"{sigma_rel:.2f}"])
    assert max(losses) - best > 0.005, "the averages differ"

    plot = torch.tensor(image.imread(tmp_path / "plot.png")[..., :3])
    assert plot.shape == (540, 840, 3)
    for color in ("tab:blue", "tab:red", "black"):
        drawn = (plot - torch.tensor(colors.to_rgb(color))).abs().amax(-1) < 0.1
        assert drawn.sum() > 100, f"no {color} in the plot"


@pytest.mark.slow
def test_dino_learns_features_without_labels(tmp_path):
    for module in ("rich", "sklearn"):
        pytest.importorskip(module)
    output = run("dino.py", "--steps", 400, folder=tmp_path)
    (pixels,) = numbers(r"pixels: (\S+)% ", output)
    for name, better_than_pixels in (("student", 8), ("teacher", 2)):  # the teacher follows later
        untrained, trained = numbers(rf"features of the {name}: untrained (\S+)%, trained (\S+)%", output)
        assert trained > untrained + 8
        assert trained > pixels + better_than_pixels
    used, each = numbers(r"prototypes in use: (\S+) in all, (\S+) by one image", output)
    assert used > max(15, 3 * each), "the teacher's answers have collapsed"


@pytest.mark.slow
def test_the_loop_of_accelerate_resumes_with_the_same_weights(tmp_path):
    for module in ("accelerate", "sklearn", "safetensors"):
        pytest.importorskip(module)
    from safetensors.torch import load_file

    pattern = r"step (\d+): ([\d.]+)% of unseen digits right with the average, ([\d.]+)% without"
    step, averaged, _ = numbers(pattern, run("accelerated.py", tmp_path / "whole", folder=tmp_path))
    assert step == 400
    assert averaged > 90
    assert numbers(pattern, run("accelerated.py", tmp_path / "parts", "--steps", 150, folder=tmp_path))[0] == 150
    output = run("accelerated.py", tmp_path / "parts", folder=tmp_path)
    assert "resumed at step 150" in output
    assert numbers(pattern, output)[0] == 400
    raw = load_file(tmp_path / "parts" / "checkpoint" / "model.safetensors")
    assert not torch.equal(
        load_file(tmp_path / "parts" / "averaged" / "model.safetensors")["0.weight"], raw["0.weight"]
    )


# In PyTorch 2.6, a thread of Gloo may drop the last reference to a collective's result while the interpreter ends;
# it waits for the GIL, Python ends the thread, and the unwinding stops in a destructor: the process aborts. A program
# of PyTorch alone does it each time if that thread has the lowest priority. So there the process ends right after
# the example, without the interpreter's own end. PyTorch 2.13 is free of it.
THEN_LEAVE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_accelerated_on_two_processes(tmp_path):
    """Replicas (DDP): one process reports, and both go on from its checkpoint."""
    for module in ("accelerate", "sklearn", "safetensors"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    if torch.__version__ < (2, 13):
        (tmp_path / "then_leave.py").write_text(THEN_LEAVE)
        command.append(tmp_path / "then_leave.py")
    reports = []
    for steps in (20, 40):
        done = subprocess.run(
            [*command, EXAMPLES / "accelerated.py", tmp_path / "run", "--steps", str(steps)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        )
        assert done.returncode == 0, done.stderr[-20000:]  # a process that crashes says first where
        reports.append([line.partition(":")[0] for line in done.stdout.splitlines() if "step" in line])
    assert reports == [["step 20"], ["resumed at step 20", "step 40"]]
