"""fused_ema.dropin.EMAModel of a model that FSDP2 has sharded, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharded_unet.py")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 runs on the CPU from PyTorch 2.7 on")
def test_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("passed on rank") == 2
