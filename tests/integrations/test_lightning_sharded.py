"""The callback with FSDP2, as Lightning's ModelParallelStrategy uses it, on two processes of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning.pytorch")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 runs on the CPU from PyTorch 2.7 on")
def test_a_sharded_module_resumes_with_the_same_bits(tmp_path):
    script = Path(__file__).with_name("lightning_sharded.py")
    path = os.pathsep.join([str(script.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is well" in done.stdout
