"""The commands of the pages, and what runs each: `python -m scripts.documented_commands` prints docs/commands.md.

A block of bash, python or javascript is run by tests/test_documents.py as it is printed, unless a remark before it
says who else runs it (`<!-- run by tests/… -->`) or why none can (`<!-- not run: … -->`).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"(?:<!-- (?P<remark>[^\n]*) -->\n)?```(?P<language>bash|python|javascript)\n(?P<text>.*?)```", re.S
)
_NOT_RUN, _RUN_BY = "not run: ", "run by "
_SHOWN = 90


@dataclass(frozen=True)
class Block:
    """Commands as a page shows them."""

    page: str
    number: int
    language: str
    text: str
    remark: str

    @property
    def reason(self) -> str:
        """Why nothing runs it; empty where something does."""
        return self.remark.removeprefix(_NOT_RUN) if self.remark.startswith(_NOT_RUN) else ""

    @property
    def elsewhere(self) -> str:
        """The file that runs it, where that is not tests/test_documents.py."""
        return self.remark.removeprefix(_RUN_BY) if self.remark.startswith(_RUN_BY) else ""

    @property
    def name(self) -> str:
        """Where it is, for people and for test ids."""
        return f"{self.page}:{self.number}"


def blocks() -> list[Block]:
    """Every block of commands, page by page."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        Block(
            page.relative_to(ROOT).as_posix(), number, match["language"], match["text"].strip(), match["remark"] or ""
        )
        for page in pages
        for number, match in enumerate(_BLOCK.finditer(page.read_text()), 1)
    ]


def table() -> str:
    """docs/commands.md."""
    rows = []
    for block in blocks():
        first = next(line for line in block.text.splitlines() if line and not line.startswith(("from ", "import ")))
        shown = first if len(first) <= _SHOWN else first[: _SHOWN - 2] + " …"
        shown = shown.replace("|", "\\|")
        how = f"not run: {block.reason}" if block.reason else f"`{block.elsewhere or 'tests/test_documents.py'}`"
        rows.append(f"| {block.page} | `{shown}` | {how} |")
    return "\n".join(
        [
            "# The commands of these pages",
            "",
            "Every block of commands in the README and in these pages, and what runs it as it is printed. Made by",
            "`python -m scripts.documented_commands`; a test compares.",
            "",
            "| page | first line | run by |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(table())
