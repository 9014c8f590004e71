"""The README's commands and the example scripts run as they are printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Server

README = (ROOT / "README.md").read_text()
BLOCKS = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
# Run by tests/test_server.py, since it does not end by itself.
ELSEWHERE = {"make run"}


def shell(command: str, server: Server, folder: Path) -> str:
    """Run a command with this test's server in the place of the README's, and this interpreter in that of `.venv`."""
    for name in ("http://localhost:8000", "http://127.0.0.1:8000"):
        command = command.replace(name, server.url)
    command = command.replace(".venv/bin/python flux_schnell.py", f"{sys.executable} {ROOT / 'flux_schnell.py'}")
    command = re.sub(r"^curl ", "curl --fail-with-body --silent --show-error ", command)
    environment = {"PATH": os.environ["PATH"], "SERVER": server.url}
    done = subprocess.run(  # noqa: S602  # the README's own lines, and a shell is what they are written for
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_has_commands() -> None:
    """So that the next test cannot pass for want of any."""
    assert len(BLOCKS) >= 5
    assert set(BLOCKS) >= ELSEWHERE


@pytest.mark.parametrize("command", [block for block in BLOCKS if block not in ELSEWHERE])
def test_a_command_of_the_readme_works_as_printed(server: Server, tmp_path: Path, command: str) -> None:
    """It ends well, and a curl that answers JSON answers a receipt or a state without a problem."""
    output = shell(command, server, tmp_path)
    if output.startswith("{"):
        assert {"path", "status"} & set(json.loads(output))
    for name in re.findall(r"--out(?:put)? (\S+)", command):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_an_example_script_works(server: Server, tmp_path: Path, script: Path) -> None:
    """The seed's calls, as files."""
    output = shell(str(script), server, tmp_path)
    assert "path" in json.loads(output) if output.startswith("{") else (tmp_path / output.strip()).is_file()


def test_the_readme_tells_the_truth_about_bounds_and_defaults() -> None:
    """Its table and the code agree."""
    from stable_diffusion_server.limits import Limits
    from stable_diffusion_server.orders import SEED_MAX
    from stable_diffusion_server.pipelines.catalog import MODELS

    limits = Limits()
    assert f"{limits.min_side} to {limits.max_side:,}" in README
    assert f"0 to {SEED_MAX:,}" in README
    assert f"1 to {limits.max_steps}." in README
    assert {facts.default_steps for facts in MODELS.values()} == {4}
    for scheduler in {name for facts in MODELS.values() for name in facts.schedulers}:
        assert f"`{scheduler}`" in README


def test_claude_md_points_to_agents_md_and_every_room_is_in_it() -> None:
    """The map names every module, so a newcomer finds the right room."""
    assert "AGENTS.md" in (ROOT / "CLAUDE.md").read_text()
    agents = (ROOT / "AGENTS.md").read_text()
    modules = {path.name for path in (ROOT / "stable_diffusion_server").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert [name for name in sorted(modules) if f"{name}`" not in agents and f"/{name}`" not in agents] == []
