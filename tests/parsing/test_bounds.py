"""Input is bounded before it is parsed and strictly validated, and output can be serialised, in every dialect."""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import structlog
from caller_text import chunk, exif, png, webp
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.api.request_parsing import BodyLimits
from stable_diffusion_server.app import create_app
from stable_diffusion_server.errors import InvalidInput, MalformedRequest, ServerError, TooLarge
from stable_diffusion_server.parsing.strict_json import JsonLimits, dumps, parse_object
from stable_diffusion_server.parsing.unicode_text import MAX_MARKS, nfc

CREATE, STYLE, INPAINT = "/create_and_upload_image", "/style_transfer_and_upload_image", "/inpaint_and_upload_image"
OPENAI, TXT2IMG, IMG2IMG = "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
OPTIONS, PNG_INFO, REPLAY = "/sdapi/v1/options", "/sdapi/v1/png-info", "/v1/replay"
DRAWING = [CREATE, STYLE, OPENAI, TXT2IMG, IMG2IMG]
ENLARGING = ["/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images", "/controlnet/detect"]
EDIT = "/edit_and_upload_image"
READING = [*DRAWING, *ENLARGING, INPAINT, EDIT, OPTIONS, PNG_INFO, REPLAY, "/internal/progress", "/v1/images/edits"]
JSON = {"content-type": "application/json"}
PICTURE = base64.b64encode(file_of(disc(64, 64))).decode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """An app over fake image-to-image models, shared by all tests of refused requests, which leave it unchanged."""
    folder, squares = tmp_path_factory.mktemp("bounds"), FakeImageDenoiser()
    app = create_app(settings_in(folder), load=lambda settings: squares)
    # It logs to the process's standard error, since that of the first test closes with the test.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    with TestClient(
        app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5), raise_server_exceptions=False
    ) as one:
        until(lambda: one.get("/readyz").status_code == 200)
        yield RunningApp(one, squares, folder)


@pytest.fixture
def running_app(shared: RunningApp) -> RunningApp:
    """The same app, without generated images."""
    shared.squares.prepared.clear()
    return shared


def post(client: TestClient, path: str, body: bytes, **headers: str) -> httpx.Response:
    return client.post(path, content=body, headers={**JSON, **headers})


def is_refused(running_app: RunningApp, answer: httpx.Response, *statuses: int) -> None:
    """A 4xx with a reason, and nothing was generated."""
    assert answer.status_code in (statuses or (400, 413, 422)), (answer.status_code, answer.text[:300])
    assert len(answer.content) < 5000
    assert running_app.squares.prepared == []


def asked(path: str, **more: Any) -> dict[str, Any]:
    """A valid request with additional fields."""
    picture = {STYLE: {"image_url": f"data:image/png;base64,{PICTURE}"}, IMG2IMG: {"init_images": [PICTURE]}}
    size = {OPENAI: {"size": "64x64"}, CREATE: {"width": 64, "height": 64}, TXT2IMG: {"width": 64, "height": 64}}
    return {"prompt": "a red square", **picture.get(path, {}), **size.get(path, {}), **more}


BOMBS: dict[str, bytes] = {
    "empty objects": b'{"prompt":"a","x":[' + b"{}," * 400_000 + b"{}]}",
    "lists in lists": b'{"prompt":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects in objects": b'{"prompt":"a","x":' + b'{"x":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    "forty levels": b'{"prompt":"a","x":' + b"[" * 40 + b"]" * 40 + b"}",
    "empty texts": b'{"prompt":"a","x":[' + b'"",' * 300_000 + b'""]}',
    "numbers": b'{"prompt":"a","x":[' + b"1," * 500_000 + b"1]}",
    "names": b'{"prompt":"a",' + b",".join(b'"n%d":1' % n for n in range(50_000)) + b"}",
    "escaped quotes": b'{"prompt":"' + b'\\"' * 500_000 + b'"}',
    "backslashes": b'{"prompt":"' + b"\\\\" * 500_000 + b'"}',
    "an open text": b'{"prompt":"' + b"\\" * 1_000_001,
    "a long name": b'{"prompt":"a","' + b"x" * 1_000_000 + b'":1}',
    "a long number": b'{"prompt":"a","x":' + b"1" * 1_000_000 + b"}",
    "a long fraction": b'{"prompt":"a","x":0.' + b"1" * 1_000_000 + b"}",
    "many long texts": b'{"prompt":"a","x":[' + b",".join([b'"%s"' % (b"a" * 100_000)] * 11) + b"]}",
}


@pytest.mark.fault(121, 122)
@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_body_made_to_take_memory_is_refused_in_every_dialect(running_app: RunningApp, path: str, bomb: str) -> None:
    """4xx with a short message, for many values, levels, quotes, names or digits."""
    is_refused(running_app, post(running_app.client, path, BOMBS[bomb]))


@pytest.mark.fault(121)
@pytest.mark.parametrize("path", DRAWING)
@pytest.mark.parametrize("shape", ["[1:", "<lora:a>", "(", "\u0315\u0323", "a ", "\\", "\U0001f469"])
@pytest.mark.parametrize("length", [140_000, 700_000])
def test_a_long_prompt_is_refused_by_name_before_it_is_read(
    running_app: RunningApp, path: str, shape: str, length: int
) -> None:
    """Of any content, in every dialect; so is a long negative prompt."""
    for name in ("prompt", "negative_prompt"):
        text = shape * (length // len(shape.encode()))
        answer = post(running_app.client, path, json.dumps(asked(path, **{name: text}), ensure_ascii=False).encode())
        is_refused(running_app, answer)
        assert answer.status_code == 413 or name in answer.text


@pytest.mark.fault(121, 122)
@pytest.mark.parametrize("path", [TXT2IMG, IMG2IMG, STYLE])
@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "sampler_name", "x", "styles"])
def test_only_pictures_may_be_megabytes(running_app: RunningApp, path: str, name: str) -> None:
    """A text as long as an image is refused, by field name and before decoding, in fields that are not images."""
    answer = post(running_app.client, path, json.dumps(asked(path, **{name: "<lora:a>" * 400_000})).encode())
    is_refused(running_app, answer, 422)
    assert name in answer.text


@pytest.mark.fault(122)
def test_pictures_in_json_have_a_size_and_a_number(run_app: Callable[..., RunningApp]) -> None:
    """One byte more than MAX_IMAGE_BYTES takes in base64 is refused, and so are 33 long strings."""
    running_app = run_app(FakeImageDenoiser(), max_image_bytes=30_000)
    most = 30_000 * 4 // 3 + 1024
    for pictures in (["A" * (most + 4)], ["A" * 8_000] * 33, ["A" * 8_000 + "é"], ["<" * 20_000]):
        answer = post(running_app.client, IMG2IMG, json.dumps(asked(IMG2IMG, init_images=pictures)).encode())
        is_refused(running_app, answer)
        assert "init_images" in answer.text
    noise = base64.b64encode(file_of(disc(64, 64))).decode()
    for escape in (lambda text: text, lambda text: text.replace("/", "\\/"), lambda text: text.replace("+", "\\u002B")):
        text = json.dumps(asked(IMG2IMG, init_images=["@"])).replace("@", escape(noise))
        assert post(running_app.client, IMG2IMG, text.encode()).status_code == 200


ODD: dict[str, str] = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "an overflow": "1e999",
    "a negative overflow": "-1e999",
    "a huge number": "1" + "0" * 400,
    "4,300 digits and more": "9" * 5000,
    "a lone surrogate": '"\\ud800"',
    "a lone low surrogate": '"a\\udfffb"',
    "a surrogate in a name": '{"\\ud800": 1}',
    "a surrogate deep down": '[{"a": ["\\ud800"]}]',
    "NaN deep down": '{"a": {"b": [NaN]}}',
    "a name twice": '{"a": 1, "a": 2}',
    "a name twice deep down": '[[{"b": 1, "b": 1}]]',
}


@pytest.mark.fault(123)
@pytest.mark.parametrize("path", [*DRAWING, INPAINT, OPTIONS, PNG_INFO])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_json_is_refused_by_name_before_anything_is_drawn(
    running_app: RunningApp, path: str, odd: str
) -> None:
    """Also under an unknown name, within a list or an object, in every dialect."""
    whole = json.dumps(asked(path, something="@")).replace('"@"', ODD[odd])
    answer = post(running_app.client, path, whole.encode())
    is_refused(running_app, answer, 400, 422)
    assert "something" in answer.text


@pytest.mark.fault(123)
@pytest.mark.parametrize(
    "name", ["sampler_name", "sampler_index", "scheduler", "styles", "force_task_id", "alwayson_scripts"]
)
def test_no_parameter_of_automatic1111_takes_half_a_character(running_app: RunningApp, name: str) -> None:
    """Each is refused by name; formerly a 500 after the image was generated."""
    for value in ("\ud800", ["\udfff"], {"controlnet": {"args": [{"module": "\ud800canny"}]}}, {"\ud800": {}}):
        answer = post(running_app.client, TXT2IMG, json.dumps(asked(TXT2IMG, **{name: value})).encode())
        is_refused(running_app, answer, 422)
        assert name in answer.text


def written(record: str) -> list[bytes]:
    """Images that carry this text as this server's record."""
    text = record.encode("utf-8", "surrogatepass")
    head = b"Exif\0\0" + exif(record)
    jpeg = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(head) + 2) + head + b"\xff\xd9"
    return [png(chunk(b"iTXt", b"record\0\0\0\0\0" + text)), webp(exif(record)), jpeg]


RECORDS = [
    '{"prompt": "\\ud800"}',
    '{"prompt": ["\\ud800"], "negative_prompt": ["a"]}',
    '{"prompt": "a", "negative_prompt": {"a": "\\udfff"}}',
    '{"prompt": "a", "seed": NaN}',
    '{"prompt": "a", "seed": 1e999, "width": -Infinity, "height": 1}',
    '{"prompt": "a", "prompt": "b"}',
    '{"a":' * 1_000 + "1" + "}" * 1_000,
    '{"a": [' + "{}," * 10_000 + "{}]}",
    '{"seed": ' + "9" * 5_000 + "}",
    "[" * 10_000,
    "null",
    '{"prompt": null, "seed": {"a": []}}',
]


@pytest.mark.fault(124)
@pytest.mark.parametrize("record", RECORDS)
def test_whatever_a_picture_says_of_itself_png_info_can_answer(running_app: RunningApp, record: str) -> None:
    """Lone surrogates, lists instead of strings, invalid numbers, thousands of levels: never a 500."""
    for picture in written(record):
        answer = running_app.client.post(PNG_INFO, json={"image": base64.b64encode(picture).decode()})
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"info", "items", "parameters"}
        is_refused(running_app, running_app.client.post(REPLAY, files={"picture_file": picture}), 422)


@pytest.mark.fault(124)
@pytest.mark.parametrize(
    "text", [b"\xff\xfe" * 100, b"Steps: 4, " * 5_000, b"\n" * 90_000, b"Negative prompt: a\n" * 4_000, b"a" * 200_000]
)
def test_whatever_text_others_wrote_png_info_can_answer(running_app: RunningApp, text: bytes) -> None:
    """AUTOMATIC1111's own text, which anyone can write, in both kinds of chunks."""
    for picture in (png(chunk(b"tEXt", b"parameters\0" + text)), png(chunk(b"iTXt", b"parameters\0\0\0\0\0" + text))):
        answer = running_app.client.post(PNG_INFO, json={"image": base64.b64encode(picture).decode()})
        assert answer.status_code == 200, answer.text


@pytest.mark.fault(124)
@pytest.mark.parametrize(
    "changes",
    [
        {"width": "1e308"},
        {"seed": "nan"},
        {"steps": "-1e999"},
        {"guidance": "inf"},
        {"model": "\ud800"},
        {"task": "\udfff"},
    ],
)
def test_whatever_others_wrote_beside_an_object_its_receipt_can_be_sent(
    running_app: RunningApp, changes: dict[str, str]
) -> None:
    """Invalid numbers are left out, lone surrogates replaced; the image is found all the same."""
    name = {"prompt": "a red square", "width": 64, "height": 64, "save_path": "kept.webp"}
    assert running_app.client.post(CREATE, json=name).status_code == 200
    (facts,) = (
        path
        for path in (running_app.folder).rglob("*kept.webp*")
        if path.is_file() and b'"record"' in path.read_bytes()
    )
    reported = json.loads(facts.read_bytes())
    facts.write_text(json.dumps({**reported, "record": {**reported["record"], **changes}}))
    for answer in (
        running_app.client.post(CREATE, json=name),
        running_app.client.get("/files/static/uploads/kept.webp?record=1"),
        running_app.client.post(OPENAI, json={"prompt": "a red square", "size": "64x64", "save_path": "kept.webp"}),
    ):
        assert answer.status_code == 200, answer.text
        json.loads(answer.content.decode(), parse_constant=pytest.fail)


@pytest.mark.fault(124)
def test_json_can_always_be_written() -> None:
    """Lone surrogates become U+FFFD, non-finite numbers null, valid text stays unchanged."""
    value = {"a": float("inf"), "b\ud800": ["\udfff", float("nan"), ("x", 1.5)], "c": "ü\U0001f600"}
    assert json.loads(dumps(value)) == {"a": None, "b\ufffd": ["\ufffd", None, ["x", 1.5]], "c": "ü\U0001f600"}


DIGITS = "9" * 5000


@pytest.mark.fault(125)
def test_thousands_of_digits_are_no_number_anywhere(running_app: RunningApp) -> None:
    """In headers, queries and ids: refused or ignored; never a 500 and never a broken stream."""
    client = running_app.client
    answers = [
        client.post(CREATE, content=b"{}", headers={**JSON, "content-length": DIGITS}),
        client.post(CREATE, json=asked(CREATE), headers={"Prefer": f"wait={DIGITS}"}),
        client.post(CREATE, json=asked(CREATE), headers={"Prefer": f"respond-async, wait={DIGITS}"}),
        client.get("/history", params={"before": DIGITS}),
        client.get("/history", params={"limit": DIGITS}),
        client.get(CREATE, params={"prompt": "a", "width": DIGITS}),
        client.get(CREATE, params={"prompt": "a", "seed": DIGITS}),
        client.get(CREATE, params={"prompt": "a", "timeout": "1e999"}),
        client.get(f"/jobs/{DIGITS}"),
        client.get("/files/a.webp", params={"expires": DIGITS, "signature": "a"}),
        client.get("/files/a.webp", headers={"Range": f"bytes={DIGITS}-"}),
        client.post(OPENAI, json={"prompt": "a", "size": f"{DIGITS}x{DIGITS}"}),
        client.get("/healthz", headers={"X-Forwarded-For": DIGITS}),
    ]
    assert [answer.status_code for answer in answers if answer.status_code >= 500] == []
    accepted = client.post(CREATE, json=asked(CREATE), headers={"Prefer": "respond-async"}).json()["id"]
    for after in (DIGITS, f"epoch.{DIGITS}", f".{DIGITS}", "²", "-1"):
        assert client.get(f"/jobs/{accepted}/events", headers={"Last-Event-ID": after.encode()}).status_code in (
            200,
            204,
        )


@pytest.mark.fault(121)
@pytest.mark.parametrize(
    "headers",
    [
        {"Prefer": "a," * 9_000},
        {"Idempotency-Key": "a" * 20_000},
        {"X-Job-ID": "a" * 20_000},
        {"Range": "bytes=" + "0-1," * 5_000},
        {"Last-Event-ID": "1" * 20_000},
        {"traceparent": "0" * 20_000},
        {"Authorization": "Basic " + "A" * 20_000},
        {"Cookie": "a=b;" * 5_000},
        {f"X-{number}": "a" for number in range(200)},
        {f"X-{number}": "a" * 10_000 for number in range(8)},
    ],
)
def test_a_head_that_is_too_long_is_refused_unread(running_app: RunningApp, headers: dict[str, str]) -> None:
    """431 for any header, in every server command."""
    is_refused(running_app, running_app.client.post(CREATE, json=asked(CREATE), headers=headers), 431)


@pytest.mark.fault(121)
def test_a_query_that_is_too_long_is_refused_unread(running_app: RunningApp) -> None:
    """431 for the head as a whole; the longest prompt, percent-encoded, is well below."""
    is_refused(
        running_app, running_app.client.get(f"{CREATE}?prompt={'a' * 64_000}", headers={"X-More": "a" * 3_000}), 431
    )
    assert running_app.client.get(f"{CREATE}?width=64&height=64&prompt={'%C3%A4' * 4_000}").status_code == 200


@pytest.mark.fault(126)
@pytest.mark.parametrize(
    "charset",
    ["punycode", "idna", "utf-7", "utf-16", "unicode_escape", "raw_unicode_escape", "undefined", "hex", "none"],
)
def test_a_form_in_another_encoding_is_not_read(running_app: RunningApp, charset: str) -> None:
    """415: some of Python's codecs take quadratic time, raise their own errors, or return no text."""
    body = b'--edge\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\\ud800 xn--a \xff\r\n--edge--\r\n'
    for media_type in (
        f"multipart/form-data; boundary=edge; charset={charset}",
        f'multipart/form-data; charset="{charset}"; boundary=edge',
    ):
        is_refused(
            running_app, running_app.client.post(CREATE, content=body, headers={"content-type": media_type}), 415
        )
    utf8 = body.replace(b"\\ud800 xn--a \xff", "grün".encode()).replace(
        b"--edge--",
        b'--edge\r\nContent-Disposition: form-data; name="width"\r\n\r\n64\r\n--edge\r\n'
        b'Content-Disposition: form-data; name="height"\r\n\r\n64\r\n--edge--',
    )
    kind = {"content-type": "multipart/form-data; boundary=edge; charset=UTF-8"}
    assert running_app.client.post(CREATE, content=utf8, headers=kind).status_code == 200


@pytest.mark.fault(121, 126)
def test_the_texts_of_a_form_are_bounded_together(running_app: RunningApp) -> None:
    """A hundred fields of half a megabyte, a urlencoded form of two, and media types of any length."""
    fields = {f"f{number}": (None, "a" * 500_000) for number in range(20)}
    is_refused(running_app, running_app.client.post(STYLE, files=fields), 400, 413)
    is_refused(running_app, running_app.client.post(STYLE, data={"prompt": "%41" * 700_000}), 413)
    for media_type in (f'multipart/form-data; boundary="{";" * 3_000}', f"multipart/form-data; {'a=b;' * 2_000}"):
        is_refused(
            running_app, running_app.client.post(STYLE, content=b"--a", headers={"content-type": media_type}), 400, 415
        )


@pytest.mark.fault(127)
def test_an_option_that_is_refused_changes_nothing(running_app: RunningApp) -> None:
    """The caller's selected model stays selected."""
    chosen = [
        model["title"]
        for model in running_app.client.get("/sdapi/v1/sd-models").json()
        if model["model_name"] == "flux"
    ]
    assert running_app.client.post(OPTIONS, json={"sd_model_checkpoint": chosen[0]}).status_code == 200
    for refused in ("no such model", "x" * 5_000, 7, ["flux"], {"a": 1}, "sdxl\ud800"):
        body = json.dumps({"sd_model_checkpoint": refused}).encode()
        assert post(running_app.client, OPTIONS, body).status_code == 422
        assert running_app.client.get(OPTIONS).json()["sd_model_checkpoint"] == chosen[0]


def test_marks_in_a_row_are_bounded_on_both_sides_of_the_edge() -> None:
    """Thirty are accepted, as in UAX #15, and one more is not; composed marks count."""
    assert nfc("a" + "\u0323" * MAX_MARKS)
    for run in ("\u0323" * (MAX_MARKS + 1), "\u0f73" * (MAX_MARKS + 1)):
        with pytest.raises(ValueError, match="marks"):
            nfc("a" + run)


EDGES: list[tuple[bytes, bytes, type[ServerError]]] = [
    (b'{"a":[' + b"1," * 4_094 + b"1]}", b'{"a":[' + b"1," * 4_095 + b"1]}", MalformedRequest),
    (b'{"a":' + b"[" * 31 + b"]" * 31 + b"}", b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", MalformedRequest),
    (b'{"a":"' + b"a" * 393_216 + b'"}', b'{"a":"' + b"a" * 393_217 + b'"}', InvalidInput),
    (b'{"a":1' + b" " * 1_048_569 + b"}", b'{"a":1' + b" " * 1_048_570 + b"}", TooLarge),
    (b'{"a":' + b"9" * 20 + b"}", b'{"a":' + b"9" * 21 + b"}", InvalidInput),
    (b'{"a":1e308}', b'{"a":1e309}', InvalidInput),
]


@pytest.mark.fault(122, 123)
@pytest.mark.parametrize(("taken", "refused", "error"), EDGES)
def test_every_limit_of_json_holds_on_both_sides_of_its_edge(
    taken: bytes, refused: bytes, error: type[ServerError]
) -> None:
    """Values, levels, strings, bytes, digits, magnitudes."""
    assert set(parse_object(taken)) == {"a"}
    with pytest.raises(error):
        parse_object(refused)


def test_pictures_come_back_whole_whatever_their_length() -> None:
    """Long strings are extracted and restored, at any depth, and no placeholder can be forged."""
    limits = BodyLimits().for_json({"p"})
    texts = ["a" * size for size in (1, 4_095, 4_096, 4_097, 1_000_000)]
    assert parse_object(json.dumps({"p": [{"x": texts}], "q": "b" * 5_000}).encode(), limits) == {
        "p": [{"x": texts}],
        "q": "b" * 5_000,
    }
    assert parse_object(b'{"q":"' + b"\\n\\u00e4" * 1_000 + b'"}', JsonLimits())["q"] == "\nä" * 1_000


@pytest.mark.fault(177)
@pytest.mark.parametrize("escape", ["%", "%%", "%zz", "%F0%9F%98%80", "a=%&"])
def test_a_form_has_so_many_escapes_and_is_refused_unread_beyond(running_app: RunningApp, escape: str) -> None:
    """A bare percent sign costs as much as a thousand letters: at the limit they are decoded, above it only counted."""
    count = 131_072 // escape.count("%")
    for path in ("/create_and_upload_image", "/v1/images/generations"):
        for more, refused in ((0, False), (1, True)):
            body = b"prompt=" + escape.encode() * (count + more)
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = running_app.client.post(path, content=body, headers=headers)
            assert 400 <= answer.status_code < 500
            assert ("percent signs" in answer.text) == refused, answer.text
