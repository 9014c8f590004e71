"""The generation routes: every request encoding, the result, and every reason for refusal."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import COLOURS, FakeDenoiser, until
from PIL import Image

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASKED = {"prompt": "a red square", "save_path": "demo/first.webp", "width": 100, "height": 70}


def ask_by(running_app: RunningApp, way: str, path: str = CREATE, asked: dict[str, Any] = ASKED) -> httpx.Response:
    ways: dict[str, Callable[[], httpx.Response]] = {
        "get query": lambda: running_app.client.get(path, params=asked),
        "post query": lambda: running_app.client.post(path, params=asked),
        "post form": lambda: running_app.client.post(path, data=asked),
        "post multipart": lambda: running_app.client.post(path, files={k: (None, str(v)) for k, v in asked.items()}),
        "post json": lambda: running_app.client.post(path, json=asked),
    }
    return ways[way]()


WAYS = ["get query", "post query", "post form", "post multipart", "post json"]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_is_answered_with_a_receipt(running_app: RunningApp, way: str) -> None:
    """Query, form, multipart and JSON: the same result, and the image has exactly the requested size."""
    answer = ask_by(running_app, way)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()
    assert receipt["path"] == "http://127.0.0.1:8000/files/static/uploads/demo/first.webp"
    expected = {"key": "static/uploads/demo/first.webp", "cached": False, "coalesced": False, "model": "sdxl"}
    expected |= {"task": "text_to_image", "width": 100, "height": 70, "num_inference_steps": 4}
    assert {name: receipt[name] for name in expected} == expected
    assert set(receipt["timings"]) >= {"queue", "prepare", "denoise", "decode", "encode", "store"}
    assert {"seed", "guidance_scale", "scheduler", "warnings"} <= set(receipt)
    assert "prompt_used" not in receipt
    picture = running_app.client.get(receipt["path"])
    assert picture.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(picture.content)).size == (100, 70)


def test_all_ways_lead_to_the_same_picture(running_app: RunningApp) -> None:
    """The first generates, the other four are cache hits; responses differ only in `cached`, `timings` and warnings."""
    receipts = [ask_by(running_app, way).json() for way in WAYS]
    assert [receipt["cached"] for receipt in receipts] == [False, True, True, True, True]
    assert len({(receipt["path"], receipt["seed"]) for receipt in receipts}) == 1
    assert len(running_app.squares.finished) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ending", ["webp", "png", "jpg"])
def test_make_image_answers_the_picture_itself(running_app: RunningApp, way: str, ending: str) -> None:
    """The bytes, their real content type, and where they are stored."""
    answer = ask_by(running_app, way, "/make_image", {**ASKED, "save_path": f"demo/first.{ending}"})
    image = Image.open(io.BytesIO(answer.content))
    assert image.size == (100, 70)
    assert answer.headers["content-type"] == f"image/{image.format.lower()}" == f"image/{ending.replace('jpg', 'jpeg')}"
    assert running_app.client.get(answer.headers["content-location"]).content == answer.content


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no prompt", {"prompt": None}, "prompt"),
    ("an empty prompt", {"prompt": ""}, "prompt"),
    ("a blank prompt", {"prompt": " \t\n"}, "prompt"),
    ("an invisible prompt", {"prompt": "\u200b"}, "prompt"),
    ("a prompt over the limit", {"prompt": "x" * 32_001}, "prompt"),
    ("a negative prompt over the limit", {"negative_prompt": "x" * 32_001}, "negative_prompt"),
    ("width 0", {"width": 0}, "width"),
    ("width below the limit", {"width": 63}, "width"),
    ("width over the limit", {"width": 2049}, "width"),
    ("a negative height", {"height": -64}, "height"),
    ("a huge height", {"height": 10**9}, "height"),
    ("half a pixel", {"width": 99.5}, "width"),
    ("width as words", {"width": "wide"}, "width"),
    ("width with a unit", {"width": "1024x"}, "width"),
    ("0 steps", {"num_inference_steps": 0}, "num_inference_steps"),
    ("151 steps", {"num_inference_steps": 151}, "num_inference_steps"),
    ("guidance NaN", {"guidance_scale": "nan"}, "guidance_scale"),
    ("infinite guidance", {"guidance_scale": "inf"}, "guidance_scale"),
    ("negative guidance", {"guidance_scale": -0.1}, "guidance_scale"),
    ("guidance over the limit", {"guidance_scale": 30.1}, "guidance_scale"),
    ("seed -1", {"seed": -1}, "seed"),
    ("seed 2^64", {"seed": 2**64}, "seed"),
    ("half a seed", {"seed": 1.5}, "seed"),
    ("seed as words", {"seed": "abc"}, "seed"),
    ("quality 0", {"quality": 0}, "quality"),
    ("quality 101", {"quality": 101}, "quality"),
    ("format gif", {"format": "gif"}, "format"),
    ("format svg", {"format": "svg"}, "format"),
    ("a name that ends in .gif", {"save_path": "a.gif"}, "save_path"),
    ("a format against the name", {"format": "png"}, "format"),
    ("an unknown model", {"model": "dall-e-3"}, "model"),
    ("a path as model", {"model": "/etc/passwd"}, "model"),
    ("an unknown scheduler", {"scheduler": "warp"}, "scheduler"),
    ("timeout 0", {"timeout": 0}, "timeout"),
    ("a timeout over the limit", {"timeout": 601}, "timeout"),
    ("overwrite maybe", {"overwrite": "maybe"}, "overwrite"),
    ("an unknown parameter", {"widht": 64}, "widht"),
    ("an empty name", {"save_path": ""}, "save_path"),
    ("an absolute name", {"save_path": "/etc/passwd"}, "save_path"),
    ("a climbing name", {"save_path": "../../main.py"}, "save_path"),
    ("a name with NUL", {"save_path": "a\0.webp"}, "save_path"),
    ("a name with a line break", {"save_path": "a\r\nb.webp"}, "save_path"),
    ("a folder as name", {"save_path": "demo/"}, "save_path"),
    ("a name that is too long", {"save_path": "x" * 1024}, "save_path"),
    ("a part of a name too long for the disk", {"save_path": "x" * 300}, "save_path"),
]


@pytest.mark.parametrize("way", ["get query", "post json"])
@pytest.mark.parametrize(("what", "change", "field"), BAD, ids=[what for what, _, _ in BAD])
def test_bad_input_is_refused_by_name(
    running_app: RunningApp, way: str, what: str, change: dict[str, Any], field: str
) -> None:
    """422 with a problem document that names the field; nothing is generated or stored."""
    asked = {name: value for name, value in {**ASKED, **change}.items() if value is not None}
    answer = ask_by(running_app, way, CREATE, asked)
    assert answer.status_code == 422, f"{what}: {answer.text}"
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["field"] == field, problem
    assert problem["status"] == 422
    assert problem["errors"][0]["field"] == field
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert running_app.squares.prepared == []
    assert not any((running_app.folder / "bucket" / "objects").rglob("*.webp"))


@pytest.mark.fault(3, 5, 14)
@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"prompt": "a red square", "width": "64"', 400, None),
        (b"not json", 400, None),
        (b"[]", 400, None),
        (b'"a red square"', 400, None),
        (b"null", 400, None),
        (b"", 422, "prompt"),
        (b'{"prompt": "a", "width": NaN}', 400, "width"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "prompt"),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, None),
        (b'{"prompt": "\xff\xfe"}', 400, None),
        (b'{"prompt": 5}', 422, "prompt"),
        (b'{"prompt": null}', 422, "prompt"),
        (b'{"prompt": ["a"]}', 422, "prompt"),
        (b'{"prompt": {"a": "b"}}', 422, "prompt"),
        (b'{"prompt": "\\ud800"}', 422, "prompt"),
        (b'{"prompt": "a", "save_path": "\\ud800"}', 422, "save_path"),
        (b'{"prompt": "a", "width": true}', 422, "width"),
        (b'{"prompt": "a", "seed": true}', 422, "seed"),
        (b'{"prompt": "a", "width": 1e999}', 422, "width"),
        (b'{"prompt": "a", "\\ud800": 1}', 422, "?"),
    ],
)
def test_a_broken_body_is_refused(running_app: RunningApp, body: bytes, status: int, field: str | None) -> None:
    """400 for unreadable bodies, 422 for readable but invalid ones; never a 500."""
    answer = running_app.client.post(CREATE, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json().get("field") == field


@pytest.mark.parametrize("way", WAYS)
def test_text_beyond_ascii_is_the_same_by_every_way(running_app: RunningApp, way: str) -> None:
    """A UTF-8 name is the same, percent-encoded or not."""
    receipt = ask_by(running_app, way, CREATE, {**ASKED, "prompt": "ein grüner Kreis", "save_path": "ü/猫.webp"}).json()
    assert receipt["key"] == "static/uploads/ü/猫.webp"


def test_raw_utf8_in_a_form_is_read_as_utf8(running_app: RunningApp) -> None:
    """`curl -d` sends what is typed, without percent-encoding."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = running_app.client.post(
        CREATE, content="prompt=grün&width=64&height=64&save_path=ü.webp".encode(), headers=headers
    )
    assert answer.json()["key"] == "static/uploads/ü.webp"
    assert running_app.squares.finished[0].prompt == "grün"


def test_bytes_that_are_no_text_are_refused(running_app: RunningApp) -> None:
    """Otherwise a replacement character would turn two names into one."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert running_app.client.get(f"{CREATE}?prompt=a&save_path=a%ff.webp").status_code == 400
    assert running_app.client.post(CREATE, content=b"prompt=a&save_path=a%fe", headers=headers).status_code == 400
    assert running_app.client.post(CREATE, content=b"prompt=a&save_path=\xfe", headers=headers).status_code == 400


@pytest.mark.fault(15)
@pytest.mark.parametrize("count", [100, 101, 50_000])
def test_too_many_fields_are_refused_in_few_words(running_app: RunningApp, count: int) -> None:
    """A hundred fields are accepted and one more is not, by query, form and JSON; the error does not list them all."""
    fields = {"prompt": "a", **{f"f{n}": "" for n in range(count - 1)}}
    answers = [running_app.client.post(CREATE, json=fields), running_app.client.post(CREATE, data=fields)]
    if count < 1000:
        answers.append(running_app.client.get(CREATE, params=fields))
    for answer in answers:
        assert answer.status_code == (422 if count == 100 else 400)
        assert len(answer.content) < 20_000


def test_json_may_begin_with_a_byte_order_mark_and_is_utf8(running_app: RunningApp) -> None:
    """Some editors write a BOM; UTF-16 is not JSON on the wire."""
    headers = {"content-type": "application/json"}
    text = json.dumps(ASKED)
    assert running_app.client.post(CREATE, content=text.encode("utf-8-sig"), headers=headers).status_code == 200
    assert running_app.client.post(CREATE, content=text.encode("utf-16-le"), headers=headers).status_code == 400


@pytest.mark.fault(14)
def test_a_body_without_a_truthful_length_is_read(running_app: RunningApp) -> None:
    """A chunked body is read, even if another header says there is none."""
    answer = running_app.client.post(
        CREATE, content=iter([json.dumps(ASKED).encode()]), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200


def test_parameters_that_have_no_effect_do_not_tell_pictures_apart(running_app: RunningApp) -> None:
    """PNG has no quality, -0.0 is 0.0, and a negative prompt without guidance gives a warning."""
    keys = {running_app.draw(prompt="a red square", format="png", quality=quality).json()["key"] for quality in (1, 85)}
    assert len(keys) == 1
    zero = {running_app.draw(prompt="a red square", guidance_scale=value).json()["key"] for value in ("0.0", "-0.0")}
    assert len(zero) == 1
    unused = running_app.draw(prompt="a red square", guidance_scale=1, negative_prompt="blur").json()
    assert "negative-prompt-ignored" in {warning["code"] for warning in unused["warnings"]}
    assert unused["key"] == running_app.draw(prompt="a red square", guidance_scale=1).json()["key"]


def test_make_image_tells_its_warnings_in_a_header(running_app: RunningApp) -> None:
    """A warning header says when the image of another request is returned."""
    asked = {"save_path": "a.webp", "width": 64, "height": 64}
    running_app.client.get("/make_image", params={"prompt": "a red square", **asked})
    answer = running_app.client.get("/make_image", params={"prompt": "a blue square", **asked})
    assert "different-request" in answer.headers["x-warnings"]


@pytest.mark.fault(15)
def test_a_parameter_given_twice_is_refused(running_app: RunningApp) -> None:
    """The server does not guess between two values, within the query or between query and body."""
    twice = running_app.client.get(f"{CREATE}?prompt=a&prompt=b")
    across = running_app.client.post(f"{CREATE}?prompt=a", data={"prompt": "b"})
    assert [(answer.status_code, answer.json()["field"]) for answer in (twice, across)] == [(400, "prompt")] * 2


@pytest.mark.parametrize("media_type", ["text/plain", "application/xml", "image/png"])
def test_other_bodies_are_refused(running_app: RunningApp, media_type: str) -> None:
    """415 names the accepted types."""
    answer = running_app.client.post(CREATE, content=b"prompt", headers={"content-type": media_type})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["detail"]


@pytest.mark.fault(18)
def test_a_multipart_body_without_a_boundary_is_refused(running_app: RunningApp) -> None:
    """400, not a parser crash."""
    answer = running_app.client.post(CREATE, content=b"--x", headers={"content-type": "multipart/form-data"})
    assert answer.status_code == 400


def test_a_file_where_none_is_taken_is_refused(running_app: RunningApp) -> None:
    """Text to image takes no file: the error names the field, and the file is not read into memory."""
    answer = running_app.client.post(CREATE, data={"prompt": "a"}, files={"image_file": ("a.png", b"png")})
    assert (answer.status_code, answer.json()["field"]) == (422, "image_file")


@pytest.mark.fault(14)
def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_read(run_app: Callable[..., RunningApp]) -> None:
    """413 one byte above MAX_BODY_BYTES; at the limit the JSON is read."""
    running_app = run_app(max_body_bytes=2000)
    body = json.dumps({**ASKED, "negative_prompt": ""})
    fits = json.dumps({**ASKED, "negative_prompt": "x" * (2000 - len(body))})
    assert len(fits) == 2000
    headers = {"content-type": "application/json"}
    assert running_app.client.post(CREATE, content=fits, headers=headers).status_code == 200
    refused = running_app.client.post(CREATE, content=fits + " ", headers=headers)
    unknown_length = running_app.client.post(CREATE, content=iter([fits.encode(), b" "]), headers=headers)
    for answer in (refused, unknown_length):
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_get_with_a_body_over_the_limit_gets_413(run_app: Callable[..., RunningApp]) -> None:
    """An unexpected body is still counted, and its end is not mistaken for a disconnect."""
    running_app = run_app(FakeDenoiser(seconds_per_step=0.2), max_body_bytes=2000)
    answer = running_app.client.request("GET", CREATE, params=ASKED, content=iter([b"x" * 1500] * 3))
    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"


def test_an_unknown_path_and_a_wrong_method_are_problems_too(running_app: RunningApp) -> None:
    """404 and 405 use the same problem format as all other errors."""
    for answer, status in ((running_app.client.get("/nothing"), 404), (running_app.client.put(CREATE), 405)):
        assert answer.status_code == status
        assert answer.json()["status"] == status
        assert answer.headers["content-type"] == "application/problem+json"


def test_an_unexpected_error_stays_opaque(run_app: Callable[..., RunningApp]) -> None:
    """An exception during generation is a 500 with a request id and none of its message."""
    running_app = run_app()
    answer = running_app.draw(prompt="an unpreparable square")
    assert answer.status_code == 500
    assert "cannot prepare" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert running_app.draw(prompt="a red square").status_code == 200


@pytest.mark.fault(61)
def test_a_full_queue_answers_429_with_retry_after(run_app: Callable[..., RunningApp]) -> None:
    """One runs, one waits, the third is refused at once; both accepted ones are answered."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares, queue_limit=1, max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(running_app.draw, prompt="one")
        until(lambda: running_app.metric("sds_queue_running") == 1)
        waiting = pool.submit(running_app.draw, prompt="two")
        until(lambda: running_app.metric("sds_queue_waiting") == 1)
        refused = running_app.draw(prompt="three")
        squares.gate.set()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert [running.result().status_code, waiting.result().status_code] == [200, 200]


def test_a_deadline_is_a_504(run_app: Callable[..., RunningApp]) -> None:
    """504 after `timeout`, and the device is free for the next request."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares)
    assert running_app.draw(prompt="slow", timeout=0.05).status_code == 504
    squares.gate.set()
    assert running_app.draw(prompt="a red square").status_code == 200


def test_the_caller_may_name_the_request(running_app: RunningApp) -> None:
    """A valid X-Request-ID is returned; an invalid one is replaced."""
    kept = running_app.client.get("/healthz", headers={"X-Request-ID": "order-66.a_b"})
    replaced = running_app.client.get("/healthz", headers={"X-Request-ID": "bad id\t!"})
    assert kept.headers["x-request-id"] == "order-66.a_b"
    assert len(replaced.headers["x-request-id"]) == 32


def test_seed_random_is_a_new_picture_each_time(running_app: RunningApp) -> None:
    """Two responses, two seeds, two objects."""
    first, second = (running_app.draw(prompt="a red square", seed="random").json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["key"] != second["key"]


@pytest.mark.parametrize(
    "name", ["a/b.webp", "two words.webp", "a+b.webp", "a?b#c&d=e.webp", "über/猫.webp", "100%.webp"]
)
def test_a_named_picture_is_found_under_the_url_of_its_receipt(running_app: RunningApp, name: str) -> None:
    """For any characters in a name, the URL leads to the image and the key is the name as given."""
    receipt = running_app.draw(prompt="a red square", save_path=name).json()
    assert receipt["key"] == f"static/uploads/{name}"
    picture = running_app.client.get(receipt["path"])
    assert picture.status_code == 200
    assert Image.open(io.BytesIO(picture.content)).size == (64, 64)
    assert running_app.draw(prompt="a red square", save_path=name).json()["path"] == receipt["path"]


@pytest.mark.fault(5)
def test_composed_and_decomposed_names_are_one(running_app: RunningApp) -> None:
    """NFC and NFD of a name yield one object."""
    composed = running_app.draw(prompt="a red square", save_path="caf\u00e9.webp").json()
    decomposed = running_app.draw(prompt="a red square", save_path="cafe\u0301.webp").json()
    assert (composed["key"], decomposed["cached"]) == (decomposed["key"], True)


def test_the_public_base_url_makes_the_links(run_app: Callable[..., RunningApp]) -> None:
    """With PUBLIC_BASE_URL set, URLs start with it, in new and cached responses alike."""
    running_app = run_app(public_base_url="https://pictures.example")
    paths = [running_app.draw(prompt="a red square", save_path="a.webp").json()["path"] for _ in range(2)]
    assert set(paths) == {"https://pictures.example/files/static/uploads/a.webp"}


@pytest.mark.fault(64)
def test_cross_talk_is_impossible(running_app: RunningApp) -> None:
    """Five hundred different requests, a dozen at once: each image has its request's colour and its seed's shade."""
    colours = ["red", "green", "blue", "yellow", "white", "black"]

    def check(seed: int) -> bool:
        colour = colours[seed % 6]
        asked = {"prompt": f"a {colour} square", "seed": seed, "format": "png", "width": 64, "height": 64}
        picture = running_app.client.get("/make_image", params=asked)
        expected = tuple(max(0, part - seed % 16) for part in COLOURS[colour])
        return Image.open(io.BytesIO(picture.content)).getpixel((32, 32)) == expected

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(check, range(500)))


def test_the_docs_name_every_parameter_and_its_bounds(running_app: RunningApp) -> None:
    """/openapi.json, as a client generator reads it: parameters, bounds, and both methods."""
    openapi = running_app.client.get("/openapi.json").json()
    operations = openapi["paths"][CREATE]
    by_name = {parameter["name"]: parameter for parameter in operations["get"]["parameters"]}
    assert by_name["prompt"]["required"]
    assert (by_name["width"]["schema"]["minimum"], by_name["width"]["schema"]["maximum"]) == (64, 2048)
    body = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(by_name)
    assert running_app.client.get("/docs").status_code == 200
    assert "#/$defs" not in json.dumps(openapi), "what is referred to must be there"
