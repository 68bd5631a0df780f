"""`python -m fused_ema merge`, and its progress bar."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import oracle
import pytest
import torch
from merge_checks import averaged, saved
from safetensors.torch import load_file

from fused_ema import merge, merging
from fused_ema.merging.progress import Progress


def command(*arguments, folder):
    line = [sys.executable, "-m", "fused_ema", "merge", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def three(tmp_path):
    contents = [{"w": torch.randn(1000)} for _ in range(3)]
    saved("safetensors", tmp_path, contents)
    return tmp_path, contents


NAMES = ["step-0.safetensors", "step-1.safetensors", "step-2.safetensors"]


@pytest.mark.parametrize("weights", ["ema:0.9", "0.2,0.3,0.5"])
def test_the_command_of_the_documentation(three, weights):
    folder, contents = three
    done = command(*NAMES, "-o", "out.safetensors", "--weights", weights, folder=folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"out.safetensors: the average of 3 checkpoints, in \d+\.\d s\n", done.stdout)
    assert done.stderr == "", "no bar where stderr is no terminal"
    numbers = merging.weights_of(merging.weights.parsed(weights), 3)
    expected = averaged([each["w"] for each in contents], numbers)
    assert oracle.same_bits(load_file(folder / "out.safetensors")["w"], expected)


def test_times_and_keys_of_the_command(tmp_path):
    saved("torch", tmp_path, [{"model": {"w": torch.tensor([float(i)])}, "a": {"w": torch.ones(1)}} for i in range(2)])
    options = ["--weights", "power:0.1", "--times", "10,20", "--key", "model", "--integers", "newest"]
    done = command("step-0.pt", "step-1.pt", "-o", "o.pt", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "o.pt", weights_only=True)["model"]["w"].item()
    assert found == pytest.approx(merging.weights_of("power:0.1", 2, [10, 20])[1], rel=1e-7)


def test_errors_and_warnings_of_the_command(three):
    folder, contents = three
    for options, message in (
        (
            ["-o", "o.safetensors", "--weights", "median"],
            "nothing was written: weights: expected numbers or one of mean",
        ),
        (["-o", "o.safetensors", "--times", "a,b"], "nothing was written: --times: expected numbers"),
        (["-o", "no/o.safetensors"], "nothing was written: .*make it first"),
    ):
        done = command(*NAMES, *options, folder=folder)
        assert done.returncode == 1
        assert re.match(f"fused_ema: {message}", done.stderr), done.stderr
        assert "Traceback" not in done.stderr
    assert not (folder / "o.safetensors").exists()
    assert command(*NAMES, folder=folder).returncode == 2  # no --out
    contents[0]["w"][3] = float("nan")
    saved("safetensors", folder, contents)
    done = command(*NAMES, "-o", "o.safetensors", folder=folder)
    assert done.returncode == 0
    assert done.stderr == "fused_ema: o.safetensors: NaN or infinite values are in the average of 'w'\n"


def test_the_bar_on_a_terminal(three):
    import pty

    folder, _ = three
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "fused_ema", "merge", *NAMES, "-o", "o.safetensors"]
    done = subprocess.run(line, cwd=folder, stderr=theirs, stdout=subprocess.PIPE, check=False)
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert drawn.endswith("\r\x1b[K"), "the bar is gone at the end"


def test_the_bar(capsys, monkeypatch):
    clock = iter([0.0, 0.05, 0.2, 0.25, 0.4, 0.5, 0.6])
    monkeypatch.setattr("fused_ema.merging.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = Progress(4_000_000_000, shown=True)
    for _ in range(4):
        bar.add(1_000_000_000)
    bar.close()
    drawn = capsys.readouterr().err.split("\r")[1:]
    assert len(drawn) == 3, "ten times a second at most"
    assert "[###############...............]  50% 10.00 GB/s, 0 s left" in drawn[0]
    assert "100%" in drawn[1]
    assert drawn[2] == "\x1b[K"
    silent = Progress(1, shown=False)
    silent.add(1)
    silent.close()
    assert capsys.readouterr().err == ""


def test_progress_can_be_asked_for(three, capsys):
    folder, _ = three
    merge([folder / name for name in NAMES], folder / "o.safetensors", progress=True)
    assert capsys.readouterr().err.endswith("\x1b[K")
    merge([folder / name for name in NAMES], folder / "o.safetensors")
    assert capsys.readouterr().err == ""
