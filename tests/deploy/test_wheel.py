"""The wheel, built and installed into a separate environment outside the tree, generates and serves."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, free_port, start_server
from PIL import Image

from scripts.documented_commands import blocks
from stable_diffusion_server import __version__

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
UV = Path(sys.executable).with_name("uv")
ORDER = {"prompt": "a red circle on a blue background", "width": 256, "height": 256}


def ran(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command, in an environment that does not see this tree."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    # Package indexes can be configured in many ways, which the environment keeps; variables of this tree are removed.
    tools = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    tools.setdefault("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))
    done = subprocess.run(  # noqa: S603  # our own commands
        [str(part) for part in command],
        cwd=cwd,
        env={**(tools if command[0] == UV else kept), **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Build the wheel, install it, and run its console command in a separate folder."""
    if not UV.is_file():
        pytest.skip("uv, which `make` installs, is not beside this interpreter")
    folder = tmp_path_factory.mktemp("wheel")
    ran(UV, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert __version__ in wheel.name
    ran(UV, "venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    ran(UV, "pip", "install", "--quiet", "--python", folder / "env" / "bin" / "python", wheel, cwd=folder)
    work = folder / "work"
    work.mkdir()

    def run(*arguments: str, program: str = "stable-diffusion-server") -> str:
        return ran(folder / "env" / "bin" / program, *arguments, cwd=work)

    run.folder = work  # type: ignore[attr-defined]  # where it ran, for the tests
    return run


def test_the_version_is_written_in_one_place(installed: Callable[..., str]) -> None:
    """The package, its metadata and the command agree, and the imported package is the installed one."""
    code = "import importlib.metadata as m, stable_diffusion_server as s; "
    code += "print(m.version('stable-diffusion-server'), s.__version__, s.__file__)"
    metadata, attribute, file = installed("-c", code, program="python").split()
    assert installed("--version").split() == ["stable-diffusion-server", __version__]
    assert metadata == attribute == __version__
    assert not Path(file).is_relative_to(ROOT)
    assert re.findall(r'"(\d+\.\d+\.\d+)"', (ROOT / "pyproject.toml").read_text()) == []


def test_the_installed_command_draws_what_is_asked(installed: Callable[..., str]) -> None:
    """The embedded models are in the wheel: both work, and the image has the colours of its prompt."""
    assert "embedded-sdxl" in installed("models")
    for model in ("sdxl", "flux"):
        size = ("--width", "256", "--height", "256", "--seed", "3")
        installed("draw", ORDER["prompt"], "--out", f"{model}.png", "--model", model, *size)
        picture = Image.open(installed.folder / f"{model}.png").convert("RGB")  # type: ignore[attr-defined]  # as above
        red, green, blue = picture.getpixel((128, 128))
        assert (picture.size, red > 150 > green, blue < 150) == ((256, 256), True, True)
        red, green, blue = picture.getpixel((4, 4))
        assert blue > 150 > red


def test_single_files_find_their_configurations(installed: Callable[..., str]) -> None:
    """The configurations of checkpoints and CLIP's tokenizer are data of the package."""
    package = "stable_diffusion_server.pipelines.loading"
    code = f"from {package} import checkpoint_configs as c, tokenizer_files as t; "
    code += "print(sorted(c.base_configs('flux')), sorted(c.base_configs('sdxl')), len(t.clip_tokenizer()))"
    assert "'scheduler_schnell'" in (printed := installed("-c", code, program="python"))
    assert printed.split()[-1] == "49408"


def test_the_pages_commands_work_as_printed(installed: Callable[..., str]) -> None:
    """Those that docs/commands.md assigns to this file; the next test runs `serve`, which does not end."""
    printed = [block for block in blocks() if block.elsewhere == "tests/deploy/test_wheel.py"]
    lines = [shlex.split(line) for block in printed for line in block.text.splitlines()]
    assert {line[0] for line in lines} == {"stable-diffusion-server"}
    assert {line[1] for line in lines} == {"draw", "models", "check-storage", "serve"}
    for line in lines:
        if line[1] != "serve":
            assert "FAIL" not in installed(*line[1:])


def test_the_installed_command_serves(installed: Callable[..., str]) -> None:
    """`serve` generates, stores and returns stored images, in an environment without the UI."""
    port, folder = free_port(), installed.folder  # type: ignore[attr-defined]  # as above
    command = folder.parent / "env" / "bin" / "stable-diffusion-server"
    server = start_server(folder, port, str(command), "serve", PORT=str(port), PYTHONPATH="")
    try:
        answers = [httpx.post(f"{server.url}/create_and_upload_image", json=ORDER, timeout=120) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert [answer.json()["cached"] for answer in answers] == [False, True]
        assert httpx.get(answers[0].json()["path"]).headers["content-type"] == "image/webp"
        # The UI is an extra: where it is not installed, its page says so, and everything else works.
        assert httpx.get(f"{server.url}/ui/", follow_redirects=True).status_code in (200, 503)
    finally:
        server.stop()
