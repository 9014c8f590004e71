"""docs/robustness-tests.md tells every row of the catalogue, with the tests that carry its number and no others."""

from __future__ import annotations

import re

import pytest
from faults.catalogue import ROWS, by_row, marked, told

# Some are skipped for root, who may read every file. The last kind of result claims nothing but that the suite runs it.
GOOD = re.compile(r"\d+ passed( \(gpu\))?(, \d+ skipped( \(gpu\))?)?|\d+ skipped( \(gpu\))?|with `make test`")


def test_the_catalogue_has_its_64_rows_and_those_of_later_attacks() -> None:
    """1 to 64, 40b after 40, and from 100 on the kinds that attacks from outside brought up."""
    first = [str(number) for number in range(1, 41)] + ["40b"] + [str(number) for number in range(41, 65)]
    assert list(ROWS)[: len(first)] == first
    later = [int(row) for row in list(ROWS)[len(first) :]]
    assert all(100 <= row < 200 for row in later)
    assert later


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test(row: str) -> None:
    """Nothing in the catalogue is a wish."""
    assert by_row(marked())[row]


def test_no_test_names_a_row_that_is_not_there() -> None:
    """A slip in a number would leave its row without its test in silence."""
    assert {row for rows in marked().values() for row in rows} <= set(ROWS)


def test_the_page_lists_exactly_the_tests_that_carry_the_mark() -> None:
    """What was added or renamed since is told by running scripts/fault_table.py again."""
    assert {row: list(tests) for row, tests in told().items()} == {
        row: tests for row, tests in by_row(marked()).items() if tests
    }


def test_the_page_tells_of_no_failure() -> None:
    """Every result is a number of passed cases, or one that was skipped where its device is missing."""
    results = {result for tests in told().values() for result in tests.values()}
    assert [result for result in results if not GOOD.fullmatch(result)] == []
