"""A short program that runs the kernel's cases under compute-sanitizer (`make gpu-sanitize`).

Each check is one of the GPU tests and compares values.
"""

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from oracle import FLOATS, HALF, PAIRS
from step_checks import (
    check_copy,
    check_count,
    check_device_decay,
    check_layouts,
    check_order_pieces_alignment,
    check_sizes,
    check_swap,
)
from test_gpu_ema import SEVERAL, check_same_as_cpu
from test_gpu_numbers import check_same_as_cpu as check_batches

import fused_ema


def main():
    warnings.filterwarnings("ignore", "fused_ema. averages in 16 bits")
    assert fused_ema.backend("cuda") == "cuda"
    for pair in PAIRS:
        check_sizes("cuda", pair, 0.3, bitwise=True)
    for decay in (0.0, 0.9, 1.0):
        check_count("cuda", 449, decay, bitwise=True)
    check_layouts("cuda", 0.9, bitwise=True)
    check_copy("cuda", fused_ema.copy_)
    check_swap("cuda")
    check_order_pieces_alignment("cuda")
    check_device_decay("cuda", 0.999, torch.float32, bitwise=True)
    check_batches("cuda", batches=4, count=500)
    for dtype, rounding in [(FLOATS[0], "nearest"), *((dtype, "stochastic") for dtype in HALF)]:
        for model_dtype in (torch.float32, torch.bfloat16):
            for nonfinite in ("propagate", "skip"):
                options = {"dtype": dtype, "rounding": rounding, "nonfinite": nonfinite}
                check_same_as_cpu("cuda", SEVERAL, model_dtype, **options, seed=7)
    torch.cuda.synchronize()
    print("all cases hold")


if __name__ == "__main__":
    sys.exit(main())
