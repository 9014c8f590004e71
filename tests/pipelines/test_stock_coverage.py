"""Which stock classes a test draws, and which are checked by their signature alone: the counts of docs/models.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import test_any_class
import test_newer_classes
import test_stock_oracle
import test_stock_siblings
import tiny_stock
from stock_siblings import SIBLINGS
from tiny_newer import NEWER

from stable_diffusion_server.pipelines.stock_classes import TABLE, stock_class
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
# `test_stock_edits` draws it from a folder.
_ELSEWHERE = {"QwenImageEditPlusPipeline"}


def class_of(name: str, task: Task) -> str:
    """The class that draws a task for a class of diffusers that is drawn by its own call."""
    found = stock_class(name)
    assert found is not None, name
    return found.tasks[task]


def drawn() -> set[str]:
    """The classes whose own call a test compares with ours."""
    kinds = {case[2] for case in test_stock_oracle.CASES} | _ELSEWHERE
    for name, task in test_any_class.CASES:
        kinds.add(class_of(type(tiny_stock.build(name)).__name__, task))
    for name, task in (*test_stock_siblings.CASES, *test_newer_classes.CASES):
        kinds |= {name, class_of(name, task)}
    return kinds


def test_the_document_counts_the_classes_that_tests_draw() -> None:
    """And names each of those that no test draws; a new class of diffusers must be put into one of both lists."""
    listed = json.loads(TABLE.read_text())
    text = _DOCUMENT.read_text()
    counts = re.search(r"(\d+) classes are drawn, (\d+) of them in tests; (\d+) are refused", text)
    assert counts is not None
    seen = drawn() & listed["drawn"].keys()
    named = re.search(r"Checked by signature only: (.*?)\.\n", text, re.DOTALL)
    assert named is not None
    unseen = {name.removesuffix("Pipeline") for name in listed["drawn"].keys() - seen}
    assert {name.strip("` \n") for name in named[1].split(",")} == unseen
    assert [int(one) for one in counts.groups()] == [len(listed["drawn"]), len(seen), len(listed["refused"])]
    assert {*SIBLINGS, *NEWER} <= listed["drawn"].keys()
