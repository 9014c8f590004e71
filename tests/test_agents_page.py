"""AGENTS.md is short, and every file, package and function that it names exists."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

PACKAGE = ROOT / "stable_diffusion_server"
TEXT = (ROOT / "AGENTS.md").read_text()
# Paths and `path.py::Class.method`, as written between backticks.
PATHS = sorted(set(re.findall(r"`([\w./-]+(?:\.(?:py|md|toml)|/))`", TEXT)))
SYMBOLS = sorted(set(re.findall(r"`([\w./-]+\.py)::([\w.]+)`", TEXT)))


def definitions(source: str) -> set[str]:
    """The names of a module: functions, classes, constants, and methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            parts = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            names |= {node.name, *(f"{node.name}.{part.name}" for part in parts)}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_page_has_at_most_900_words() -> None:
    """Counted like `wc -w`, so that people read it to the end."""
    assert len(TEXT.split()) <= 900


@pytest.mark.parametrize("path", PATHS)
def test_a_named_path_exists(path: str) -> None:
    """Paths are relative to the package or to the repository."""
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize(("path", "name"), SYMBOLS, ids="::".join)
def test_a_named_function_exists(path: str, name: str) -> None:
    """A renamed or moved function must be renamed here too."""
    file = PACKAGE / path if (PACKAGE / path).exists() else ROOT / path
    assert name in definitions(file.read_text())


def test_the_four_questions_are_answered_by_file_and_function() -> None:
    """Full queue, LoRA, bucket down, header: each answer names at least one function."""
    section = TEXT.partition("## Where is …")[2].partition("\n## ")[0]
    answers = [answer for answer in section.split("\n- ") if "?" in answer]
    assert len(answers) == 4
    assert all(re.search(r"`[\w./]+\.py::\w+", answer) for answer in answers)


def test_every_package_and_every_loose_module_is_in_the_table() -> None:
    """A new package needs a row; so do modules beside the packages."""
    packages = {f"`{path.parent.name}/`" for path in PACKAGE.glob("*/__init__.py")}
    modules = {f"`{path.name}`" for path in PACKAGE.glob("*.py")} - {"`__init__.py`", "`__main__.py`"}
    table = TEXT.partition("## Packages")[2].partition("\n## ")[0]
    assert [name for name in sorted(packages | modules) if name not in table] == []
    folders = {f"`{path.name}/`" for path in ROOT.iterdir() if (path / "__init__.py").exists() and path != PACKAGE}
    assert [name for name in sorted(folders) if name not in table] == []


def test_claude_md_points_to_agents_md() -> None:
    """Assistants that look for CLAUDE.md read the same page."""
    assert "AGENTS.md" in (ROOT / "CLAUDE.md").read_text()
