"""Averages of any length after training: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C.

    ema = EMA(model, decay=[power_function(0.05), power_function(0.10)])
    save_snapshot("snapshots", ema)  # while training, say 64 times in all
    weights = reconstruct("snapshots", sigma_rel=0.15)  # afterwards
    load_into(model, weights)

`fused_ema.posthoc.profiles` has the mathematics.
"""

from .load_into import load_into
from .profiles import profile_error, solve_weights
from .reconstruct import reconstruct
from .snapshots import Snapshot, save_snapshot, snapshots

__all__ = ["Snapshot", "load_into", "profile_error", "reconstruct", "save_snapshot", "snapshots", "solve_weights"]

for _public in (Snapshot, load_into, profile_error, reconstruct, save_snapshot, snapshots, solve_weights):
    _public.__module__ = __name__
