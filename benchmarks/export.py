"""Writes a result file's rows with the columns of `kernels benchmark`, Hugging Face's tool, as CSV.

python benchmarks/export.py RESULTS.json [OUT.csv]

So that they can be read beside other kernels'. A benchmark is a case, and a workload a method. Times are milliseconds;
on CUDA they are the device's own. Ref is the mean time of the tutorial loop, and Speedup compares the means. An outlier
lies more than 1.5 IQR below the first or above the third quartile. Match tells whether one step agrees with float64
within the tolerance of `torch.testing.assert_close`; Error is the largest error, in units of the promised bound.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from methods import LOOP

COLUMNS = ("mean", "std", "min", "max", "iqr")
HEADS = ("Benchmark", "Workload", "N", "Speedup", *(f"{name.title()}(ms)" for name in COLUMNS), "Outliers", "Ref(ms)")
HEADS = tuple(head.replace("Iqr", "IQR") for head in (*HEADS, "Match", "Error"))


def lines(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each row, and for each method that was left out because its result was wrong. What a file from before
    these columns does not have stays empty."""
    found: list[dict[str, Any]] = []
    means = {row["case"]: row["device_us"].get("mean") for row in content["rows"] if row["method"] == LOOP}
    for row in content["rows"]:
        us, mean = row["device_us"], means.get(row["case"])
        line = {"Benchmark": row["case"], "Workload": row["method"], "N": row["rounds"]}
        line |= {head: f"{us[name] / 1e3:.4f}" for head, name in zip(HEADS[4:9], COLUMNS, strict=True) if name in us}
        if mean and "mean" in us:
            line |= {"Speedup": f"{mean / us['mean']:.2f}x", "Ref(ms)": f"{mean / 1e3:.4f}"}
        line |= {"Outliers": us.get("outliers"), "Error": f"{row['max_err_over_bound']:.2f}"}
        found.append(line | {"Match": {True: "✓", False: "✗", None: None}[row.get("match")]})
    for case, left_out in content["left_out"].items():
        if isinstance(left_out, dict):  # otherwise the reason why a whole case or part is missing
            wrong = [name for name, why in left_out.items() if why.startswith("ArithmeticError")]
            found += [{"Benchmark": case, "Workload": name, "Match": "✗"} for name in wrong]
    return found


def write(content: dict[str, Any], file: TextIO) -> None:
    writer = csv.DictWriter(file, HEADS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines(content))


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python benchmarks/export.py RESULTS.json [OUT.csv]")
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if len(sys.argv) == 2:
        write(content, sys.stdout)
    else:
        with Path(sys.argv[2]).open("w", encoding="utf-8") as file:
            write(content, file)


if __name__ == "__main__":
    main()
