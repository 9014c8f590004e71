"""docs/robustness-tests.md lists every row of the catalogue, with exactly the tests that carry its number."""

from __future__ import annotations

import re

import pytest
from faults.catalogue import ROWS, by_row, marked, reported

# Root skips some, since it can read every file.
GOOD = re.compile(r"\d+ passed( \(gpu\))?(, \d+ skipped( \(gpu\))?)?|\d+ skipped( \(gpu\))?")


def test_the_catalogue_has_its_64_rows_and_those_of_later_attacks() -> None:
    """1 to 64, 40b after 40, and from 100 on the kinds that attacks from outside added."""
    first = [str(number) for number in range(1, 41)] + ["40b"] + [str(number) for number in range(41, 65)]
    assert list(ROWS)[: len(first)] == first
    later = [int(row) for row in list(ROWS)[len(first) :]]
    assert all(100 <= row < 200 for row in later)
    assert later


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test(row: str) -> None:
    """No row of the catalogue lacks a test."""
    assert by_row(marked())[row]


def test_no_test_names_a_row_that_is_not_there() -> None:
    """A wrong number would silently leave its row without a test."""
    assert {row for rows in marked().values() for row in rows} <= set(ROWS)


def test_the_page_lists_exactly_the_tests_that_carry_the_mark() -> None:
    """Run scripts/fault_table.py again after adding or renaming a test."""
    assert {row: list(tests) for row, tests in reported().items()} == {
        row: tests for row, tests in by_row(marked()).items() if tests
    }


def test_the_page_tells_of_no_failure() -> None:
    """Every result is a number of passed cases, or a skip where the device is missing."""
    results = {result for tests in reported().values() for result in tests.values()}
    assert [result for result in results if not GOOD.fullmatch(result)] == []
