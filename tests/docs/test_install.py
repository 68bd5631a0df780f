"""docs/install.md: each row of its matrix is tested by a part of .ci/packaging, or says that it is not tested."""

import re
from pathlib import Path

import pytest

from fused_ema.runners import RUNNERS

ROOT = Path(__file__).resolve().parents[2]
PARTS = set(re.findall(r'^ *say "([^":$]+):', (ROOT / ".ci" / "packaging").read_text(encoding="utf-8"), re.MULTILINE))
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
MATRIX = PAGE.partition("| what you have ")[2].partition("\n\n")[0].splitlines()[2:]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in MATRIX]


def test_there_are_rows_of_both_kinds():
    assert {row[-1].startswith("not tested") for row in ROWS} == {True, False}
    assert {"pip alone", "g++", "g++ and nvcc", "nvcc from pip", "uv"} <= PARTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_tested_or_says_that_it_is_not(row):
    _, _, on_cuda, on_cpu, speedup, tested = row
    assert {on_cuda, on_cpu} <= {"", *(runner.name for runner in RUNNERS)}
    named = re.findall("`(.+?)`", tested)
    assert set(named) <= PARTS
    assert bool(speedup) != tested.startswith("not tested")
    assert named or tested == "not tested"
