"""The table of hazards is whole and true, and an unexpected skip is seen, in one process and in several."""

import re
from pathlib import Path

import pytest
from hazards import CASES, ROWS

pytest_plugins = ["pytester"]
FOLDER = Path(__file__).parent
CONFTEST = f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n" + (
    "from summary import pytest_addoption, pytest_collection_modifyitems, pytest_sessionfinish, pytest_terminal_summary"
)
INI = "[pytest]\naddopts = -p no:cacheprovider\nmarkers = hazard: a row of tests/hazards.py"


@pytest.fixture(autouse=True)
def project(pytester, monkeypatch):
    """A project of its own, without options from outside."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makeini(INI)


@pytest.fixture(params=["one process", "several processes"])
def run(request, pytester):
    """Runs pytest on the project with these options."""
    if request.param == "one process":
        return pytester.runpytest_subprocess
    pytest.importorskip("xdist")
    return lambda *options: pytester.runpytest_subprocess("-n", "2", *options)


def test_each_row_has_a_good_case_and_a_guarded_one():
    assert list(ROWS) == list(range(1, 53))
    marked = [
        (int(row), case)
        for path in FOLDER.rglob("test_*.py")
        for row, case in re.findall(r"^@pytest\.mark\.hazard\((\d+), \"(\w+)\"\)$", path.read_text("utf-8"), re.M)
    ]
    assert set(marked) == {(row, case) for row in ROWS for case in CASES}


def test_the_page_counts_the_rows():
    page = (FOLDER.parent / "docs" / "reliability.md").read_text("utf-8")
    assert re.findall(r"table of hazards at their end: (\d+) rows", page) == [str(len(ROWS))]


@pytest.mark.parametrize(
    ("reason", "options", "unexpected"),
    [("no CUDA GPU", ["--only-expected-skips"], 0), ("too tired", [], 0), ("too tired", ["--only-expected-skips"], 2)],
)
def test_an_unexpected_skip_fails_the_run(run, pytester, reason, options, unexpected):
    pytester.makepyfile(
        test_a=f"import pytest\ndef test_a(): pytest.skip({reason!r})\ndef test_b(): pass",
        test_b=f"import pytest\npytest.skip({reason!r}, allow_module_level=True)",
    )
    done = run(*options)
    assert done.ret == bool(unexpected)
    assert done.stdout.str().count("UNEXPECTED SKIP") == unexpected


def test_the_table_is_printed_with_what_became_of_the_tests(run, pytester):
    bodies = {(31, "guarded"): "assert 0", (27, "good"): "pytest.skip('')"}
    cases = [(row, case) for row in ROWS for case in CASES]
    code = [
        f"@pytest.mark.hazard({row}, {case!r})\ndef test_{row}_{case}(): {bodies.get((row, case), 'pass')}"
        for row, case in cases
    ]
    pytester.makepyfile("\n".join(["import pytest", *code, "def test_of_no_row(): assert 0"]))
    ran = run("-m", "hazard")
    ran.assert_outcomes(passed=len(cases) - 2, failed=1, skipped=1)
    lines = ran.stdout.str().splitlines()
    rows = {int(line[:2]): line for line in lines if re.match(r"[ \d]\d .* good: ", line)}
    assert list(rows) == list(ROWS)
    assert "guarded: failed (1)" in rows[31]
    assert "good: skipped (1)" in rows[27]
    assert f"{len(ROWS) - 2} of {len(ROWS)} rows" in "".join(lines)


def test_a_row_that_is_not_there_is_refused(pytester):
    pytester.makepyfile('import pytest\n@pytest.mark.hazard(99, "good")\ndef test_a(): pass')
    pytester.runpytest_subprocess().stderr.fnmatch_lines(["*no such case in hazards.py: 99, 'good'*"])
