"""The commands of the README and of docs/ run as printed, and so do the example scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Server
from PIL import Image

from scripts.documented_commands import Block, blocks, table

HTTP_API = (ROOT / "docs" / "http-api.md").read_text()
HERE = [block for block in blocks() if not block.remark]


def shell(command: str, server: Server, folder: Path) -> str:
    """Run a command with this test's server in place of the page's, and this interpreter in place of `.venv`."""
    command = command.replace(".venv/bin/python flux_schnell.py", f"{sys.executable} {ROOT / 'flux_schnell.py'}")
    command = re.sub(r"^curl ", "curl --fail-with-body --silent --show-error ", command, flags=re.MULTILINE)
    return ran(["/bin/sh", "-ec", at(server, command)], server, folder)


def at(server: Server, text: str) -> str:
    """With the URL of this test's server."""
    port = server.url.rpartition(":")[2]
    for name in ("http://localhost:8000", "http://127.0.0.1:8000"):
        text = text.replace(name, server.url)
    return text.replace('host="localhost"', 'host="127.0.0.1"').replace("port=8000", f"port={port}")


def ran(command: list[str], server: Server, folder: Path) -> str:
    """Output of a program that exited with 0."""
    environment = {"PATH": os.environ["PATH"], "SERVER": server.url}
    done = subprocess.run(  # noqa: S603  # commands from the pages
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_pages_have_commands_and_each_that_is_not_run_says_why() -> None:
    """So the next test cannot pass without commands, and nobody mistakes an untested command for a tested one."""
    assert len(HERE) >= 10
    remarked = [block for block in blocks() if block.remark]
    assert [block.name for block in remarked if not block.reason and not block.elsewhere] == []
    for block in remarked:
        assert not block.elsewhere or (ROOT / block.elsewhere).is_file(), block.name
        assert not block.reason or len(block.reason) > 20, block.name


def test_the_list_of_commands_is_that_of_the_pages() -> None:
    """docs/commands.md equals the output of `python -m scripts.documented_commands`."""
    assert (ROOT / "docs" / "commands.md").read_text() == table()


@pytest.mark.parametrize("block", HERE, ids=lambda block: block.name)
def test_a_command_of_the_pages_works_as_printed(server: Server, tmp_path: Path, block: Block) -> None:
    """It exits with 0, and a JSON response is not an error."""
    # The pages assume an image and a mask in the working directory.
    Image.new("RGB", (128, 128), "blue").save(tmp_path / "picture.png")
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    if block.language == "bash":
        output = shell(block.text, server, tmp_path)
    elif block.language == "python":
        output = ran([sys.executable, "-c", at(server, block.text)], server, tmp_path)
    else:
        node = shutil.which("node") or pytest.skip("there is no Node here")
        output = ran([node, "--input-type=module", "--eval", at(server, block.text)], server, tmp_path)
    if output.startswith("{"):
        assert {"path", "status"} & set(json.loads(output))
    for name in re.findall(r"""--out(?:put)? (\S+)|\.save\("(\S+)"\)|writeFile\("(\S+)",""", block.text):
        assert (tmp_path / "".join(name)).stat().st_size > 100


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_an_example_script_works(server: Server, tmp_path: Path, script: Path) -> None:
    """The seed's calls, as scripts."""
    output = shell(str(script), server, tmp_path)
    assert "path" in json.loads(output) if output.startswith("{") else (tmp_path / output.strip()).is_file()


def test_the_http_api_page_tells_the_truth_about_bounds_and_defaults() -> None:
    """Its table and the code agree."""
    from stable_diffusion_server.generation.limits import RequestLimits
    from stable_diffusion_server.pipelines.catalog import MODELS
    from stable_diffusion_server.types import SEED_MAX

    limits = RequestLimits()
    assert f"{limits.min_side} to {limits.max_side:,}" in HTTP_API
    assert f"0 to {SEED_MAX:,}" in HTTP_API
    assert f"1 to {limits.max_steps}." in HTTP_API
    assert {facts.default_steps for facts in MODELS.values()} == {4}
    for scheduler in {name for facts in MODELS.values() for name in facts.schedulers}:
        assert f"`{scheduler}`" in HTTP_API
