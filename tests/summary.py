"""What pytest prints at the end: the table of hazards, and skips that nobody expected; and the marker of the tests in
that table. conftest.py takes its hooks."""

import re
from collections import defaultdict

import pytest
from hazards import ROWS

EXPECTED_SKIPS = [  # what can't be tested in some place, or is nothing to test; anything else hides a gap
    r"no CUDA GPU",
    r"could not import 'composer\.algorithms'",  # which can't be imported beside a current PyTorch
    r"FSDP2 runs on the CPU from PyTorch 2\.7 on",
    r"this PyTorch's AveragedModel: Tensors of the same index must be on the same device and the same dtype",
    r"it copies averages into the model",
    r"it takes copies instead",
    r"its steps would not round away at that decay",
]


def pytest_addoption(parser):
    parser.addoption("--only-expected-skips", action="store_true", help="any other skip is a failure")


@pytest.hookimpl(tryfirst=True)  # before what -m leaves out is chosen
def pytest_collection_modifyitems(items):
    for item in items:
        if re.match(r"test_\d\d_", item.name):
            item.add_marker("hazard")


def pytest_terminal_summary(terminalreporter):
    _table(terminalreporter)
    if terminalreporter.config.option.only_expected_skips:
        for reason in unexpected(terminalreporter.stats.get("skipped", [])):
            terminalreporter.write_line(f"UNEXPECTED SKIP: {reason}", red=True)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.only_expected_skips and unexpected(reporter.stats.get("skipped", [])):
        session.exitstatus = session.exitstatus or 1


def unexpected(reports):
    """The reasons of skips that are not in the list, with the place of each."""
    skips = [report.longrepr for report in reports if isinstance(report.longrepr, tuple)]
    return [
        f"{path}:{line}: {reason}"
        for path, line, reason in skips
        if not any(re.match(each, reason.removeprefix("Skipped: ")) for each in EXPECTED_SKIPS)
    ]


def _table(reporter):
    outcomes = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            name = getattr(report, "nodeid", "").rpartition("::")[2].partition("[")[0]
            outcomes[name.removeprefix("test_")].append(outcome)
    if sum(bool(outcomes[name]) for _, *names in ROWS.values() for name in names) < len(ROWS):
        return  # some files only
    reporter.section("hazards")
    shown = 0
    for row, (title, *names) in ROWS.items():
        good, guarded = (_outcome(outcomes[name]) for name in names)
        shown += good.startswith("passed") and guarded.startswith("passed")
        reporter.write_line(f"{row:2} {title:30} good: {good:26} guarded: {guarded:26} {' '.join(names)}")
    reporter.write_line(f"{shown} of {len(ROWS)} rows have a good case and a guarded one that passed here")


def _outcome(outcomes):
    """The worst first, and what was skipped beside it."""
    found = [each for each in ("failed", "error", "passed", "skipped") if each in outcomes]
    return ", ".join(f"{each} ({outcomes.count(each)})" for each in found) or "not run"
