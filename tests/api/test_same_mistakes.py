"""The same invalid request gets the same status on every route and in every dialect, and never a 5xx."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of

PICTURE = file_of(disc(96, 80))
TEXT = base64.b64encode(PICTURE).decode()
GOOD: dict[str, Any] = {"prompt": "a red square", "width": 96, "height": 80}
NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}

# Parameters in neutral names, and the expected status.
MISTAKES: dict[str, tuple[dict[str, Any], int]] = {
    "no prompt": ({"prompt": None}, 422),
    "an empty prompt": ({"prompt": ""}, 422),
    "a blank prompt": ({"prompt": " \t\n"}, 422),
    "a prompt that is a list": ({"prompt": ["a"]}, 422),
    "a prompt over the limit": ({"prompt": "x" * 32_001}, 422),
    "a prompt of 100,000 characters": ({"prompt": "x" * 100_000}, 422),
    "a lone surrogate": ({"prompt": "\ud800"}, 422),
    "width 0": ({"width": 0}, 422),
    "width -64": ({"width": -64}, 422),
    "width 1": ({"width": 1}, 422),
    "width over the limit": ({"width": 2049}, 422),
    "width 1e9": ({"width": 10**9}, 422),
    "half a pixel": ({"width": 99.5}, 422),
    "width 1024x": ({"width": "1024x"}, 422),
    "width nan": ({"width": "nan"}, 422),
    "0 steps": ({"steps": 0}, 422),
    "151 steps": ({"steps": 151}, 422),
    "1e9 steps": ({"steps": 10**9}, 422),
    "guidance -1": ({"guidance": -1}, 422),
    "guidance 31": ({"guidance": 31}, 422),
    "guidance nan": ({"guidance": "nan"}, 422),
    "guidance inf": ({"guidance": "inf"}, 422),
    "seed 2^64": ({"seed": 2**64}, 422),
    "seed 2^70": ({"seed": 2**70}, 422),
    "seed abc": ({"seed": "abc"}, 422),
    "seed -2": ({"seed": -2}, 422),
    "strength 1.1": ({"strength": 1.1}, 422),
    "strength -0.1": ({"strength": -0.1}, 422),
    "a strength that leaves no step": ({"strength": 0.01, "steps": 2, "model": "sdxl"}, 422),
    "format gif": ({"format": "gif"}, 422),
    "format svg": ({"format": "svg"}, 422),
    "an unknown model": ({"model": "gpt-7"}, 422),
    "a path as model": ({"model": "/etc/passwd"}, 422),
    "a climbing model": ({"model": "../../models"}, 422),
    "an unknown scheduler": ({"scheduler": "warp"}, 422),
    "an adapter by a path": ({"lora": "../x"}, 422),
    "an adapter that is not there": ({"lora": "nothing"}, 422),
    "no pictures": ({"n": 0}, 422),
    "11 pictures": ({"n": 11}, 422),
    "a climbing name": ({"save_path": "../../main.py"}, 422),
    "a name with a line break": ({"save_path": "a\r\nb.webp"}, 422),
    "an unknown parameter": ({"widht": 64}, 422),
}

# AUTOMATIC1111 takes these, and so does its dialect; `info` says what was done instead.
NO_MISTAKES_OF_WEBUIS = {
    *("no prompt", "an empty prompt", "a blank prompt", "an unknown scheduler", "an adapter that is not there"),
    *("an adapter by a path", "seed 2^64", "seed 2^70", "seed -2", "a strength that leaves no step"),
}


def ours(asked: dict[str, Any], *, picture: bool = False) -> dict[str, Any] | None:
    if "n" in asked or ("strength" in asked and not picture):
        return None
    if picture:
        if {"width", "height"} & {name for name in asked if asked[name] != GOOD.get(name)}:
            return None
        asked = {name: value for name, value in asked.items() if name not in ("width", "height")}
    return {NAMES.get(name, name): value for name, value in asked.items() if value is not None}


def openais(asked: dict[str, Any], *, picture: bool = False) -> dict[str, Any] | None:
    if "strength" in asked and not picture:
        return None
    asked = dict(asked)
    size = f"{asked.pop('width')}x{asked.pop('height')}"
    named = {"format": "output_format", **NAMES}
    return {"size": size, **{named.get(name, name): value for name, value in asked.items() if value is not None}}


def webuis(asked: dict[str, Any], *, picture: bool = False) -> dict[str, Any] | None:
    if {"save_path", "widht"} & set(asked) or ("strength" in asked and not picture):
        return None  # this dialect generates names itself, and reports unknown ones in `info`
    asked = {name: value for name, value in asked.items() if value is not None}
    if "lora" in asked:
        asked["prompt"] = f"a red square <lora:{asked.pop('lora')}:1>"
    override = {"sd_model_checkpoint": asked.pop("model", None), "samples_format": asked.pop("format", None)}
    named = {"guidance": "cfg_scale", "scheduler": "sampler_name", "strength": "denoising_strength", "n": "batch_size"}
    asked = {named.get(name, name): value for name, value in asked.items()}
    return {**asked, "override_settings": {name: value for name, value in override.items() if value is not None}}


def by_query(running_app: RunningApp, path: str, asked: dict[str, Any]) -> httpx.Response:
    return running_app.client.get(path, params={k: v for k, v in asked.items() if _fits(v)})


def by_json(running_app: RunningApp, path: str, asked: dict[str, Any]) -> httpx.Response:
    return running_app.client.post(path, content=json.dumps(asked), headers={"content-type": "application/json"})


def by_files(running_app: RunningApp, path: str, asked: dict[str, Any], *names: str) -> httpx.Response:
    parts: list[tuple[str, Any]] = [(name, (None, str(value))) for name, value in asked.items() if _fits(value)]
    return running_app.client.post(path, files=[*parts, *((name, ("a.png", PICTURE)) for name in names)])


def _fits(value: object) -> bool:
    """Whether a value can be written into a query or a form at all."""
    return not isinstance(value, list) and (not isinstance(value, str) or (value.isascii() and len(value) < 50_000))


Door = tuple[Callable[..., dict[str, Any] | None], bool, Callable[[RunningApp, dict[str, Any]], httpx.Response]]
STYLE, INPAINT = "/style_transfer_and_upload_image", "/inpaint_and_upload_image"
ROUTES: dict[str, Door] = {
    "GET create": (ours, False, lambda running_app, asked: by_query(running_app, "/create_and_upload_image", asked)),
    "POST create": (ours, False, lambda running_app, asked: by_json(running_app, "/create_and_upload_image", asked)),
    "GET make": (ours, False, lambda running_app, asked: by_query(running_app, "/make_image", asked)),
    "POST style": (ours, True, lambda running_app, asked: by_files(running_app, STYLE, asked, "image_file")),
    "POST style bytes": (
        ours,
        True,
        lambda h, asked: by_files(h, STYLE.replace("_and", "_bytes_and"), asked, "image_file"),
    ),
    "POST inpaint": (
        ours,
        True,
        lambda running_app, asked: by_files(running_app, INPAINT, asked, "image_file", "mask_file"),
    ),
    "OpenAI generations": (
        openais,
        False,
        lambda running_app, asked: by_json(running_app, "/v1/images/generations", asked),
    ),
    "OpenAI edits": (
        openais,
        True,
        lambda running_app, asked: by_files(running_app, "/v1/images/edits", asked, "image"),
    ),
    "txt2img": (webuis, False, lambda running_app, asked: by_json(running_app, "/sdapi/v1/txt2img", asked)),
    "img2img": (webuis, True, lambda h, asked: by_json(h, "/sdapi/v1/img2img", {**asked, "init_images": [TEXT]})),
}


@pytest.mark.fault(1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17)
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_mistake_is_answered_alike_at_every_endpoint(run_app: Callable[..., RunningApp], route: str) -> None:
    """The status of the table, in the dialect's error format; OpenAI has 400 for 422, and 404 for an unknown model.

    Nothing is generated; a valid request still works afterwards.
    """
    running_app = run_app(FakeImageDenoiser())
    translate, picture, ask = ROUTES[route]
    answered: dict[str, int] = {}
    for mistake, (change, expected) in MISTAKES.items():
        if mistake == "a strength that leaves no step" and not picture:
            continue
        if translate is webuis and mistake in NO_MISTAKES_OF_WEBUIS:
            continue
        if translate is openais and mistake == "a strength that leaves no step":
            continue  # there it draws one
        asked = translate({**GOOD, **change}, picture=picture)
        if asked is None:
            continue
        answer = ask(running_app, asked)
        answered[mistake] = answer.status_code
        if route.startswith("OpenAI"):
            expected = 404 if "model" in change and "strength" not in change else 400
        assert answer.status_code == expected, (mistake, answer.text[:300])
        assert "json" in answer.headers["content-type"]
    assert len(answered) >= 25
    assert running_app.squares.prepared == []
    good = translate(GOOD, picture=picture)
    assert good is not None
    assert ask(running_app, good).status_code == 200


BODIES: dict[str, tuple[bytes, str, int]] = {
    "no JSON": (b"{", "application/json", 400),
    "a list": (b"[]", "application/json", 400),
    "a name twice": (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
    "NaN": (b'{"prompt": "a", "width": NaN}', "application/json", 400),
    "nested 10,000 deep": (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "application/json", 400),
    "not UTF-8": (b'{"prompt": "\xff"}', "application/json", 400),
    "plain text": (b"a red square", "text/plain", 415),
    "XML": (b"<a/>", "application/xml", 415),
    "a body over the limit": (b'{"prompt": "' + b"x" * 70_000 + b'"}', "application/json", 413),
}
PATHS = ["/create_and_upload_image", STYLE, INPAINT, "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_cannot_be_read_is_refused_alike(run_app: Callable[..., RunningApp], path: str) -> None:
    """400, 413, 415 in every dialect; a chunked body is counted as well."""
    running_app = run_app(FakeImageDenoiser(), max_body_bytes=60_000, max_upload_bytes=60_000)
    for what, (body, media_type, expected) in BODIES.items():
        for content in (body, iter([body])):
            answer = running_app.client.post(path, content=content, headers={"content-type": media_type})
            assert answer.status_code == expected, (what, answer.text[:300])
    assert running_app.squares.prepared == []


def part(name: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n\r\n'


FORM = "multipart/form-data; boundary=x"
MULTIPART: dict[str, tuple[bytes, str, int]] = {
    "no boundary": (b"--x", "multipart/form-data", 400),
    "1,001 parts": (b"".join(part(b"a%d" % n) for n in range(1001)) + b"--x--\r\n", FORM, 400),
    "a huge part header": (part(b"a" * 100_000) + b"--x--\r\n", FORM, 400),
}


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "path", ["/create_and_upload_image", STYLE, INPAINT, "/v1/images/generations", "/v1/images/edits"]
)
def test_a_form_that_cannot_be_read_is_refused_alike(running_app: RunningApp, path: str) -> None:
    """400 for every malformed multipart body."""
    for what, (body, media_type, expected) in MULTIPART.items():
        answer = running_app.client.post(path, content=body, headers={"content-type": media_type})
        assert answer.status_code == expected, (what, answer.text[:300])


@pytest.mark.fault(5, 6)
@pytest.mark.parametrize(
    "prompt",
    [
        "a\0red square",
        "\u202ered square",
        "red\u200bsquare",
        "🟥 square",
        "../../etc/passwd",
        "a%2f..%2fb//c",
        "a\r\nb: c",
    ],
)
def test_a_strange_prompt_is_only_a_prompt(running_app: RunningApp, prompt: str) -> None:
    """Accepted or refused alike in every dialect, under the same name, which contains none of the prompt."""
    keys = set()
    for path in ("/create_and_upload_image", "/v1/images/generations", "/sdapi/v1/txt2img"):
        size = {"size": "64x64"} if path.startswith("/v1") else {"width": 64, "height": 64, "format": "png"}
        answer = running_app.client.post(path, json={"prompt": prompt, "seed": 1, **size})
        assert answer.status_code in (200, 400, 422), answer.text
        if answer.status_code != 200:
            keys.add("refused")
            continue
        body = answer.json()
        info = json.loads(body["info"]) if "info" in body else {}
        keys.add(body.get("key") or (info["keys"] if info else [body["data"][0]["key"]])[0])
    assert len(keys) == 1
    assert ".." not in keys.pop()


@pytest.mark.fault(5)
def test_composed_and_decomposed_text_are_the_same_order(running_app: RunningApp) -> None:
    """é is é in NFC and NFD, in prompts and in names."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    keys = {
        running_app.draw(prompt=prompt, save_path=f"{prompt}.webp").json()["key"] for prompt in (composed, decomposed)
    }
    assert len(keys) == 1
    assert len({running_app.draw(prompt=prompt).json()["key"] for prompt in (composed, decomposed)}) == 1
