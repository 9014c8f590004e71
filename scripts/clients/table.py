"""Prints the table of docs/clients.md from the lines that the scripts beside it print.

`python table.py FILE…`, where the files hold the output of `with_*.py` and `with_*.mjs`.
"""

from __future__ import annotations

import sys
from pathlib import Path

COLUMNS = ("connect", "list", "draw", "edit", "progress", "cancel", "errors")
_NOT_APPLICABLE = "–"


def cell(results: list[str]) -> str:
    """One cell: `yes`, the first failure, or that the client has no such call."""
    failures = [result for result in results if result.startswith("no: ")]
    if failures:
        return failures[0].replace("|", "\\|") + (f" (and {len(failures) - 1} more)" if failures[1:] else "")
    return "yes" if "yes" in results else _NOT_APPLICABLE


def table(lines: list[str]) -> str:
    """A row per client, in the order of their first lines."""
    clients: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        if line.count("\t") == 2:
            client, column, result = line.split("\t")
            clients.setdefault(client, {}).setdefault(column, []).append(result)
    rows = [
        f"| {client} | {' | '.join(cell(cells.get(column, [])) for column in COLUMNS)} |"
        for client, cells in clients.items()
    ]
    return "\n".join([f"| client | {' | '.join(COLUMNS)} |", f"|{' --- |' * (len(COLUMNS) + 1)}", *rows, ""])


if __name__ == "__main__":
    sys.stdout.write(table([line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]))
