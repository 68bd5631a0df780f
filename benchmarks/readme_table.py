"""Writes the table between the markers of README.md from a result file, so that no number there is typed.

python benchmarks/readme_table.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {  # case in the file → heading
    "GPT-2 small shapes, float32": "GPT-2 small,<br>124M float32",
    "GPT-2 small shapes, float32 average of bfloat16": "the same, float32<br>average of bfloat16",
    "ResNet-50 shapes, float32": "ResNet-50,<br>26M and buffers",
    "2000 tensors of 256, float32": "2000 tensors<br>of 256",
    "2000 tensors of 256, float32, called again and again": "the same, again<br>and again",
}


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def table(path: str) -> str:
    content = json.loads((ROOT / path).read_text(encoding="utf-8"))
    machine = content["machine"]
    cases = {case["case"]: case for case in content["cases"]}
    shown = [cases[name] for name in COLUMNS]
    methods = list(dict.fromkeys(method for case in shown for method in case["methods"]))
    lines = ["| time per update | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for method in methods:
        cells = []
        for case in shown:
            row = case["methods"].get(method)
            cells.append(f"{duration(row['median_s'])} ({row['ratio']:.2f})" if row else "")
        plain = method.replace("_", r"\_")  # else Markdown takes them for emphasis
        lines.append(f"| {plain} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"Median, and in brackets how many times that of the bound handle. One run of `make bench`, methods in turns, "
        "in the last column five calls each: "
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}, "
        f"[all numbers]({path})."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = MARKED.sub(lambda marked: marked[1] + table(marked[2]) + marked[3], before)
    if "--check" in sys.argv[1:]:
        return 0 if before == after else 1
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
