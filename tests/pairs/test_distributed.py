"""Sharded models, in processes of their own: FSDP2, tensor parallelism, distributed checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused

import fused_ema

SCRIPT = Path(__file__).with_name("sharded.py")
HOST = Path(__file__).with_name("sharded_host.py")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def run(ranks, folder, *checks, script=SCRIPT):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, script, folder, *checks],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "165"},  # glibc then overwrites freed memory
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for check in checks:
        assert done.stdout.count(f"{check} passed on rank") == ranks


@pytest.mark.hazard(14, "good")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded(ranks, tmp_path):
    checks = (
        "update manager training evaluation ddp refusals reselect stale layouts threads compiled files unsharded "
        "save load"
    )
    run(ranks, tmp_path, *checks.split())


@pytest.mark.slow
def test_a_checkpoint_of_4_ranks_loads_on_2_and_on_1(tmp_path):
    run(4, tmp_path, "save", "load")
    for ranks in (2, 1):
        run(ranks, tmp_path, "load")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_with_averages_in_host_memory(ranks, tmp_path):
    run(ranks, tmp_path, "host", "host_attach", "host_files", "host_save", "host_load", script=HOST)


@pytest.mark.slow
def test_a_checkpoint_of_averages_in_host_memory_goes_from_4_ranks_to_2_and_back(tmp_path):
    run(4, tmp_path, "host_save", script=HOST)
    for ranks in (2, 4):  # each loads all before it, and saves what it loaded
        run(ranks, tmp_path, "host_load", script=HOST)


@pytest.mark.hazard(14, "guarded")
def test_the_empty_parameters_of_zero_3_are_refused():
    model, ema = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 4  # as DeepSpeed marks them
    refused(RuntimeError, lambda: fused_ema.update(ema, model, 0.5), ema, names=["weight", "GatheredParameters"])
    refused(RuntimeError, lambda: fused_ema.EMA(model), model, names=["weight", "GatheredParameters"])
    model.weight.data = torch.ones(2, 2)  # gathered
    fused_ema.update(ema, model, 0.0)
    assert ema.weight.eq(1).all()
