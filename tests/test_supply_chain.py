"""Dependencies and files.

No version with a known vulnerability, no file format that runs code, private state folders.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import RunningApp
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# The oldest releases without a known vulnerability that affects this server.
FLOORS = {
    "pillow": "13.0.0",  # CVE-2026-112403, -112398: heap overflow in the JPEG decoder
    "starlette": "0.49.1",  # CVE-2025-62727: a Range header of quadratic cost
    "python-multipart": "0.0.27",  # CVE-2026-42561: headers of parts without end
    "gradio": "6.20.0",  # CVE-2026-59806: redirects and fetches by file=
}
ASKED = {
    requirement.name: requirement
    for kind in ("server", "upscaler", "vision", "credentials", "agent", "ui", "tracing")
    for line in (ROOT / f"{kind}-requirements.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
    for requirement in [Requirement(line)]
}
PINNED = dict(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
SOURCES = [path for folder in ("stable_diffusion_server", "training") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_hole_is_asked_for_or_installed(name: str) -> None:
    """The requirement excludes every older release, and neither this environment nor the container image has one."""
    floor = Version(FLOORS[name])
    assert Version(version(name)) >= floor
    least = [Version(one.version) for one in ASKED[name].specifier if one.operator in (">=", "==")]
    assert least
    assert min(least) >= floor
    assert Version(PINNED[name]) >= floor


def test_everything_asked_for_has_a_floor() -> None:
    """So an old release is never installed for lack of a bound."""
    assert [
        name for name, one in ASKED.items() if not any(part.operator in (">=", "==") for part in one.specifier)
    ] == []


def test_every_requirement_is_locked_with_hashes() -> None:
    """requirements.lock pins one version of each requirement in requirements.txt, with its hashes."""
    text = (ROOT / "requirements.lock").read_text()
    locked = {name.lower().replace("_", "-"): version for name, version in PINNED.items()}
    for kind in ("server", "upscaler", "vision", "credentials", "agent", "ui"):
        for line in (ROOT / f"{kind}-requirements.txt").read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                asked = Requirement(line)
                assert locked[asked.name.lower().replace("_", "-")] in asked.specifier
    for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if "==" in entry.partition("\n")[0]:
            assert "--hash=sha256:" in entry, entry


def test_nothing_reads_files_that_may_run_code() -> None:
    """No pickle and nothing built on it: weights are safetensors, values are JSON."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "imp"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.partition(".")[0] in forbidden]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                allowed = {key.arg: ast.unparse(key.value) for key in node.keywords}
                if called in ("eval", "exec") or allowed.get("allow_pickle") == "True":
                    found.append((path.name, called))
                if called == "torch.load" and allowed.get("weights_only") != "True":
                    found.append((path.name, called))
                if "use_safetensors" in allowed and allowed["use_safetensors"] != "True":
                    found.append((path.name, called))
                if "trust_remote_code" in allowed and allowed["trust_remote_code"] != "False":
                    found.append((path.name, called))
    assert found == []


def test_what_is_kept_of_orders_is_for_this_user_alone(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """The folder of job store, spool, history and keys is private, whatever the umask; the bucket is not."""
    running_app = run_app()
    assert running_app.draw(prompt="a red square").status_code == 200
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0
    for path in (tmp_path / "data").rglob("*"):
        assert path.is_relative_to(tmp_path / "data")
        assert path.stat().st_mode & 0o002 == 0, path
    written = [path for path in (tmp_path / "bucket").rglob("*.webp") if path.is_file()]
    assert written
    assert all(path.stat().st_mode & 0o022 == 0 for path in written)
