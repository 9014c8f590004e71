"""AUTOMATIC1111's options: kept for each caller within bounds, and applied to its images; names of checkpoints."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import RunningApp

from stable_diffusion_server.api.automatic1111.checkpoint_names import model_named, title_of
from stable_diffusion_server.api.automatic1111.options import CallerOptions
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.types import Caller

OPTIONS = "/sdapi/v1/options"
HOUSE = DialectContext(RequestLimits(), MODELS, "sdxl", {"DreamShaper": "flux"}, 4, 67_108_864)
SDXL, FLUX = MODELS["sdxl"], MODELS["flux"]


def set_options(running_app: RunningApp, key: str = "", **options: Any) -> httpx.Response:
    return running_app.client.post(OPTIONS, json=options, headers={"X-API-Key": key} if key else {})


def options_of(running_app: RunningApp, key: str = "") -> dict[str, Any]:
    body: dict[str, Any] = running_app.client.get(OPTIONS, headers={"X-API-Key": key} if key else {}).json()
    return body


def drawn(running_app: RunningApp, **changes: Any) -> tuple[bytes, dict[str, Any]]:
    """File and info of one image."""
    asked = {"prompt": "a red square", "width": 64, "height": 64, **changes}
    answer = running_app.client.post("/sdapi/v1/txt2img", json=asked)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["images"][0]), json.loads(answer.json()["info"])


def test_what_is_set_is_answered_back(running_app: RunningApp) -> None:
    """Numbers, texts, booleans and lists, known or not; AUTOMATIC1111's own test flips `send_seed`."""
    before = options_of(running_app)
    given = {"send_seed": False, "CLIP_stop_at_last_layers": 2, "sd_vae": "a.pt", "mine": ["a", 1], "eta_ddim": 0.5}
    assert set_options(running_app, **given).json() is None
    after = options_of(running_app)
    assert {name: after[name] for name in given} == given
    assert set_options(running_app, **before, mine=None, eta_ddim=None).status_code == 200
    assert options_of(running_app) == before


def test_all_options_may_be_sent_back(running_app: RunningApp) -> None:
    """open-webui reads all, changes the model, and sends all; the model is in the answer under its title."""
    options = {**options_of(running_app), "sd_model_checkpoint": "flux"}
    for _ in range(2):
        assert set_options(running_app, **options).status_code == 200
        options = options_of(running_app)
    assert options["sd_model_checkpoint"] == title_of(FLUX)
    assert options["sd_checkpoint_hash"] == FLUX.weights


def test_the_file_format_holds_for_later_images(running_app: RunningApp) -> None:
    """`samples_format` in any case; `override_settings` override it for one request."""
    assert drawn(running_app)[0].startswith(b"\x89PNG")
    for name, magic in (("jpg", b"\xff\xd8"), ("JPEG", b"\xff\xd8"), ("webp", b"RIFF")):
        assert set_options(running_app, samples_format=name).status_code == 200
        assert drawn(running_app)[0].startswith(magic)
    assert drawn(running_app, override_settings={"samples_format": "png"})[0].startswith(b"\x89PNG")
    assert drawn(running_app, override_settings={"samples_format": None})[0].startswith(b"RIFF")


def test_an_option_that_would_change_the_image_is_reported(running_app: RunningApp) -> None:
    """Not a neutral one, and not one that concerns a user interface."""
    set_options(running_app, CLIP_stop_at_last_layers=2, sd_vae="None", send_seed=False, dont_fix_second_order=True)
    not_honoured = " ".join(drawn(running_app)[1]["not_honoured"])
    assert "CLIP_stop_at_last_layers" in not_honoured
    assert "sd_vae" not in not_honoured
    assert "send_seed" not in not_honoured


REFUSED: list[dict[str, Any]] = [
    {"sd_model_checkpoint": "nosuch"},
    {"sd_model_checkpoint": 7},
    {"sd_model_checkpoint": "a" * 5000},
    {"samples_format": "gif"},
    {"samples_format": ["png"]},
    {"a option": 1},
    {"": 1},
    {"a" * 101: 1},
    {"größe": 1},
    {"mine": {"a": 1}},
    {"mine": [["a"]]},
    {"mine": "a" * 1001},
    {"mine": [1] * 101},
]


def test_a_refused_option_changes_nothing(running_app: RunningApp) -> None:
    """Neither the model nor any other option, also not the ones beside it; later images come from the same model."""
    set_options(running_app, sd_model_checkpoint="flux", samples_format="jpg", mine=1)
    before = options_of(running_app)
    for refused in REFUSED:
        answer = set_options(running_app, **{"send_seed": False, **refused, "jpeg_quality": 5})
        assert answer.status_code in (400, 422), refused
        assert options_of(running_app) == before, refused
    assert drawn(running_app)[1]["sd_model_name"] == "flux"


def test_every_refused_option_is_named(running_app: RunningApp) -> None:
    """All faults of a body at once."""
    answer = set_options(running_app, samples_format="gif", mine={}, sd_model_checkpoint=1)
    assert {fault["field"] for fault in answer.json()["errors"]} == {"samples_format", "mine", "sd_model_checkpoint"}


def test_no_name_keeps_the_model(running_app: RunningApp) -> None:
    """An omitted name, and an empty text, as clients send them for an empty menu."""
    set_options(running_app, sd_model_checkpoint="flux")
    for empty in (None, "", "  "):
        assert set_options(running_app, sd_model_checkpoint=empty).status_code == 200
        assert options_of(running_app)["sd_model_checkpoint"] == title_of(FLUX)


def test_options_are_the_callers_own(run_app: Callable[..., RunningApp]) -> None:
    """Another key sees and uses none of them."""
    running_app = run_app(api_keys="ann:a, bob:b")
    before = options_of(running_app, "b")
    set_options(running_app, "a", sd_model_checkpoint="flux", samples_format="jpg", mine=1)
    assert options_of(running_app, "b") == before
    assert options_of(running_app, "a")["mine"] == 1


def test_the_memory_of_options_is_bounded() -> None:
    """Eighty options and 8 KiB for a caller, and a thousand callers of each kind; the oldest is forgotten."""
    kept, caller = CallerOptions(), Caller("ann")
    with pytest.raises(InvalidInput, match="80 options"):
        kept.update(caller, {f"a{number}": 1 for number in range(90)}, HOUSE)
    assert kept.of(caller) == {}
    for number in range(4):
        kept.update(caller, {f"a{number}": "é" * 1000}, HOUSE)
    with pytest.raises(InvalidInput, match="8192 bytes"):
        kept.update(caller, {"more": "é" * 1000}, HOUSE)
    assert len(dumps(dict(kept.of(caller))).encode()) <= 8192
    for number in range(3000):
        kept.update(Caller(f"key{number}"), {"a": number}, HOUSE)
        kept.update(Caller(anonymous=True, address=f"10.0.{number // 256}.{number % 256}"), {"a": number}, HOUSE)
    known = [number for number in range(3000) if kept.of(Caller(f"key{number}"))]
    assert known == list(range(2000, 3000))


NAMES = [
    *("sdxl", "SDXL", " sdxl ", "sdxl.safetensors", "SDXL.SAFETENSORS", "sdxl.ckpt", "sdxl.gguf"),
    *(r"folder\sdxl.safetensors [31e35c80fc]", "a/b/sdxl.safetensors [31e35c80fc]", "sdxl [31e35c80fc]"),
    *(r"C:\models\Stable-diffusion\sdxl.safetensors", "/models/sdxl.safetensors", "sdxl.safetensors []"),
    *(title_of(SDXL), title_of(SDXL).upper(), SDXL.folder, f"{SDXL.folder}.safetensors", SDXL.revision),
    *(SDXL.weights, SDXL.weights[:10], SDXL.weights[:8].upper(), f"unknown.safetensors [{SDXL.weights[:10]}]"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_known_by_its_usual_names(name: str) -> None:
    """With folders, endings and hashes, as clients saved them."""
    assert model_named(name, HOUSE) == "sdxl"


@pytest.mark.parametrize("name", ["DreamShaper", "dreamshaper.safetensors [879db523c3]", r"SD\DreamShaper.safetensors"])
def test_an_alias_is_known_in_the_same_way(name: str) -> None:
    """MODEL_ALIASES, without regard to case."""
    assert model_named(name, HOUSE) == "flux"


@pytest.mark.parametrize(
    "name", ["nosuch", "sdxl2.safetensors", "sdxl.safetensors.exe", "[", "]", "[]", "/", "\\", "x]"]
)
def test_another_name_is_refused(name: str) -> None:
    """And names the models that there are."""
    with pytest.raises(InvalidInput, match="sdxl"):
        model_named(name, HOUSE)


def test_a_saved_preset_draws(running_app: RunningApp) -> None:
    """In `override_settings` of a request and in the options."""
    for name in (r"folder\flux.safetensors [abcdef0123]", "flux.safetensors"):
        assert drawn(running_app, override_settings={"sd_model_checkpoint": name})[1]["sd_model_name"] == "flux"
        assert set_options(running_app, sd_model_checkpoint=name).status_code == 200
        assert drawn(running_app)[1]["sd_model_name"] == "flux"
