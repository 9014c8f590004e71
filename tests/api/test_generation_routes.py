"""Routes that take images (style transfer, inpainting): every way to send one, every reason for refusal."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import COLOURS, FakeImageDenoiser, disc, file_of, until
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

STYLE = "/style_transfer_and_upload_image"
BYTES = "/style_transfer_bytes_and_upload_image"
INPAINT = "/inpaint_and_upload_image"

PIXELS = disc(96, 80)
IMAGE = file_of(PIXELS)
MASK_PIXELS = np.zeros((80, 96, 3), np.uint8)
MASK_PIXELS[20:60, 30:70] = 255
MASK = file_of(MASK_PIXELS)


@dataclass
class Pictures:
    """A loopback web server with two images; counts its requests."""

    port: int
    asked: list[str] = field(default_factory=list)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    """Serve `image` and `mask`; everything else is 404."""
    files = {"/image": IMAGE, "/mask": MASK, "/other": file_of(disc(96, 80, "green", "white"))}

    class Handler(BaseHTTPRequestHandler):
        """Answers from the table."""

        def do_GET(self) -> None:  # http.server's own name
            served.asked.append(self.path)
            body = files.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keep the test output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Pictures(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp], pictures: Pictures) -> RunningApp:
    """A running app with fake image-to-image models that may fetch from the loopback image server."""
    return run_app(FakeImageDenoiser(), fetch_allow=f"127.0.0.1:{pictures.port}")


def stored(running_app: RunningApp, answer: httpx.Response) -> NDArray[np.uint8]:
    """The stored image of a result."""
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(running_app.client.get(answer.json()["path"]).content)).convert("RGB"))


def post(running_app: RunningApp, path: str, files: dict[str, bytes], **words: Any) -> httpx.Response:
    """A multipart request as `curl -F` sends it."""
    parts = {name: (f"{name}.png", data) for name, data in files.items()}
    return running_app.client.post(path, data={"prompt": "a red square", **words}, files=parts)


def test_the_seeds_curl_call_works_as_printed(running_app: RunningApp) -> None:
    """-F prompt, -F image_file, -F save_path: a result, the input's size, the name prefixed with eight hex digits."""
    photograph = file_of(disc(100, 75), "JPEG", quality=90)
    form = {"prompt": "anime style", "save_path": "output.webp"}
    answer = running_app.client.post(BYTES, data=form, files={"image_file": ("test.jpg", photograph, "image/jpeg")})
    assert stored(running_app, answer).shape == (75, 100, 3)
    receipt = answer.json()
    folder, _, name = receipt["key"].rpartition("/")
    digits, _, rest = name.partition("-")
    assert (folder, rest, len(digits)) == ("static/uploads", "output.webp", 8)
    assert int(digits, 16) >= 0
    assert (receipt["task"], receipt["width"], receipt["height"]) == ("image_to_image", 100, 75)
    (job,) = running_app.squares.finished
    assert job.control is not None
    assert job.strength == 0.6


def test_repeats_of_an_upload_meet_and_other_uploads_never_clash(running_app: RunningApp) -> None:
    """The same request is a cache hit; another image, prompt or strength under the same name is another object."""
    first = post(running_app, BYTES, {"image_file": IMAGE}, save_path="a/output.webp").json()
    again = post(running_app, BYTES, {"image_file": IMAGE}, save_path="a/output.webp").json()
    assert (again["cached"], again["key"], again["warnings"]) == (True, first["key"], first["warnings"])
    others = [
        post(running_app, BYTES, {"image_file": file_of(disc(96, 80, "green"))}, save_path="a/output.webp").json(),
        post(running_app, BYTES, {"image_file": IMAGE}, save_path="a/output.webp", prompt="a blue square").json(),
        post(running_app, BYTES, {"image_file": IMAGE}, save_path="a/output.webp", strength=0.7).json(),
    ]
    assert len({receipt["key"] for receipt in [first, *others]}) == 4
    assert not any(receipt["cached"] for receipt in others)
    assert all(receipt["key"].startswith("static/uploads/a/") for receipt in [first, *others])


@pytest.mark.parametrize("way", ["get query", "post query", "post form", "post json", "post multipart"])
@pytest.mark.parametrize("path", [STYLE, BYTES, INPAINT])
def test_a_picture_can_be_sent_by_its_url_in_every_way(
    running_app: RunningApp, pictures: Pictures, path: str, way: str
) -> None:
    """GET and POST; query, form, multipart and JSON accept `image_url`, and inpainting `mask_url`."""
    asked = {"prompt": "a red square", "save_path": "a.png", "image_url": pictures.url("image")}
    if path == INPAINT:
        asked["mask_url"] = pictures.url("mask")
    ways: dict[str, Callable[[], httpx.Response]] = {
        "get query": lambda: running_app.client.get(path, params=asked),
        "post query": lambda: running_app.client.post(path, params=asked),
        "post form": lambda: running_app.client.post(path, data=asked),
        "post json": lambda: running_app.client.post(path, json=asked),
        "post multipart": lambda: running_app.client.post(path, files={k: (None, v) for k, v in asked.items()}),
    }
    assert stored(running_app, ways[way]()).shape == PIXELS.shape


def test_style_transfer_mixes_the_picture_by_strength_at_its_own_size(running_app: RunningApp) -> None:
    """Edges are in the job only with canny.

    The result has the input's size, although the model draws on a larger canvas.
    """
    plain = stored(running_app, post(running_app, STYLE, {"image_file": IMAGE}, save_path="a.png", strength=0.5))
    assert plain.shape == PIXELS.shape
    job = running_app.squares.finished[-1]
    assert (job.control, job.mask, job.strength, job.width, job.height) == (None, None, 0.5, 128, 128)
    assert 60 < np.abs(plain.astype(int) - PIXELS).max() < 140
    post(running_app, STYLE, {"image_file": IMAGE}, canny=True, control_scale=0.9)
    job = running_app.squares.finished[-1]
    assert job.control is not None
    assert job.control_scale == 0.9
    assert 0 < (job.control.pixels > 0).mean() < 0.1


def test_the_thresholds_of_canny_reach_the_edges(running_app: RunningApp) -> None:
    """Thresholds above every gradient find no edges, and count as another request."""
    edges = []
    for low, high in ((100, 200), (2040, 2040)):
        answer = post(running_app, STYLE, {"image_file": IMAGE}, canny=True, canny_low=low, canny_high=high)
        assert answer.json()["cached"] is False
        edges.append((running_app.squares.finished[-1].control.pixels > 0).sum())
    assert edges[0] > 100 > edges[1] == 0


@pytest.mark.parametrize("ending", ["png", "webp"])
@pytest.mark.parametrize("size", [(96, 80), (128, 128), (300, 170)])
def test_inpainting_keeps_every_pixel_outside_the_mask(
    running_app: RunningApp, ending: str, size: tuple[int, int]
) -> None:
    """Bit-exact in lossless files, also when the image was scaled for the model; inside the mask it is repainted."""
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    files = {"image_file": file_of(image), "mask_file": MASK}
    result = stored(running_app, post(running_app, INPAINT, files, save_path=f"a.{ending}", quality=100))
    mask = np.asarray(Image.fromarray(MASK_PIXELS).convert("L").resize(size, Image.Resampling.BILINEAR))
    assert (result[mask == 0] == image[mask == 0]).all()
    assert np.abs(result[mask == 255].astype(int) - COLOURS["red"]).mean() < 20
    assert running_app.squares.finished[-1].refine


def test_a_feather_softens_the_rim_inside_the_mask_alone(running_app: RunningApp) -> None:
    """Outside nothing changes; the border is between old and new; the centre is new."""
    image = np.full((80, 96, 3), 250, np.uint8)
    files = {"image_file": file_of(image), "mask_file": MASK}
    result = stored(running_app, post(running_app, INPAINT, files, save_path="a.png", feather=8))
    assert (result[MASK_PIXELS == 0] == 250).all()
    row = result[40, 30:50, 1].astype(int)
    assert (np.diff(row) <= 0).all()
    assert 200 < row[0] < 250
    assert row[-1] < 60


@pytest.mark.fault(29)
def test_a_mask_of_another_size_is_fitted(running_app: RunningApp) -> None:
    """A mask a quarter as large covers the same area."""
    small = file_of(MASK_PIXELS[::4, ::4].copy())
    result = stored(
        running_app, post(running_app, INPAINT, {"image_file": IMAGE, "mask_file": small}, save_path="a.png")
    )
    assert (result[:10] == PIXELS[:10]).all()
    assert np.abs(result[40, 50].astype(int) - COLOURS["red"]).max() <= 20


def test_a_known_name_is_answered_without_fetching_or_decoding(running_app: RunningApp, pictures: Pictures) -> None:
    """The existence check comes first: no download, no decoding; the result says whether the request differed."""
    asked = {"prompt": "a red square", "save_path": "a.webp", "image_url": pictures.url("image")}
    first = running_app.client.get(STYLE, params=asked).json()
    assert pictures.asked == ["/image"]
    again = running_app.client.get(STYLE, params=asked).json()
    assert (again["cached"], again["seed"], again["warnings"]) == (True, first["seed"], first["warnings"])
    other = running_app.client.get(STYLE, params={**asked, "image_url": pictures.url("gone")}).json()
    assert [warning["code"] for warning in other["warnings"]] == ["different-request"]
    assert pictures.asked == ["/image"]
    broken = post(running_app, STYLE, {"image_file": b"no picture"}, save_path="a.webp")
    assert (broken.status_code, broken.json()["cached"]) == (200, True)


def test_overwriting_fetches_and_draws_again(running_app: RunningApp, pictures: Pictures) -> None:
    """`overwrite` skips the existence check."""
    asked = {"prompt": "a red square", "save_path": "a.webp", "image_url": pictures.url("image"), "overwrite": True}
    receipts = [running_app.client.get(STYLE, params=asked).json() for _ in range(2)]
    assert [receipt["cached"] for receipt in receipts] == [False, False]
    assert len(running_app.squares.finished) == 2


def test_the_same_bytes_by_address_or_file_are_the_same_picture(running_app: RunningApp, pictures: Pictures) -> None:
    """The digest is of the content: without a name both yield one object with one seed."""
    by_url = running_app.client.get(STYLE, params={"prompt": "a red square", "image_url": pictures.url("image")}).json()
    by_file = post(running_app, STYLE, {"image_file": IMAGE}).json()
    other = running_app.client.get(STYLE, params={"prompt": "a red square", "image_url": pictures.url("other")}).json()
    assert by_url["key"] == by_file["key"] != other["key"]
    assert (by_url["seed"], by_file["cached"]) == (by_file["seed"], True)


def test_identical_orders_at_once_are_one_download_and_one_generation(
    run_app: Callable[..., RunningApp], pictures: Pictures
) -> None:
    """Ten callers, one image generated; callers that arrive during the download share it."""
    running_app = run_app(FakeImageDenoiser(seconds_per_step=0.05), fetch_allow=f"127.0.0.1:{pictures.port}")
    asked = {"prompt": "a red square", "image_url": pictures.url("image")}
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: running_app.client.get(STYLE, params=asked), range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["key"] for answer in answers}) == 1
    assert len(running_app.squares.finished) == 1
    assert len(pictures.asked) <= 10


ONE = {"image_file": IMAGE}
BOTH = {"image_file": IMAGE, "mask_file": MASK}
REFUSED: list[tuple[str, str, dict[str, bytes], dict[str, Any], int, set[str]]] = [
    ("no picture", STYLE, {}, {}, 422, {"image_url", "image_file"}),
    ("no picture at the bytes endpoint", BYTES, {}, {}, 422, {"image_url", "image_file"}),
    ("no mask", INPAINT, ONE, {}, 422, {"mask_url", "mask_file"}),
    ("neither", INPAINT, {}, {}, 422, {"image_url", "image_file", "mask_url", "mask_file"}),
    ("two pictures", STYLE, ONE, {"image_url": "http://a.example/"}, 422, {"image_url", "image_file"}),
    ("two masks", INPAINT, BOTH, {"mask_url": "http://a.example/"}, 422, {"mask_url", "mask_file"}),
    ("text for a file", STYLE, {}, {"image_file": "hello"}, 422, {"image_file"}),
    ("a file for a word", STYLE, {"prompt": b"x", **ONE}, {}, 422, {"prompt"}),
    ("a file no one asked for", STYLE, {"mask_file": MASK}, {}, 422, {"mask_file"}),
    ("a mask for style transfer", STYLE, ONE, {"mask_url": "http://a.example/"}, 422, {"mask_url"}),
    ("a width for style transfer", STYLE, ONE, {"width": 512}, 422, {"width"}),
    ("canny for inpainting", INPAINT, BOTH, {"canny": True}, 422, {"canny"}),
    ("a feather for style transfer", STYLE, ONE, {"feather": 3}, 422, {"feather"}),
    ("strength below 0", STYLE, ONE, {"strength": -0.01}, 422, {"strength"}),
    ("strength above 1", STYLE, ONE, {"strength": 1.01}, 422, {"strength"}),
    ("strength NaN", STYLE, ONE, {"strength": "nan"}, 422, {"strength"}),
    ("strength 0", STYLE, ONE, {"strength": 0}, 422, {"strength", "num_inference_steps"}),
    ("no step left", STYLE, ONE, {"strength": 0.24}, 422, {"strength", "num_inference_steps"}),
    ("no step left inpainting", INPAINT, BOTH, {"strength": 0.2}, 422, {"strength", "num_inference_steps"}),
    ("canny perhaps", STYLE, ONE, {"canny": "perhaps"}, 422, {"canny"}),
    ("thresholds swapped", STYLE, ONE, {"canny_low": 201}, 422, {"canny_low", "canny_high"}),
    ("threshold over the limit", STYLE, ONE, {"canny_high": 2041}, 422, {"canny_high"}),
    ("control_scale over the limit", STYLE, ONE, {"control_scale": 2.01}, 422, {"control_scale"}),
    ("feather over the limit", INPAINT, BOTH, {"feather": 257}, 422, {"feather"}),
    ("half a feather", INPAINT, BOTH, {"feather": 1.5}, 422, {"feather"}),
    ("a path as adapter", STYLE, ONE, {"lora": "../../etc/passwd"}, 422, {"lora"}),
    ("an adapter's weight as words", STYLE, ONE, {"lora": "pastel:much"}, 422, {"lora"}),
    ("an adapter too heavy", STYLE, ONE, {"lora": "pastel:2.1"}, 422, {"lora"}),
    ("five adapters", STYLE, ONE, {"lora": "a,b,c,d,e"}, 422, {"lora"}),
    ("an empty file", STYLE, {"image_file": b""}, {}, 415, {"image_file"}),
    ("html as a picture", STYLE, {"image_file": b"<html>"}, {}, 415, {"image_file"}),
    ("a gif", STYLE, {"image_file": file_of(PIXELS, "GIF")}, {}, 415, {"image_file"}),
    ("half a picture", STYLE, {"image_file": IMAGE[: len(IMAGE) // 2]}, {}, 422, {"image_file"}),
    ("half a mask", INPAINT, {**ONE, "mask_file": MASK[:80]}, {}, 422, {"mask_file"}),
    ("a black mask", INPAINT, {**ONE, "mask_file": file_of(MASK_PIXELS * 0)}, {}, 422, {"mask_file"}),
    ("a file address", STYLE, {}, {"image_url": "file:///etc/passwd"}, 422, {"image_url"}),
    ("our own loopback", STYLE, {}, {"image_url": "http://127.0.0.1:8000/healthz"}, 422, {"image_url"}),
    ("the metadata service", STYLE, {}, {"image_url": "http://169.254.169.254/"}, 422, {"image_url"}),
    ("a mask inside", INPAINT, ONE, {"mask_url": "http://[::1]/"}, 422, {"mask_url"}),
]


@pytest.mark.fault(12, 17, 19, 20, 21, 29, 33)
@pytest.mark.parametrize(
    ("path", "files", "words", "status", "fields"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_bad_request_is_a_problem_that_names_the_field(
    running_app: RunningApp, path: str, files: dict[str, bytes], words: dict[str, Any], status: int, fields: set[str]
) -> None:
    """4xx as problem+json with every invalid field; nothing is generated, and the next request works."""
    answer = post(running_app, path, files, **words)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert {fault["field"] for fault in answer.json().get("errors", [])} == fields
    assert running_app.squares.finished == []
    assert post(running_app, STYLE, ONE).status_code == 200


def test_a_remote_that_fails_is_502_and_names_the_field(running_app: RunningApp, pictures: Pictures) -> None:
    """A 404 from the remote is neither the caller's invalid parameter nor our error."""
    answer = running_app.client.get(STYLE, params={"prompt": "a red square", "image_url": pictures.url("gone")})
    assert (answer.status_code, answer.json()["field"]) == (502, "image_url")


@pytest.mark.parametrize("name", ["strength", "feather", "canny_low", "canny_high", "control_scale"])
def test_true_is_no_number(running_app: RunningApp, name: str) -> None:
    """JSON's true is not 1."""
    path = INPAINT if name == "feather" else STYLE
    answer = running_app.client.post(
        path, json={"prompt": "a red square", "image_url": "http://a.example/", name: True}
    )
    assert (answer.status_code, answer.json()["field"]) == (422, name)


def test_a_full_queue_is_reported_before_anything_is_fetched_or_decoded(
    run_app: Callable[..., RunningApp], pictures: Pictures
) -> None:
    """429 with Retry-After at once: a refused request costs no download and no decoder process."""
    gate = threading.Event()
    running_app = run_app(
        FakeImageDenoiser(gate=gate), fetch_allow=f"127.0.0.1:{pictures.port}", queue_limit=1, max_batch=1
    )
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running_app.draw, prompt="a red square")
        until(lambda: len(running_app.squares.prepared) == 1)
        second = pool.submit(running_app.draw, prompt="a blue square")
        until(lambda: running_app.metric("sds_queue_waiting") == 1)
        by_url = running_app.client.get(STYLE, params={"prompt": "a red square", "image_url": pictures.url("image")})
        by_file = post(running_app, STYLE, {"image_file": b"no picture"})
        gate.set()
        assert {first.result().status_code, second.result().status_code} == {200}
    assert {by_url.status_code, by_file.status_code} == {429}
    assert by_url.headers["retry-after"]
    assert pictures.asked == []


def test_limits_of_bytes_hold_on_both_sides_of_their_edges(run_app: Callable[..., RunningApp]) -> None:
    """MAX_IMAGE_BYTES is accepted and one byte more is 413; so is a multipart body over MAX_UPLOAD_BYTES."""
    running_app = run_app(FakeImageDenoiser(), max_image_bytes=3000, max_upload_bytes=8000, max_body_bytes=1024)
    assert post(running_app, STYLE, {"image_file": IMAGE.ljust(3000, b"\0")}).status_code == 200
    over = post(running_app, STYLE, {"image_file": IMAGE.ljust(3001, b"\0")})
    assert (over.status_code, over.json()["field"]) == (413, "image_file")
    body = post(running_app, STYLE, {"image_file": IMAGE.ljust(8000, b"\0")})
    assert (body.status_code, body.headers["content-type"]) == (413, "application/problem+json")

    def in_pieces() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image_file"; filename="a"\r\n\r\n'
        for _ in range(20):
            yield b"\0" * 1000

    streamed = running_app.client.post(
        STYLE, content=in_pieces(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert streamed.status_code == 413
    json_body = running_app.client.post(STYLE, json={"prompt": "x" * 8000, "image_url": "http://a.example/"})
    assert json_body.status_code == 413


def test_a_picture_may_come_in_base64(run_app: Callable[..., RunningApp]) -> None:
    """A data URL in JSON equals the file; an invalid one is refused by field name."""
    running_app = run_app(FakeImageDenoiser())
    by_file = post(running_app, STYLE, {"image_file": IMAGE}).json()
    data_url = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
    by_text = running_app.client.post(STYLE, json={"prompt": "a red square", "image_url": data_url}).json()
    assert (by_text["key"], by_text["cached"]) == (by_file["key"], True)
    for wrong in ("data:image/png;base64,", "data:image/png;base64,%%", "data:,a", "data:"):
        refused = running_app.client.post(STYLE, json={"prompt": "a red square", "image_url": wrong})
        assert (refused.status_code, refused.json()["field"]) == (422, "image_url")


@pytest.mark.fault(24)
def test_limits_of_pixels_hold_on_both_sides_of_their_edges(run_app: Callable[..., RunningApp]) -> None:
    """At MAX_IMAGE_PIXELS and MAX_IMAGE_SIDE an image is accepted; above, 422 names the setting."""
    running_app = run_app(FakeImageDenoiser(), max_image_pixels=10_000, max_image_side=200)
    for width, height, status in ((100, 100, 200), (200, 50, 200), (101, 100, 422), (201, 10, 422)):
        answer = post(running_app, STYLE, {"image_file": file_of(np.full((height, width, 3), 9, np.uint8))})
        assert answer.status_code == status, answer.text


@pytest.mark.fault(30)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 65), (1500, 20)])
def test_a_picture_of_any_shape_comes_back_at_its_size(running_app: RunningApp, size: tuple[int, int]) -> None:
    """Down to a single pixel, the result has exactly the input's size."""
    answer = post(
        running_app, STYLE, {"image_file": file_of(np.full((size[1], size[0], 3), 99, np.uint8))}, save_path="a.png"
    )
    assert stored(running_app, answer).shape == (size[1], size[0], 3)


@pytest.mark.fault(54)
def test_quality_checks_are_reported_in_the_receipt(run_app: Callable[..., RunningApp]) -> None:
    """Black, then good.

    Returned with a warning and the seed used. Black twice: returned with a warning, nothing crashes.
    """
    painters = FakeImageDenoiser(
        spoil=["black", "", "black", "black", "bumpy", "bumpy", "very bumpy", "not finite", ""]
    )
    running_app = run_app(painters, bumpy_retries="2")
    codes = []
    for name in "abcd":
        receipt = running_app.draw(prompt="a red square", width=128, height=128, save_path=f"{name}.webp").json()
        codes.append([warning["code"] for warning in receipt["warnings"]])
    black = ["redrawn-black"]
    assert codes == [black, [*black, "black"], ["redrawn-bumpy", "bumpy"], ["redrawn-not-finite"]]
    assert painters.spoil == []


@pytest.mark.fault(54)
def test_numbers_that_are_never_finite_are_a_named_error_and_store_nothing(run_app: Callable[..., RunningApp]) -> None:
    """One retry with a new seed, then 500 with its own problem type; the next request under the name succeeds."""
    running_app = run_app(FakeImageDenoiser(spoil=["not finite", "not finite"]))
    answer = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (answer.status_code, answer.json()["type"].rsplit(":", 1)[1]) == (500, "not-finite")
    assert running_app.draw(prompt="a red square", save_path="a.webp").json()["cached"] is False


def test_the_picture_tells_how_a_redraw_was_made(run_app: Callable[..., RunningApp]) -> None:
    """prompt_used, steps and seed are those of the returned attempt."""
    running_app = run_app(FakeImageDenoiser(spoil=["bumpy", ""]), bumpy_retries="1")
    receipt = running_app.draw(prompt="a red square", width=128, height=128).json()
    assert receipt["prompt_used"] == "a red square detail"
    assert receipt["num_inference_steps"] == 5
