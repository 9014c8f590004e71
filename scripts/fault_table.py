"""Runs the tests of the fault catalogue and writes docs/robustness-tests.md: `python scripts/fault_table.py [ROW ...]`.

Without arguments it runs all rows; with row numbers it runs those and keeps the page's results of all other rows. The
exit status is pytest's. `--junit FILE` runs nothing and takes the results from a report that `pytest --junitxml FILE`
wrote of the whole suite. `--names` runs nothing either: it rewrites the list of tests and keeps the page's results by
test name.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from faults.catalogue import GROUPS, PAGE, ROWS, by_row, marked, reported  # noqa: E402  # found only by the path above

_HEAD = """# Robustness tests

The faults and bad inputs that the server must survive, and the tests that prove it. `python scripts/fault_table.py`
runs the tests and writes this page; `tests/faults/test_faults_page.py` checks that the page lists every row and every
test. The numbers count pytest's test cases. Results marked `(gpu)` come from tests that need an accelerator and are
skipped without one. "with `make test`" means that the last run of the script did not include the test; `make test`
runs it.
"""
# The result of a test that no run of this script has included yet.
UNRUN = "with `make test`"


class Recorder:
    """Pytest plugin: selects the tests marked with one of the rows and counts their outcomes."""

    def __init__(self, rows: set[str]) -> None:
        self._rows = rows
        self.outcomes: dict[tuple[str, str], Counter[str]] = {}
        self._of: dict[str, list[tuple[str, str]]] = {}
        self.gpu: set[tuple[str, str]] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect every test that is not marked with one of the rows."""
        selected = []
        for item in items:
            rows = {str(row) for mark in item.iter_markers("fault") for row in mark.args}
            self._of[item.nodeid] = pairs = [(row, item.nodeid.partition("[")[0]) for row in rows & self._rows]
            if item.get_closest_marker("gpu"):
                self.gpu.update(pairs)
            selected += [item] if pairs else []
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count each case once: by its call, or by the phase that skipped it or failed."""
        if report.when == "call" or report.outcome != "passed":
            for pair in self._of[report.nodeid]:
                self.outcomes.setdefault(pair, Counter())[report.outcome] += 1

    def read(self, report: Path) -> None:
        """Count the outcomes in a JUnit report, for the tests that were collected."""
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # pytest's own file
            module = case.get("classname", "").replace(".", "/")
            nodeid = f"{module}.py::{case.get('name', '')}"
            kinds = {part.tag for part in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            for pair in self._of.get(nodeid, ()):
                self.outcomes.setdefault(pair, Counter())[outcome] += 1

    def result(self, row: str, test: str) -> str:
        """The number of cases per outcome; empty if the test was not run."""
        counted = self.outcomes.get((row, test), Counter())
        gpu = " (gpu)" if (row, test) in self.gpu else ""
        return ", ".join(f"{count} {outcome}{gpu}" for outcome, count in sorted(counted.items()))


def table(recorder: Recorder, before: dict[str, dict[str, str]]) -> str:
    """The catalogue as Markdown; `before` holds the earlier results of tests that were not run now, by row and test."""
    tests, lines = by_row(marked()), []
    for group, rows in GROUPS.items():
        lines += ["", f"## {group}", "", "| row | what is done | test | result |", "| --- | --- | --- | --- |"]
        for row, text in rows.items():
            if not tests[row]:
                lines.append(f"| {row} | {text} | | no test yet |")
            for place, name in enumerate(tests[row]):
                result = recorder.result(row, name) or before.get(row, {}).get(name, UNRUN)
                first = (row, text) if place == 0 else ("", "")
                lines.append(f"| {' | '.join(first)} | `{name}` | {result} |")
    return "\n".join(lines) + "\n"


def by_name(results: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Results of an earlier page for today's tests: a test that moved to another file keeps its result."""
    earlier = {
        (row, test.rpartition("::")[2]): result for row, tests in results.items() for test, result in tests.items()
    }
    return {
        row: {test: earlier.get((row, test.rpartition("::")[2]), UNRUN) for test in tests}
        for row, tests in by_row(marked()).items()
    }


def main() -> None:
    """Run the tests, write the page and exit with pytest's status."""
    os.chdir(ROOT)
    if sys.argv[1:2] == ["--names"]:
        PAGE.write_text(_HEAD + table(Recorder(set()), by_name(reported())))
        return
    report = Path(sys.argv[2]).resolve() if sys.argv[1:2] == ["--junit"] else None
    asked = set() if report is not None else set(sys.argv[1:])
    if unknown := asked - set(ROWS):
        sys.exit(f"not in the catalogue: {', '.join(sorted(unknown))}")
    recorder = Recorder(asked or set(ROWS))
    files = sorted({name.partition("::")[0] for name, rows in marked().items() if not asked or asked & set(rows)})
    only = ["--collect-only", "-q"] if report is not None else []
    status = pytest.main(["-p", "no:cacheprovider", *only, *files], plugins=[recorder])
    if report is not None:
        recorder.read(report)
    PAGE.write_text(_HEAD + table(recorder, reported() if asked and PAGE.exists() else {}))
    sys.exit(status)


if __name__ == "__main__":
    main()
