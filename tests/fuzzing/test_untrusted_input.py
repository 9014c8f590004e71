"""Whatever comes in from strangers, made by hypothesis: named refusals or pictures, never a 500, never a dead server.

What once went wrong, or nearly, stays as an example above its test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of
from hostile_images import gif_of_frames, jpeg_of_many_scans, png_claiming, png_with
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stable_diffusion_server.errors import InvalidInput, NotFound, ServerError, StorageUnavailable
from stable_diffusion_server.generation.prompts import clean_prompt
from stable_diffusion_server.imaging.formats import DEFAULT_FORMATS, OPTIONAL_FORMATS
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool
from stable_diffusion_server.parsing.strict_json import dumps, parse_object
from stable_diffusion_server.storage.keys import object_key, url_path
from stable_diffusion_server.storage.local import LocalBucket

# Of one test's own: an app or a pool is made once, and every example must leave it as it was.
SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=150,
    derandomize=True,
)
WHOLE = [file_of(disc(24, 16), kind) for kind in (*DEFAULT_FORMATS, *OPTIONAL_FORMATS)] + [
    jpeg_of_many_scans(24, 16, 2),
    gif_of_frames(3),
]
CREATE, STYLE = "/create_and_upload_image", "/style_transfer_and_upload_image"
ANY_TEXT = st.text(st.characters(), max_size=60)


@dataclass(frozen=True)
class Mending:
    """Changes to a file: bytes put over others, cut off, doubled."""

    file: int
    edits: list[tuple[float, bytes]]
    cut: float
    doubled: tuple[float, float]

    def applied(self) -> bytes:
        data = bytearray(WHOLE[self.file])
        for place, change in self.edits:
            start = int(place * len(data))
            data[start : start + len(change)] = change
        start, end = (int(part * len(data)) for part in sorted(self.doubled))
        return bytes(data[:end] + data[start:])[: int(self.cut * len(data)) + 1]


PART = st.floats(0, 1)
MENDINGS = st.builds(
    Mending,
    st.integers(0, len(WHOLE) - 1),
    st.lists(st.tuples(PART, st.binary(min_size=1, max_size=8)), max_size=6),
    st.just(1.0) | PART,
    st.just((1.0, 1.0)) | st.tuples(PART, PART),
)


@dataclass
class Pool:
    """A pool of one child on a loop of its own."""

    runner: asyncio.Runner
    decoder: DecoderPool

    def decode(self, data: bytes) -> np.ndarray[Any, Any]:
        return self.runner.run(self.decoder.decode(data, "image_file"))


@pytest.fixture
def pool() -> Iterator[Pool]:
    """With every kind of file taken, and small limits."""
    with asyncio.Runner() as runner:

        async def make() -> DecoderPool:
            return DecoderPool(
                max_bytes=10**6,
                max_pixels=10**5,
                max_side=2000,
                processes=1,
                seconds=60,
                formats=(*DEFAULT_FORMATS, *OPTIONAL_FORMATS),
            )

        decoder = runner.run(make())
        yield Pool(runner, decoder)
        runner.run(decoder.close())


@pytest.mark.fault(19, 32)
@SHARED
@given(MENDINGS.map(Mending.applied) | st.binary(max_size=200))
@example(b"")
@example(b"\x89PNG\r\n\x1a\n")
@example(b"\xff\xd8\xff")
@example(b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0")
@example(b"GIF89a")
@example(b"\0\0\0\x20ftypavif")
@example(png_claiming(2**31 - 1, 2**31 - 1))
@example(png_claiming(1, 1))
# Pillow raises ValueError, no `UnidentifiedImageError`: once told as "not a PNG".
@example(png_with(b"iCCP", b"profile", file_of(disc(24, 16))))
@example(png_with(b"IHDR", b"", file_of(disc(24, 16))))
def test_no_bytes_end_the_decoder(pool: Pool, data: bytes) -> None:
    """Pixels within the limits, or a refusal by name; the next picture is decoded."""
    try:
        pixels = pool.decode(data)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= 10**5
        assert max(pixels.shape) <= 2000
    except ServerError as refused:
        assert (refused.field, refused.status in (413, 415, 422)) == ("image_file", True)  # noqa: PT017  # either is right
    assert (pool.decode(WHOLE[0]) == disc(24, 16)).all()


@pytest.mark.fault(6)
@SHARED
@given(ANY_TEXT | st.text(st.sampled_from("./\\%2f~ \0\n:é"), max_size=30))
@example("....//....//etc/passwd")
@example("..%2f..%2fetc/passwd")
@example("a/\u2024\u2024/b")
@example("\uff0e\uff0e/up.webp")
@example("a" * 1025)
@example("~root/.ssh/authorized_keys")
@example("C:\\windows\\system32")
@example("a\u202egnp.exe")
@example("aux.webp/../../../b")
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A name is refused as `save_path`, or what is stored under it lies in the bucket and is found again."""
    bucket = LocalBucket(tmp_path / "bucket")
    bucket.open()
    try:
        key = object_key("static/uploads", name)
        stored, _ = bucket.create(key, b"data", "image/webp", {})
        assert bucket.read(key) == b"data"
        assert stored.key == key
        assert key.startswith("static/uploads/")
        assert ".." not in key.split("/")
        assert url_path(key).isascii()
        bucket.delete(key)
    except InvalidInput as refused:
        assert refused.field == "save_path"  # noqa: PT017  # either is right
    except (NotFound, StorageUnavailable) as wrong:
        pytest.fail(f"{name!r}: {wrong}")
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "bucket")]
    assert outside == []


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """An app over retouchers, which draws small and quickly."""
    return run_app(FakeImageDenoiser(), max_side=256, max_body_bytes=100_000)


def is_well_answered(running_app: RunningApp, answer: Any) -> None:
    """A picture or a refusal that says what is wrong; and the server is alive."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]
    assert running_app.client.get("/healthz").status_code == 200


@pytest.mark.fault(5)
@SHARED
@given(ANY_TEXT)
@example("\ud800")
@example("\0")
@example("\u202e\u200b\u2066")
@example("e\u0301" * 2000)
@example("\U0001f469\u200d\U0001f680")
@example("%s%n{0}${jndi:ldap://x}<script>'\"; DROP TABLE jobs;--")
def test_any_text_is_a_prompt_or_refused(running_app: RunningApp, prompt: str) -> None:
    """Cleaned once it is clean; through the door it is drawn, or refused as 4xx."""
    try:
        assert clean_prompt(clean_prompt(prompt)) == clean_prompt(prompt)
    except ValueError:
        assert any("\ud800" <= letter <= "\udfff" for letter in prompt)
    body = json.dumps({"prompt": prompt, "width": 64, "height": 64}).encode()
    is_well_answered(
        running_app, running_app.client.post(CREATE, content=body, headers={"Content-Type": "application/json"})
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    "prompt width height seed num_inference_steps guidance_scale model format quality save_path scheduler lora "
    "negative_prompt overwrite refine timeout webhook_url image_url strength n".split()
)
SENT = {"prompt": "a red square", "width": 64, "height": 64}


@pytest.mark.fault(3, 7, 8, 9, 10, 14)
@SHARED
@given(st.dictionaries(NAMES, VALUES, max_size=4).map(lambda odd: json.dumps({**SENT, **odd}).encode()))
@example(b"")
@example(b"[]")
@example(b"null")
@example(b'"' + b"a" * 90_000)
@example(b"[" * 20_000)
@example(b'{"prompt": ' + b'{"a":' * 9_000)
@example(b'{"prompt": "a", "prompt": "b"}')
@example(b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}")
@example(b'{"prompt": "a", "width": 1e999}')
@example(b'{"prompt": "a", "width": -0.0}')
@example(b'{"prompt": "\\ud800"}')
@example(b'{"prompt": "a", "\\ud800": 1}')
@example(b"\xef\xbb\xbf{}")
@example(b"\xff\xfe{\0}\0")
@example(b"{'prompt': NaN}")
def test_any_json_is_drawn_or_refused(running_app: RunningApp, body: bytes) -> None:
    """Of every type, nested, infinite, doubled or cut off."""
    is_well_answered(
        running_app, running_app.client.post(CREATE, content=body, headers={"Content-Type": "application/json"})
    )


SDAPI_NAMES = st.sampled_from(
    "prompt negative_prompt seed steps cfg_scale width height sampler_name sampler_index scheduler batch_size n_iter "
    "override_settings alwayson_scripts send_images force_task_id styles enable_hr init_images mask image".split()
)


@pytest.mark.fault(122, 123)
@SHARED
@given(
    st.sampled_from(["/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options", "/sdapi/v1/png-info"]),
    st.dictionaries(SDAPI_NAMES | ANY_TEXT, VALUES, max_size=4),
)
@example("/sdapi/v1/txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"module": "canny", "image": "AAAA"}]}}})
@example("/sdapi/v1/txt2img", {"override_settings": {"sd_model_checkpoint": {"a": []}}})
@example("/sdapi/v1/txt2img", {"prompt": "<lora::::>" * 90 + "[a:b:1." * 90 + "(a:1" * 90})
@example("/sdapi/v1/img2img", {"init_images": ["data:image/png;" * 900 + ",", "\ud800"]})
def test_any_json_to_automatic1111_is_drawn_or_refused(running_app: RunningApp, path: str, odd: dict[str, Any]) -> None:
    """In its own shape, and what is drawn can be told."""
    body = json.dumps({"prompt": "a", "width": 64, "height": 64, **odd}).encode()
    answer = running_app.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    json.loads(answer.content.decode(), parse_constant=pytest.fail)


@pytest.mark.fault(123, 124)
@SHARED
@given(st.text() | VALUES.map(json.dumps) | st.binary().map(lambda data: data.decode("latin-1")), st.integers(0, 300))
@example('{"a":' * 300, 0)
@example('{"a": "\\ud800", "b": 1e999, "c": NaN}', 0)
def test_any_text_is_json_that_can_be_written_again_or_refused(text: str, cut: int) -> None:
    """What is read is what Python's json reads, and comes back the same."""
    body = text.encode("utf-8", "surrogatepass")
    body = body[: len(body) - cut] if cut < len(body) else body
    try:
        found = parse_object(body)
    except ServerError as refused:
        assert refused.status in (400, 413, 422)  # noqa: PT017  # either is right
        return
    assert json.loads(dumps(found)) == found == json.loads(body.decode("utf-8-sig"))


@pytest.mark.fault(121, 125)
@SHARED
@given(
    st.dictionaries(
        st.sampled_from(
            ["Prefer", "X-Job-ID", "Idempotency-Key", "Range", "Last-Event-ID", "Content-Length", "Cookie"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=126)) | st.integers(0, 10**30).map(str),
        max_size=3,
    )
)
@example({"Prefer": "respond-async, wait=" + "9" * 5_000})
@example({"Content-Length": "9" * 5_000})
def test_any_headers_are_read_or_refused(running_app: RunningApp, headers: dict[str, str]) -> None:
    """Whatever they say."""
    body = json.dumps(SENT).encode()
    answer = running_app.client.post(CREATE, content=body, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code < 500, answer.text


HEADS = st.lists(
    st.tuples(
        st.sampled_from(
            ["Content-Disposition", "Content-Type", "Content-Transfer-Encoding", "X", "", "content-length"]
        ),
        st.sampled_from(
            [
                'form-data; name="image_file"; filename="a.png"',
                'form-data; name="prompt"',
                "form-data; name*=utf-8''prompt",
                'form-data; name="prompt',
                "form-data",
                "attachment",
                'form-data; name="image_file"; filename="../../é\\".png"',
                "text/plain; charset=no-such",
                "base64",
                "\0",
                "x" * 5_000,
            ]
        ),
    ),
    max_size=3,
)
PARTS = st.lists(
    st.tuples(HEADS, st.sampled_from([b"a red square", WHOLE[0], b"\xff\xfe", b"--edge", b""])), max_size=4
)


def form_of(parts: list[tuple[list[tuple[str, str]], bytes]]) -> bytes:
    """The body that these parts are."""
    head = (b"\r\n".join(f"{name}: {value}".encode() for name, value in heads) for heads, _ in parts)
    body = b"".join(
        b"--edge\r\n" + one + b"\r\n\r\n" + data + b"\r\n" for one, (_, data) in zip(head, parts, strict=True)
    )
    return body + b"--edge--\r\n"


@pytest.mark.fault(18)
@SHARED
@given(PARTS.map(form_of) | st.binary(max_size=200).map(lambda data: b"--edge\r\n" + data))
@example(b"")
@example(b"--edge--")
@example(b"--edge\r\n\r\n\r\n--edge--\r\n")
@example(b"--edge\r\nContent-Disposition: form-data; name=\r\n\r\n\r\n--edge--\r\n")
@example(b"--edge\r\n" + b"A: b\r\n" * 5_000 + b"\r\n\r\n--edge--\r\n")
@example(b'--edge\r\nContent-Disposition: form-data; name="prompt"; filename="\xff"\r\n\r\na\r\n--edge--\r\n')
@example(b'--edge\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--edge--\r\n')
@example(b"--edge\n" * 1_000)
def test_any_form_is_drawn_or_refused(running_app: RunningApp, body: bytes) -> None:
    """Parts without names, with two, in charsets nobody knows, cut off, or none."""
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    is_well_answered(running_app, running_app.client.post(STYLE, content=body, headers=kind))
