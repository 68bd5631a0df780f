"""Prints the table of hazards and the unexpected skips at the end of a run.

conftest.py imports the hooks. They also work under pytest-xdist: only the process that collects the reports prints, and
a report carries the hazards of its test in its user_properties, since markers stay in the process that ran the test.
"""

import re
from collections import defaultdict

import pytest
from hazards import CASES, ROWS

EXPECTED_SKIPS = [  # tests that can't run everywhere, or have nothing to test somewhere; any other skip hides a gap
    r"no CUDA GPU",
    r"no NVRTC: (FUSED_EMA_CUDA=0|torch .* (is a ROCm build|was built without CUDA))",
    r"no cuobjdump and nvdisasm",
    r"no nvcc of NVRTC's version",
    r"no machine code for sm_\d+ by this NVRTC",
    r"could not import 'composer\.algorithms'",  # it can't be imported together with a current PyTorch
    r"no (torchtitan|lerobot)",  # test_trainers.py says why they don't install here as they are
    r"FSDP2 runs on the CPU from PyTorch 2\.7 on",
    r"this PyTorch's AveragedModel: Tensors of the same index must be on the same device and the same dtype",
    r"its steps would not round away at that decay",
    r"this PyTorch does not say where tensors lie in a file",
]


def pytest_addoption(parser):
    parser.addoption("--only-expected-skips", action="store_true", help="let any other skip fail the run")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("hazard"):
            row, case = marker.args
            if row not in ROWS or case not in CASES:
                raise pytest.UsageError(f"{item.nodeid}: no such case in hazards.py: {row}, {case!r}")
            item.user_properties.append(("hazard", (row, case)))


def pytest_terminal_summary(terminalreporter):
    _table(terminalreporter)
    if terminalreporter.config.option.only_expected_skips:
        for reason in unexpected(terminalreporter.stats.get("skipped", [])):
            terminalreporter.write_line(f"UNEXPECTED SKIP: {reason}", red=True)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a worker of pytest-xdist
    if reporter and session.config.option.only_expected_skips and unexpected(reporter.stats.get("skipped", [])):
        session.exitstatus = session.exitstatus or 1


def unexpected(reports):
    """The reason and the place of each skip that is not in the list."""
    skips = [report.longrepr for report in reports if isinstance(report.longrepr, tuple)]
    return [
        f"{path}:{line}: {reason}"
        for path, line, reason in skips
        if not any(re.match(each, reason.removeprefix("Skipped: ")) for each in EXPECTED_SKIPS)
    ]


def _table(reporter):
    outcomes, names = defaultdict(list), defaultdict(dict)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == "hazard":
                    row, case = value
                    outcomes[row, case].append(outcome)
                    names[row, case][report.nodeid.rpartition("::")[2].partition("[")[0]] = None
    if len(outcomes) < len(ROWS):
        return  # only some of the tests ran
    reporter.section("hazards")
    shown = 0
    for row, title in ROWS.items():
        good, guarded = (_outcome(outcomes[row, case]) for case in CASES)
        shown += good.startswith("passed") and guarded.startswith("passed")
        tests = " ".join(name.removeprefix("test_") for case in CASES for name in names[row, case])
        reporter.write_line(f"{row:2} {title:30} good: {good:26} guarded: {guarded:26} {tests}")
    reporter.write_line(f"{shown} of {len(ROWS)} rows have a good case and a guarded one that passed here")


def _outcome(outcomes):
    """The outcomes with their counts, the worst first."""
    found = [each for each in ("failed", "error", "passed", "skipped") if each in outcomes]
    return ", ".join(f"{each} ({outcomes.count(each)})" for each in found) or "not run"
