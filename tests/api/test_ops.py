"""The operator's doors and the files of the local bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import House
from fakes import PaintedSquares, settings_in, until
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stable_diffusion_server.api import handlers
from stable_diffusion_server.api.ops import files_router
from stable_diffusion_server.app import create_app
from stable_diffusion_server.buckets.memory import MemoryBucket
from stable_diffusion_server.errors import WeightsUnusable


@pytest.fixture
def picture(house: House) -> httpx.Response:
    """A stored picture, fetched."""
    return house.client.get(house.draw(prompt="a red square", save_path="a.webp").json()["path"])


def again(house: House, **headers: str) -> httpx.Response:
    return house.client.get(
        "/files/static/uploads/a.webp", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_a_picture_comes_with_its_type_and_may_be_kept_for_ever(picture: httpx.Response) -> None:
    """Content type, length, a strong ETag, immutable caching, and nothing for a browser to guess."""
    headers = picture.headers
    assert headers["content-type"] == "image/webp"
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["etag"].startswith('"')
    assert headers["x-content-type-options"] == "nosniff"
    assert int(headers["content-length"]) == len(picture.content)


def test_a_known_etag_is_answered_304(house: House, picture: httpx.Response) -> None:
    """Exact, weak, listed and star: 304 without a body; another one: the picture."""
    etag = picture.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = again(house, if_none_match=known)
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert again(house, if_none_match='"other"').status_code == 200


def test_a_range_is_answered_in_part(house: House, picture: httpx.Response) -> None:
    """First bytes, last bytes, one byte; beyond the end is 416."""
    size = len(picture.content)
    for wanted, part in (("0-9", slice(0, 10)), ("-5", slice(size - 5, size)), ("7-7", slice(7, 8))):
        answer = again(house, range=f"bytes={wanted}")
        assert (answer.status_code, answer.content) == (206, picture.content[part])
    assert again(house, range=f"bytes={size}-").status_code == 416
    for no_range in ("lines=1-2", "bytes", "bytes=a-b", "bytes=-"):
        assert again(house, range=no_range).content == picture.content


def test_a_range_of_another_version_gets_the_whole_picture(house: House, picture: httpx.Response) -> None:
    """If-Range keeps parts of two pictures from being glued together."""
    assert again(house, range="bytes=0-9", if_range='"other"').content == picture.content
    assert len(again(house, range="bytes=0-9", if_range=picture.headers["etag"]).content) == 10


def test_head_tells_without_sending(house: House, picture: httpx.Response) -> None:
    """The same headers and no body."""
    answer = house.client.head("/files/static/uploads/a.webp")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == picture.headers["content-length"]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "none.webp",
            "static/uploads",
            "static/uploads/",
            "",
            "../data/progress.txt",
            "%2e%2e/secret",
            "%2e%2e%2fsecret",
            "..%2fsecret",
        ),
        *("static/uploads/../../records/static/uploads/a.webp", "/etc/passwd", "%2Fetc%2Fpasswd", "a%00b", "x" * 300),
        *("static/uploads/a.webp/below", "....//", "%5c..%5c"),
    ],
)
def test_nothing_but_pictures_is_served(house: House, picture: httpx.Response, path: str) -> None:
    """Absent, folders, and every way out of the bucket: 404, although there is something to be found."""
    (house.folder / "bucket" / "secret").write_text("secret")
    assert (house.folder / "bucket" / "records" / "static" / "uploads" / "a.webp").is_file()
    answer = house.client.get(f"/files/{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_file_that_is_no_picture_is_not_shown_inline(house: House) -> None:
    """HTML put into the folder by hand must not run under this server's name."""
    folder = house.folder / "bucket" / "objects"
    (folder / "page.html").write_text("<script>alert(1)</script>")
    answer = house.client.get("/files/page.html")
    assert answer.headers["content-disposition"] == "attachment"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_the_process_is_alive_before_it_can_draw(tmp_path: Path) -> None:
    """While the models load: /healthz 200, /readyz 503 with the reason, orders 503 with Retry-After; then all 200."""
    gate = threading.Event()

    def load(settings: object) -> PaintedSquares:
        gate.wait(30)
        return PaintedSquares()

    app = create_app(settings_in(tmp_path), load=load)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        order = {"prompt": "a red square", "width": 64, "height": 64}
        assert client.get("/healthz").json() == {"status": "ok"}
        early = client.get("/readyz")
        assert (early.status_code, early.json()["missing"]) == (503, ["The models are loading."])
        refused = client.get("/create_and_upload_image", params=order)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        gate.set()
        until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/create_and_upload_image", params=order).status_code == 200


def test_models_that_cannot_be_loaded_leave_the_server_up_and_told(tmp_path: Path) -> None:
    """/readyz gives the sentence, and what is stored is still served."""

    def load(settings: object) -> PaintedSquares:
        raise WeightsUnusable("The model sdxl is missing: no model_index.json in embedded-sdxl.")

    app = create_app(settings_in(tmp_path), load=load)
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: "missing: no" in client.get("/readyz").text)
        assert client.get("/healthz").status_code == 200
        assert client.get("/create_and_upload_image?prompt=a").status_code == 503


def test_a_bucket_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    """A file where the folder should be: one sentence in /readyz, 503 for orders, no crash."""
    (tmp_path / "bucket").write_text("in the way")
    app = create_app(settings_in(tmp_path), load=lambda settings: PaintedSquares())
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 5)) as client:
        until(lambda: len(client.get("/readyz").json()["missing"]) == 1)
        assert "folder of pictures" in client.get("/readyz").json()["missing"][0]
        assert client.get("/create_and_upload_image?prompt=a").status_code == 503
        assert 'outcome="started"' not in client.get("/metrics").text, "nothing is drawn in vain"
        (tmp_path / "bucket").unlink()
        assert client.get("/readyz").status_code == 200, "a mended folder is noticed without a restart"
        assert client.get("/create_and_upload_image?prompt=a").status_code == 200


def test_the_figures_count_what_happened(house: House) -> None:
    """One drawn, one cached: the counters say so, and steps are counted."""
    for _ in range(2):
        house.draw(prompt="a red square", save_path="a.webp")
    assert house.metric('sds_jobs_total{outcome="done"}') == 1
    assert house.metric('sds_orders_total{source="drawn"}') == 1
    assert house.metric('sds_orders_total{source="cached"}') == 1
    assert house.metric("sds_steps_total") == 4


def test_the_heartbeat_is_written_while_drawing(house: House) -> None:
    """progress.txt holds a time of day after a picture, as the seed document says."""
    house.draw(prompt="a red square")
    text = (house.folder / "data" / "progress.txt").read_text()
    assert len(text.strip().split(":")) == 3


def test_keys_and_prompts_stay_out_of_the_log(
    house_of: Callable[..., House], capfd: pytest.CaptureFixture[str]
) -> None:
    """Requests are logged by path and id; an error's traceback has no local variables."""
    house = house_of(api_keys="hunter2", log_format="json")
    headers = {"X-API-Key": "hunter2", "X-Request-ID": "the-id"}
    for prompt in ("a secret square", "an unpreparable secret square"):
        house.client.get("/create_and_upload_image", params={"prompt": prompt}, headers=headers)
    house.client.get("/create_and_upload_image", params={"prompt": "a secret square"}, headers={"X-API-Key": "hunter3"})
    logged = "".join(capfd.readouterr())
    assert '"request_id": "the-id"' in logged
    assert "cannot prepare this" in logged
    assert not [word for word in ("secret", "hunter2", "hunter3") if word in logged]


class SigningBucket(MemoryBucket):
    """A private bucket: whoever has one of its addresses can read."""

    def url(self, key: str) -> str:
        return f"https://bucket.example/{key}?signature=secret"


@pytest.mark.parametrize("private", [True, False])
def test_the_files_door_signs_nothing_for_strangers(private: bool) -> None:
    """No address of a private bucket, and none of what lies beside the pictures in any bucket."""
    bucket = SigningBucket()
    bucket.open()
    for key in ("static/uploads/a.webp", "backups/db.sql", "static/uploads-not/a.webp"):
        bucket.create(key, b"data", "image/webp", {})
    app = FastAPI()
    app.include_router(files_router(bucket, "static/uploads/", private=private))
    handlers.install(app)
    with TestClient(app, follow_redirects=False) as client:
        picture = client.get("/files/static/uploads/a.webp")
        assert picture.status_code == (404 if private else 307)
        for other in ("backups/db.sql", "static/uploads-not/a.webp", "static/uploads/../../backups/db.sql"):
            answer = client.get(f"/files/{other}")
            assert answer.status_code == 404
            assert "signature" not in str(answer.headers)
