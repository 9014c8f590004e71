"""A LoRA's weights by parts over HTTP: our parameter, AUTOMATIC1111's tags, bounds on both sides, and hostile texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, lora_file

from stable_diffusion_server.parsing import read_lora_parts

SIZE = {"prompt": "a red square", "width": 64, "height": 64, "seed": 7}


@pytest.fixture
def running(run_app: Callable[..., RunningApp], tmp_path: Path) -> RunningApp:
    """An app with one LoRA, whose fake denoiser records its requests."""
    folder = tmp_path / "loras"
    folder.mkdir()
    lora_file(folder / "ink.safetensors")
    return run_app(FakeImageDenoiser(), lora_dir=folder)


@pytest.mark.parametrize(
    ("lora", "weight", "parts"),
    [
        ("ink", 1, ""),
        ("ink:0.5", 0.5, ""),
        ("ink:0.5:te=0.8", 0.5, "te=0.8"),
        ("ink:te=-8", 1, "te=-8"),
        ("ink:8:te=8:lbw=1/0/0.5", 8, "te=8:lbw=1,0,0.5"),
        ("ink:0.5:lbw=NONE", 0.5, "lbw=0"),
        ("ink:0.5:lbw=all", 0.5, ""),
        ("ink:0.5:lbw=1/1/1", 0.5, ""),
        ("ink:1:lbw=" + "/".join(["0.5"] * 100), 1, "lbw=" + ",".join(["0.5"] * 100)),
    ],
)
def test_our_parameter_has_weights_by_parts(running: RunningApp, lora: str, weight: float, parts: str) -> None:
    """Equal weights have one text and one key, whichever way they are written."""
    answer = running.client.get("/create_and_upload_image", params={**SIZE, "lora": lora})
    assert answer.status_code == 200, answer.text
    drawn = running.squares.finished[-1]
    assert drawn.loras == (("ink", weight),)
    assert drawn.lora_parts == ((("ink", parts),) if parts else ())
    plain = running.client.get("/create_and_upload_image", params={**SIZE, "lora": f"ink:{weight:g}"}).json()
    assert (plain["key"] == answer.json()["key"]) == (not parts)


@pytest.mark.parametrize(
    "lora",
    [
        *("ink:1:te=8.01", "ink:1:te=-9", "ink:1:te=", "ink:1:te=x", "ink:1:te=nan", "ink:1:te=1e3", "ink:1:lbw="),
        *("ink:1:lbw=1//1", "ink:1:lbw=9", "ink:1:lbw=MIDDLE", "ink:1:lbw=" + "/".join(["0"] * 101), "ink:1:x=1"),
        *("ink:1:te=0.5,ink:0.5", "ink:0.5,ink:1:lbw=0"),
        *("ink:1:te=1:te", "ink:1:te=1:unet=2", "ink:1:te=" + "1" * 1500, "ink:1:lbw=../../etc/passwd"),
    ],
)
def test_wrong_weights_are_refused_by_name(running: RunningApp, lora: str) -> None:
    """422, and nothing is drawn."""
    answer = running.client.get("/create_and_upload_image", params={**SIZE, "lora": lora})
    assert answer.status_code == 422, answer.text
    assert "lora" in answer.text
    assert not running.squares.finished


@pytest.mark.parametrize(
    ("tag", "weight", "parts", "told"),
    [
        ("<lora:ink:0.5>", 0.5, "", ""),
        ("<lora:ink:0.5:0.8>", 0.8, "te=0.5", ""),
        ("<lora:ink:te=0.5:unet=0.8>", 0.8, "te=0.5", ""),
        ("<lora:ink:unet=0.8>", 0.8, "te=1", ""),
        ("<lora:ink:te=0.8>", 0.8, "", ""),
        ("<lora:ink:0.5:lbw=1,0,0.5>", 0.5, "lbw=1,0,0.5", ""),
        ("<lora:ink:0.5:0.8:lbw=OUTD>", 0.8, "te=0.5:lbw=1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0", ""),
        ("<lora:ink:0.5:MIDD>", 0.5, "lbw=1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0", ""),
        ("<lora:ink:0.5:0.5:dyn=8>", 0.5, "", "'dyn=8' has no effect"),
        ("<lora:ink:0.5:lbw=WHAT>", 0.5, "", "'lbw=WHAT' is not understood"),
    ],
)
def test_tags_have_weights_by_parts(running: RunningApp, tag: str, weight: float, parts: str, told: str) -> None:
    """As AUTOMATIC1111 and its extension read them; the infotext draws the same again."""
    sent = {**SIZE, "prompt": f"a red square {tag}"}
    info: dict[str, Any] = json.loads(running.client.post("/sdapi/v1/txt2img", json=sent).json()["info"])
    drawn = running.squares.finished[-1]
    assert (drawn.loras, drawn.lora_parts) == ((("ink", weight),), (("ink", parts),) if parts else ())
    assert told in " ".join(info["not_honoured"])
    assert bool(told) == bool(info["not_honoured"])
    again = running.client.post("/sdapi/v1/txt2img", json={"infotext": info["infotexts"][0]})
    assert json.loads(again.json()["info"])["keys"] == info["keys"]


def test_long_texts_take_linear_time() -> None:
    """Refused by their length, before they are divided."""
    before = time.monotonic()
    for text in ("te=1:" * 200_000, "lbw=" + "1/" * 500_000, ":" * 1_000_000):
        with pytest.raises(ValueError, match="characters"):
            read_lora_parts(text)
    assert time.monotonic() - before < 5
