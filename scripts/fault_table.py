"""Runs the tests of the catalogue of faults and writes what came of them: `python scripts/fault_table.py [ROW ...]`.

Without rows all are run; with rows theirs alone, and what `docs/robustness-tests.md` told of the others stays. The status is
pytest's. `--junit FILE` runs none: it takes the results from what `pytest --junitxml FILE` wrote of the whole suite.
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

from faults.catalogue import GROUPS, PAGE, ROWS, by_row, marked, told  # noqa: E402  # found only by the path above

_HEAD = """# Faults and bad inputs

What the server has to survive, and the tests that show it does. Written by `python scripts/fault_table.py`, which runs
them; a test checks that the rows and the tests are all here (`tests/faults/test_faults_page.py`). The numbers of cases
are pytest's. A row marked `gpu` has tests that need an accelerator and are skipped without one; one marked
"with `make test`" was not in the script's last run, and is run with the rest of the suite.
"""
# Of a test that no run of this script has had yet: what it comes to is for the suite to say.
UNRUN = "with `make test`"


class Recorder:
    """A plugin for pytest: keeps the tests that carry the mark and one of the rows, and counts their outcomes."""

    def __init__(self, rows: set[str]) -> None:
        self._rows = rows
        self.outcomes: dict[tuple[str, str], Counter[str]] = {}
        self._of: dict[str, list[tuple[str, str]]] = {}
        self.gpu: set[tuple[str, str]] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what carries no mark of the rows."""
        kept = []
        for item in items:
            rows = {str(row) for mark in item.iter_markers("fault") for row in mark.args}
            self._of[item.nodeid] = pairs = [(row, item.nodeid.partition("[")[0]) for row in rows & self._rows]
            if item.get_closest_marker("gpu"):
                self.gpu.update(pairs)
            kept += [item] if pairs else []
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test by its worst phase: once, when it was called, skipped before, or went wrong anywhere."""
        if report.when == "call" or report.outcome != "passed":
            for pair in self._of[report.nodeid]:
                self.outcomes.setdefault(pair, Counter())[report.outcome] += 1

    def read(self, report: Path) -> None:
        """Take the outcomes of a run from the file pytest wrote of it, for the tests that were collected."""
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # pytest's own file
            room = case.get("classname", "").replace(".", "/")
            nodeid = f"{room}.py::{case.get('name', '')}"
            kinds = {part.tag for part in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            for pair in self._of.get(nodeid, ()):
                self.outcomes.setdefault(pair, Counter())[outcome] += 1

    def result(self, row: str, test: str) -> str:
        """How many of a test's cases ended in which way; empty for one that was not run."""
        counted = self.outcomes.get((row, test), Counter())
        gpu = " (gpu)" if (row, test) in self.gpu else ""
        return ", ".join(f"{count} {outcome}{gpu}" for outcome, count in sorted(counted.items()))


def table(recorder: Recorder, before: dict[str, dict[str, str]]) -> str:
    """The catalogue as Markdown, each row with its tests and what came of them; `before` tells of those not run now."""
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


def main() -> None:
    """Run, write, and leave with pytest's status."""
    report = Path(sys.argv[2]).resolve() if sys.argv[1:2] == ["--junit"] else None
    asked = set() if report is not None else set(sys.argv[1:])
    if unknown := asked - set(ROWS):
        sys.exit(f"not in the catalogue: {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    recorder = Recorder(asked or set(ROWS))
    files = sorted({name.partition("::")[0] for name, rows in marked().items() if not asked or asked & set(rows)})
    only = ["--collect-only", "-q"] if report is not None else []
    status = pytest.main(["-p", "no:cacheprovider", *only, *files], plugins=[recorder])
    if report is not None:
        recorder.read(report)
    PAGE.write_text(_HEAD + table(recorder, told() if asked and PAGE.exists() else {}))
    sys.exit(status)


if __name__ == "__main__":
    main()
