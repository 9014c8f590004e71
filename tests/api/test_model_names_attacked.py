"""Model names made to read files: every dialect looks them up in the library, and no path is ever opened or told."""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import RunningApp
from model_files import FILES, write_safetensors
from python_steps import steps_of

from stable_diffusion_server.pipelines import find_owned_models, known_names
from stable_diffusion_server.pipelines.model_spec import ModelTable

pytestmark = pytest.mark.slow

HIDDEN = "hidden-weights"
SIZE = {"prompt": "a red square", "width": 64, "height": 64}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model beside MODELS_DIR, which has a link to it."""
    write_safetensors(tmp_path / "outside" / f"{HIDDEN}.safetensors", FILES["sdxl"])
    (tmp_path / "weights" / "checkpoints").mkdir(parents=True)
    (tmp_path / "weights" / "checkpoints" / "mine.safetensors").symlink_to(
        tmp_path / "outside" / f"{HIDDEN}.safetensors"
    )
    return tmp_path / "outside"


@pytest.fixture
def app(run_app: Callable[..., RunningApp], outside: Path) -> RunningApp:
    """A server with that folder."""
    return run_app(models_dir=outside.parent / "weights")


@pytest.fixture
def touched(app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are opened, listed or looked at once the server runs."""
    paths: list[str] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any = ".", *given: Any, **more: Any) -> Any:
            paths.append(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "")
            return call(path, *given, **more)

        return wrapper

    for module, name in (
        *((os, name) for name in ("stat", "lstat", "open", "scandir", "listdir", "readlink", "access")),
        (builtins, "open"),
        (io, "open"),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return paths


def hostile(outside: Path) -> list[str]:
    """Names of files that are there and that are not, in many spellings. No name is of a model."""
    there, gone = f"{outside}/{HIDDEN}.safetensors", f"{outside}/absent-weights.safetensors"
    return [
        *(there, gone, there.removesuffix(".safetensors"), gone.removesuffix(".safetensors")),
        *(f"../outside/{HIDDEN}", "../outside/absent-weights", f"checkpoints/../../outside/{HIDDEN}"),
        *(f"..\\outside\\{HIDDEN}", f"..%2foutside%2f{HIDDEN}", f"%2e%2e/outside/{HIDDEN}", f"%252e%252e/{HIDDEN}"),
        *(f"file://{there}", f"file:{there}", "C:\\models\\x", "\\\\host\\share\\x", "~/x", "$HOME/x", "/dev/zero"),
        *(f"．．／outside／{HIDDEN}", f"․․/outside/{HIDDEN}", f"../outside∕{HIDDEN}", HIDDEN, "mine/../mine/x"),
        *(f"mine\0{HIDDEN}", "mine\n../x", "\u202emine\u202c/..", "." * 200, "/x" * 90, "mine" + "\u0301" * 150),
    ]


def asked(running_app: RunningApp, name: str) -> Iterator[tuple[str, httpx.Response]]:
    """The answers of all dialects to a model name."""
    client = running_app.client
    path, openai = "/create_and_upload_image", {"prompt": "a red square", "size": "64x64", "model": name}
    yield "query", client.get(path, params={**SIZE, "model": name})
    yield "form", client.post(path, data={**SIZE, "model": name})
    yield "json", client.post(path, json={**SIZE, "model": name})
    yield "openai", client.post("/v1/images/generations", json=openai)
    yield "openai path", client.get(f"/v1/models/{quote(name, safe='')}")
    yield "load", client.post(f"/v1/models/{quote(name, safe='')}/load")
    option = {"sd_model_checkpoint": name}
    yield "option", client.post("/sdapi/v1/options", json=option)
    yield "override", client.post("/sdapi/v1/txt2img", json={**SIZE, "steps": 1, "override_settings": option})


def test_no_name_opens_a_path_or_tells_whether_it_is_there(app: RunningApp, outside: Path, touched: list[str]) -> None:
    """Each is refused by name in each dialect, and the answers on a file and on none differ by the name only."""
    told: dict[str, dict[str, str]] = {}
    for name in hostile(outside):
        for dialect, answer in asked(app, name):
            assert 400 <= answer.status_code <= 422, (dialect, name, answer.text)
            told.setdefault(dialect, {})[name] = f"{answer.status_code} {json.dumps(answer.json().get('detail'))}"
            # A path is in an answer only where the caller wrote it.
            assert str(outside) not in answer.text or str(outside) in name, (dialect, name)
    assert not app.squares.finished
    assert not [path for path in touched if HIDDEN in path or "outside" in path or "absent" in path]
    for answers in told.values():
        pairs = [(name, name.replace(HIDDEN, "absent-weights")) for name in answers]
        for there, gone in ((one, other) for one, other in pairs if one != other and other in answers):
            assert answers[there].replace(HIDDEN, "absent-weights") == answers[gone]


def test_the_link_has_its_own_name_only(app: RunningApp, outside: Path) -> None:
    """Lists and readiness name the link; where it leads to is said nowhere."""
    app.client.post("/sdapi/v1/refresh-checkpoints")
    pages = ("/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/options", "/config", "/readyz", "/openapi.json")
    texts = {page: app.client.get(page).text for page in pages}
    assert "mine" in texts["/v1/models"]
    assert not [page for page, text in texts.items() if HIDDEN in text or str(outside) in text]


def test_an_infotext_that_names_a_path_draws_with_the_default(app: RunningApp, outside: Path) -> None:
    """AUTOMATIC1111 ignores a model that it has not; the sentence says so, and the model that draws is told."""
    text = f"a red square\nSteps: 1, Size: 64x64, Model: ../outside/{HIDDEN}"
    answer = app.client.post("/sdapi/v1/txt2img", json={**SIZE, "steps": 1, "infotext": text})
    assert answer.status_code == 200
    assert json.loads(answer.json()["info"])["sd_model_name"] == "mine"


def test_a_spec_names_parts_of_the_library_only(outside: Path) -> None:
    """The owner's file too: a path is no name, even one that leads to a file within MODELS_DIR."""
    weights = outside.parent / "weights"
    write_safetensors(weights / "checkpoints" / "real vae.safetensors", FILES["vae-sd"])
    for name in (f"../outside/{HIDDEN}", "./real vae", str(weights / "checkpoints" / "real vae.safetensors")):
        (weights / "checkpoints" / "mine.toml").write_text(f"vae = {json.dumps(name)}")
        owned = find_owned_models(weights, (weights,))
        assert "which is not in MODELS_DIR" in owned.refused["mine"]
    (weights / "checkpoints" / "mine.toml").write_text('vae = "real vae"')
    assert "mine" in find_owned_models(weights, (weights,)).specs


@pytest.mark.parametrize("length", [100, 32_000])
def test_the_search_for_the_nearest_names_does_not_grow_with_the_name(length: int) -> None:
    """500 names: the steps are those of 100 characters, whatever was sent; and so is the answer's length."""
    names = [f"folder/model number {number} of the merge" for number in range(500)]
    steps = {size: steps_of(partial(known_names, "model number 7" * size, names)) for size in (7, length)}
    assert steps[length] <= steps[7] * 1.2
    assert len(known_names("x" * length, names)) < 300
    table = ModelTable(dict.fromkeys(names, 0))
    assert ("x" * length) not in table


def test_a_very_long_name_is_refused_before_it_is_searched_for(app: RunningApp) -> None:
    """32,000 characters: by the bound of the parameter, with an answer that does not repeat them."""
    for dialect, answer in asked(app, "model " * 5334):
        assert 400 <= answer.status_code <= 431, dialect
        assert len(answer.text) < 2000, dialect
    assert not app.squares.finished
