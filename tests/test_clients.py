"""Scripts of scripts/clients/ whose client is installed here find no failure; docs/clients.md has the others."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, Server

from scripts.clients.table import COLUMNS, cell, table

SCRIPTS = ROOT / "scripts" / "clients"
PAGE = (ROOT / "docs" / "clients.md").read_text()


@pytest.mark.parametrize("client", ["openai", "webuiapi", "replicate", "mcp"])
def test_a_client_does_all_that_the_table_says(server: Server, client: str) -> None:
    """Unmodified, against the server as `make run` starts it: connects, lists, draws, edits, follows, cancels, errs."""
    done = subprocess.run(  # noqa: S603  # our own script
        [sys.executable, f"with_{client}.py"],
        cwd=SCRIPTS,
        env={"PATH": os.environ["PATH"], "SERVER": server.url},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.count("\t") == 2]
    assert [line for line in lines if "\tno: " in line] == []
    assert {line.split("\t")[1] for line in lines} == set(COLUMNS), done.stderr


def test_a_cell_is_yes_only_if_nothing_of_its_column_failed() -> None:
    """The first failure is shown, and how many there are more; a column without a call is not applicable."""
    assert cell(["yes", "yes"]) == "yes"
    assert cell(["yes", "no: A: x|y", "no: B: z"]) == "no: A: x\\|y (and 1 more)"
    assert cell([]) == cell(["–"]) == "–"
    assert table(["a 1\tdraw\tyes", "a 1\tedit\tno: E: e", "noise"]).splitlines()[2:] == [
        "| a 1 | – | – | yes | no: E: e | – | – | – |"
    ]


def test_the_page_of_clients_has_a_row_per_script() -> None:
    """Each script's client is in the table, and every cell is yes, a failure or not applicable."""
    rows = [line[2:-2].split(" | ") for line in PAGE.partition("| --- |")[2].splitlines() if line.startswith("| ")]
    assert rows
    assert {len(row) for row in rows} == {len(COLUMNS) + 1}
    assert {cell for row in rows for cell in row[1:] if not re.match(r"yes$|–$|no: ", cell)} == set()
    names = " ".join(row[0] for row in rows).lower()
    for script in SCRIPTS.glob("with_*"):
        client = script.stem.removeprefix("with_").removesuffix("_page").replace("ai_sdk", "@ai-sdk")
        assert client in names, script.name
