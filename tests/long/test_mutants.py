"""The faults of `make mutants` still fit the code they are put into, and the tests that run first exist."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().with_name("mutants")))
from mutants import MUTANTS
from run import FIRST, THEN

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_place_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_tests_that_run_first_are_there():
    assert {mutant.file for mutant in MUTANTS} == FIRST.keys()
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name for line in [*FIRST.values(), THEN] for name in line.split()} <= names
