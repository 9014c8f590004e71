"""The commands of the README and of docs/ run as printed, and so do the example scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Server
from PIL import Image

from scripts.documented_commands import Block, blocks, table

HTTP_API = (ROOT / "docs" / "http-api.md").read_text()
JOBS = (ROOT / "docs" / "jobs.md").read_text()
HERE = [block for block in blocks() if not block.remark]


def shell(command: str, server: Server, folder: Path) -> str:
    """Run a command with this test's server in place of the page's, and this interpreter in place of `.venv`."""
    command = command.replace(".venv/bin/python flux_schnell.py", f"{sys.executable} {ROOT / 'flux_schnell.py'}")
    command = re.sub(r"^python -m ", f"{sys.executable} -m ", command, flags=re.MULTILINE)
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
    environment = {"PATH": os.environ["PATH"], "SERVER": server.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603  # commands from the pages
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def differences(sample: Any, answer: Any, at: str = "", *, shortened: bool = False) -> list[str]:
    """Paths of the fields that only one of two JSON values has. Timings of a stored image are left out."""
    if isinstance(sample, list) and isinstance(answer, list):
        return differences(sample[0], answer[0], f"{at}[0]") if sample and answer else []
    if not isinstance(sample, dict) or not isinstance(answer, dict) or at == ".timings":
        return []
    alone = sample.keys() - answer.keys() if shortened else sample.keys() ^ answer.keys()
    within = (differences(sample[name], answer[name], f"{at}.{name}") for name in sample.keys() & answer.keys())
    return sorted(f"{at}.{name}" for name in alone) + [path for paths in within for path in paths]


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
        assert {"path", "status", "made_by"} & set(json.loads(output))
    if block.sample:
        answer = json.loads(output[output.rindex("\n{") if "\n{" in output else 0 :])
        assert differences(json.loads(block.sample), answer, shortened=block.sample_is_shortened) == []
    for name in re.findall(r"""--out(?:put)? (\S+)|\.save\("(\S+)"\)|writeFile\("(\S+)",""", block.text):
        assert (tmp_path / "".join(name)).stat().st_size > 100


def test_most_json_answers_of_the_pages_are_compared_with_the_real_ones() -> None:
    """So the comparison within the test before does not pass without samples."""
    assert len([block for block in HERE if block.sample]) >= 10


def test_the_record_on_the_http_api_page_has_the_fields_of_a_real_one(server: Server) -> None:
    """`GET /files/…?record=1` of a new image."""
    shown = next(text for text in re.findall(r"```json\n(.*?)```", HTTP_API, re.DOTALL) if '"record":' in text)
    small = "prompt=a+red+square&width=64&height=64&save_path=record.webp"
    drawn = httpx.get(f"{server.url}/create_and_upload_image?{small}", timeout=60).json()
    record = httpx.get(f"{server.url}/files/{drawn['key']}?record=1").json()
    assert differences(json.loads(shown), record) == []


def test_the_events_on_the_jobs_page_have_the_fields_of_real_ones_in_their_order(server: Server) -> None:
    """Names before the colons, as a job sends them."""
    shown = re.search(r"A transcript.*?```text\n.*?retry: 2000\n\n(.*?)```", JOBS, re.DOTALL)
    assert shown
    small = "prompt=a+red+square&width=64&height=64&save_path=events.webp"
    started = httpx.get(f"{server.url}/create_and_upload_image?{small}", headers={"Prefer": "respond-async"})
    stream = httpx.get(f"{server.url}{started.headers['location']}/events", timeout=60).text
    orders = [
        [line.partition(":")[0] for line in event.splitlines()]
        for text in (shown[1], stream.partition("\n\n")[2])
        for event in text.strip().split("\n\n")
    ]
    assert len(orders) > 5
    assert [order for order in orders if order != orders[-1]] == []


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
