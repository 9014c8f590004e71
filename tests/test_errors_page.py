"""docs/errors.md lists every problem type with its status, and every warning code, and no other."""

from __future__ import annotations

import re

from conftest import ROOT

from stable_diffusion_server.errors import ServerError

TEXT = (ROOT / "docs" / "errors.md").read_text()
PACKAGE = ROOT / "stable_diffusion_server"


def section(title: str) -> str:
    """The text below a heading, to the next one."""
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def problem_types() -> set[tuple[str, str, str]]:
    """Type, status and whether a retry can help, of every error class."""
    classes: list[type[ServerError]] = [ServerError]
    for each in classes:
        classes += each.__subclasses__()
    return {(each.kind, str(each.status), "yes" if each.retryable else "no") for each in classes}


def test_the_page_lists_exactly_the_problem_types_of_the_code() -> None:
    """With their status and whether a retry can help."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (yes|no) \|", section("Problem types"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == problem_types()


def test_the_page_lists_exactly_the_warning_codes_of_the_code() -> None:
    """Codes are literals where a RequestWarning is made."""
    codes = {
        code
        for path in PACKAGE.rglob("*.py")
        for code in re.findall(r'RequestWarning\(\s*"([\w-]+)"', path.read_text())
    }
    assert len(codes) > 10
    assert set(re.findall(r"^\| `([\w-]+)` \|", section("Warning codes"), re.MULTILINE)) == codes
