"""docs/security.md names only settings and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from stable_diffusion_server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.findall(r"`([A-Za-z0-9_]+)`", (ROOT / "docs" / "security.md").read_text())


def test_every_setting_of_the_page_exists() -> None:
    """Words in capitals are settings."""
    settings = {name.upper() for name in Settings.model_fields}
    assert [name for name in NAMED if re.fullmatch(r"[A-Z_]{4,}", name) and name not in settings] == []


def test_every_test_of_the_page_exists() -> None:
    """Words with three underscores or more are tests."""
    tests = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def test_([a-z0-9_]+)\(", path.read_text())
    }
    named = [name for name in NAMED if name.islower() and name.count("_") > 2 and not name.startswith("client_")]
    assert len(named) > 30
    assert [name for name in named if name not in tests] == []


def test_every_limit_among_the_settings_is_on_the_page() -> None:
    """A setting that begins with MAX_ or ends with a unit of size is a limit, and its edge is tested."""
    limits = {
        name.upper()
        for name in Settings.model_fields
        if name.startswith("max_") or name.endswith(("_bytes", "_limit", "_entries"))
    }
    assert limits - set(NAMED) - {"MAX_BATCH"} == set()
