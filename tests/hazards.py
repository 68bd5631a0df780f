"""The rows of the table of hazards: what goes wrong in other packages that average weights.

A test names the row that it covers by a marker: `hazard(row, "good")` where the right thing happens, `hazard(row,
"guarded")` where the wrong thing is refused or prevented. summary.py prints the table with their outcomes.
"""

from __future__ import annotations

CASES = ("good", "guarded")
ROWS: dict[int, str] = {
    1: "tied parameters",
    2: "averages that overlap",
    3: "average aliases the model",
    4: "strides differ",
    5: "expanded tensors",
    6: "other shapes, equal numel",
    7: "misaligned offsets",
    8: "empty tensors and models",
    9: "more than 2^31 elements",
    10: "mixed dtypes",
    11: "several devices",
    12: "replaced tensors",
    13: "freed storage",
    14: "sharded tensors",
    15: "missing and extra names",
    16: "prefixes of wrappers",
    17: "integer buffers",
    18: "frozen parameters",
    19: "parametrized and lazy modules",
    20: "quantized, sparse, subclasses",
    21: "meta and fake tensors",
    22: "complex parameters",
    23: "inference tensors",
    24: "autograd's versions",
    25: "torch.compile",
    26: "autocast, vmap",
    27: "CUDA graphs",
    28: "streams",
    29: "threads, fork",
    30: "pickling",
    31: "bad decays",
    32: "NaN and Inf",
    33: "16-bit averages stand still",
    34: "bits depend on threads, ISA",
    35: "no or a broken extension",
    36: "skipped optimizer steps",
    37: "exceptions while swapped",
    38: "saving while swapped",
    39: "resuming",
    40: "out of memory, failed launch",
}
