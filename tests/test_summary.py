"""The table of hazards is whole and true, and an unexpected skip is seen."""

import re
from collections import Counter
from pathlib import Path

import pytest
from hazards import ROWS

pytest_plugins = ["pytester"]
FOLDER = Path(__file__).parent
CONFTEST = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n" + (
    "from summary import pytest_addoption, pytest_collection_modifyitems, pytest_sessionfinish, pytest_terminal_summary"
)


@pytest.fixture(autouse=True)
def no_options_from_outside(monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


TESTS = Counter(
    name for path in FOLDER.glob("test_*.py") for name in re.findall(r"^def test_(\w+)", path.read_text("utf-8"), re.M)
)


def test_each_row_names_a_good_case_and_a_guarded_one():
    assert list(ROWS) == list(range(1, 41))
    for row, (_, good, guarded) in ROWS.items():
        assert good != guarded
        for name in (good, guarded):
            assert TESTS[name] == 1, name
            assert f"{row:02}" in re.match(r"(?:\d\d_)+", name)[0].split("_"), name


def test_each_numbered_test_has_a_row():
    numbered = {int(number) for name in TESTS for number in re.findall(r"\d\d(?=_)", re.match(r"(\d\d_)*", name)[0])}
    assert numbered == set(ROWS)


@pytest.mark.parametrize(("reason", "status"), [("no CUDA GPU", 0), ("too tired", 1)])
def test_an_unexpected_skip_fails_the_run(pytester, reason, status):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(f"import pytest\ndef test_a(): pytest.skip({reason!r})\ndef test_b(): pass")
    assert pytester.runpytest_subprocess("-p", "no:cacheprovider").ret == 0
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--only-expected-skips")
    assert done.ret == status
    assert done.stdout.str().count("UNEXPECTED SKIP") == status


def test_the_table_is_printed_with_what_became_of_the_tests(pytester):
    pytester.makeconftest(CONFTEST)
    names = sorted({name for _, *pair in ROWS.values() for name in pair})
    body = {"31_decays_out_of_range_are_refused": "assert 0", "27_graph_with_a_decay_that_changes": "pytest.skip('')"}
    code = [f"def test_{name}(): {body.get(name, 'pass')}" for name in names]
    pytester.makepyfile("\n".join(["import pytest", *code, "def test_of_no_row(): assert 0"]))
    ran = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-m", "hazard")
    ran.assert_outcomes(passed=len(names) - 2, failed=1, skipped=1, deselected=1)
    lines = ran.stdout.str().splitlines()
    rows = {int(line[:2]): line for line in lines if re.match(r"[ \d]\d .* good: ", line)}
    assert list(rows) == list(ROWS)
    assert "guarded: failed (1)" in rows[31]
    assert "good: skipped (1)" in rows[27]
    assert "38 of 40 rows" in "".join(lines)
