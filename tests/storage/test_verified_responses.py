"""False or malformed storage responses: each becomes one of our errors, and no image is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import RunningApp
from fakes import until
from storage_servers import (
    KEYS,
    MisbehavingStore,
    Said,
    StorageServer,
    gcs_options,
    make_gcs_bucket,
    make_s3_bucket,
    opened,
    r2_options,
    s3_client,
)

from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.storage.base import Bucket

pytestmark = pytest.mark.slow

HTML = Said(200, b"<html><body>Welcome to the hotel's network</body></html>", {"Content-Type": "text/html"})
PORTAL = Said(200, HTML.content, {**HTML.headers, "ETag": '"portal"'})
NOTHING = Said(200)
ETAG_X = Said(200, b"", {"ETag": '"x"'})


@pytest.fixture
def behind(
    s3_server: StorageServer, rascal_before: Callable[[StorageServer], MisbehavingStore]
) -> tuple[str, MisbehavingStore]:
    """A new bucket's name, and the proxy in front of it."""
    return make_s3_bucket(s3_server), rascal_before(s3_server)


@pytest.fixture
def bucket(behind: tuple[str, MisbehavingStore]) -> Bucket:
    """The bucket, opened."""
    return opened(r2_options(behind[1].url, behind[0], storage_timeout=20.0))


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp], behind: tuple[str, MisbehavingStore]) -> RunningApp:
    """A server that stores there, without an existence cache."""
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    where = {"bucket_name": behind[0], "r2_endpoint_url": behind[1].url}
    return run_app(storage_provider="r2", storage_timeout=20.0, existence_cache_size=0, **where, **keys)


def answering(said: str | Said, *methods: str) -> Callable[[str, str, Mapping[str, str]], str | Said]:
    """The same response to every request with these methods."""
    return lambda method, path, headers: said if method in methods else ""


@pytest.mark.fault(134)
@pytest.mark.parametrize(
    ("said", "methods"),
    [
        (NOTHING, ["PUT"]),
        (ETAG_X, ["PUT"]),
        (PORTAL, ["PUT"]),
        (PORTAL, ["PUT", "HEAD"]),
        (NOTHING, ["PUT", "HEAD", "GET"]),
        (Said(204, b"", {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'}), ["PUT"]),
        (Said(404, HTML.content, HTML.headers), ["PUT"]),
    ],
)
def test_a_write_that_is_only_said_to_be_done_is_spooled_and_brought_later(
    running_app: RunningApp,
    behind: tuple[str, MisbehavingStore],
    s3_server: StorageServer,
    said: Said,
    methods: list[str],
) -> None:
    """The result says that the image is not stored; it is in the bucket soon after the storage recovers."""
    behind[1].rule = answering(said, *methods)
    answer = running_app.draw(prompt="a red square", save_path="a.webp")
    assert (answer.status_code, answer.json()["stored"]) == (200, False), answer.text
    assert running_app.metric("sds_spool_pictures") == 1
    behind[1].rule = answering("")
    until(lambda: running_app.metric("sds_spool_pictures") == 0, 60)
    body = s3_client(s3_server.url).get_object(Bucket=behind[0], Key="static/uploads/a.webp")["Body"].read()
    assert body[8:12] == b"WEBP"


@pytest.mark.fault(134)
def test_a_big_object_whose_parts_are_swallowed_is_not_believed(
    bucket: Bucket, behind: tuple[str, MisbehavingStore]
) -> None:
    """Multipart upload: a response without upload id, a part without ETag, and a completion of something different."""
    data = b"d" * (17 * 2**20)
    for said, query in ((NOTHING, "uploads"), (NOTHING, "partNumber=1"), (HTML, "uploadId")):
        asked = {"uploads": "POST", "partNumber=1": "PUT", "uploadId": "POST"}[query]
        behind[1].rule = lambda method, path, headers, said=said, query=query, asked=asked: (  # type: ignore[misc]  # bound for this turn
            said if method == asked and query in path else ""
        )
        with pytest.raises(StorageUnavailable):
            bucket.overwrite("big", data, "image/png", {})
    behind[1].rule = answering("")
    assert bucket.overwrite("big", data, "image/png", {}).size == len(data)


@pytest.mark.fault(134)
def test_a_store_whose_etags_are_no_md5_is_looked_at_and_believed(
    bucket: Bucket, behind: tuple[str, MisbehavingStore]
) -> None:
    """As with SSE-KMS: a stat of size and writer confirms the write; the object is found and read."""

    def rule(method: str, path: str, headers: Mapping[str, str]) -> str | Said:
        return Said(200, b"", {"ETag": '"0123456789abcdef0123456789abcdef"'}, after=True) if method != "GET" else ""

    behind[1].rule = rule
    assert bucket.create("k", b"data", "image/webp", {"seed": "7"})[1]
    stored = bucket.stat("k")
    assert stored is not None
    assert (stored.size, dict(stored.record), bucket.read("k")) == (4, {"seed": "7"}, b"data")


@pytest.mark.fault(135)
@pytest.mark.parametrize("said", [NOTHING, HTML, PORTAL, Said(200, b"", {"ETag": ""}), "noise", "close"])
def test_an_answer_to_a_look_that_tells_nothing_is_of_the_storage(
    bucket: Bucket, behind: tuple[str, MisbehavingStore], said: str | Said
) -> None:
    """Without ETag or length, or not HTTP at all: one sentence, and never a missing object."""
    bucket.create("k.webp", b"data", "image/webp", {})
    behind[1].rule = answering(said, "HEAD")
    if said is PORTAL:  # a page that has an ETag by chance
        assert bucket.stat("k.webp") is None
        return
    with pytest.raises(StorageUnavailable) as raised:
        bucket.stat("k.webp")
    assert raised.value.detail.endswith(".")


@pytest.mark.fault(135)
@pytest.mark.parametrize("said", [NOTHING, HTML, "reset", "noise", "close"])
def test_an_answer_to_a_read_that_is_no_object_is_of_the_storage(
    bucket: Bucket, behind: tuple[str, MisbehavingStore], said: str | Said
) -> None:
    """No bytes, an HTML page, half the object: an error, never an empty or truncated image."""
    bucket.create("k", b"data" * 100, "image/webp", {})
    behind[1].rule = answering(said, "GET")
    with pytest.raises(StorageUnavailable):
        bucket.read("k")
    behind[1].rule = answering("")
    assert bucket.read("k") == b"data" * 100


@pytest.mark.fault(135)
def test_a_store_that_knows_no_ranges_gives_the_part_all_the_same(
    bucket: Bucket, behind: tuple[str, MisbehavingStore]
) -> None:
    """The store answers a range request with the whole object and status 200: the bucket cuts out the range."""
    bucket.create("k", b"0123456789", "image/webp", {})
    behind[1].drops.add("Range")
    assert (bucket.read("k", 3, 5), bucket.read("k", 8), bucket.read("k", 20)) == (b"34", b"89", b"")


def replaced(server: StorageServer, name: str, key: str, body: bytes, **more: Any) -> None:
    s3_client(server.url).put_object(Bucket=name, Key=key, Body=body, **more)


@pytest.mark.fault(135)
@pytest.mark.parametrize(
    "garbage", ["html", "zeros of the length", "empty", "cut", "half a picture", "of another type"]
)
def test_garbage_in_the_bucket_is_drawn_again(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer, garbage: str
) -> None:
    """Replaced by another program, with the object's own metadata or without: the request generates a new image."""
    key = running_app.draw(prompt="a red square", save_path="a.webp").json()["key"]
    client = s3_client(s3_server.url)
    there = client.get_object(Bucket=behind[0], Key=key)
    data, about = there["Body"].read(), {"Metadata": there["Metadata"], "ContentType": there["ContentType"]}
    bodies: dict[str, tuple[bytes, dict[str, Any]]] = {
        "html": (b"<html>garbage</html>", {}),
        "zeros of the length": (bytes(len(data)), about),
        "empty": (b"", about),
        "cut": (data[:-9], about),
        "half a picture": (data[:-9], {}),
        "of another type": (b"%PDF-1.7 of the accounts", {"ContentType": "application/pdf"}),
    }
    body, more = bodies[garbage]
    replaced(s3_server, behind[0], key, body, **more)
    asked = {"prompt": "a red square", "save_path": "a.webp", "width": 64, "height": 64}
    for _ in range(2):
        answer = running_app.client.post("/make_image", json=asked)
        assert (answer.status_code, answer.content[8:12]) == (200, b"WEBP"), answer.text[:200]
    assert running_app.client.get(f"/files/{key}").content == answer.content
    assert client.get_object(Bucket=behind[0], Key=key)["Body"].read() == answer.content


@pytest.mark.fault(135)
def test_what_someone_else_put_there_is_never_drawn_over(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], s3_server: StorageServer
) -> None:
    """An image of any kind, or a file that is not an image: reported as another request's object and left as it is."""
    running_app.draw(prompt="a red square", save_path="a.webp")
    for key, body in (("b.webp", b"GIF89a of another"), ("c.png", b"\0\0\0\x1cftypavif0000"), ("conf", b'{"a": 1}')):
        replaced(s3_server, behind[0], f"static/uploads/{key}", body)
        answer = running_app.draw(prompt="a red square", save_path=key).json()
        assert (answer["cached"], answer["warnings"][0]["code"]) == (True, "different-request")
        kept = s3_client(s3_server.url).get_object(Bucket=behind[0], Key=f"static/uploads/{key}")["Body"].read()
        assert kept == body
    refused = running_app.client.post("/make_image", json={"prompt": "a red square", "save_path": "conf"})
    assert refused.status_code == 503, "no picture is answered as one"


@pytest.mark.fault(135)
@pytest.mark.parametrize("said", [NOTHING, PORTAL, "reset", "close"])
def test_a_read_that_fails_is_no_empty_picture(
    running_app: RunningApp, behind: tuple[str, MisbehavingStore], said: str | Said
) -> None:
    """/make_image of a stored image while GET fails: an error, and afterwards the image."""
    asked = {"prompt": "a red square", "save_path": "a.webp", "width": 64, "height": 64}
    picture = running_app.client.post("/make_image", json=asked).content
    behind[1].rule = answering(said, "GET")
    answer = running_app.client.post("/make_image", json=asked)
    assert answer.status_code == 503 or answer.content[8:12] == b"WEBP", answer.text[:200]
    assert answer.headers["content-type"] in ("application/problem+json", "image/webp")
    behind[1].rule = answering("")
    until(lambda: running_app.client.post("/make_image", json=asked).content == picture)


@pytest.fixture
def google(
    gcs_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Bucket, MisbehavingStore, str]:
    """An open bucket at the emulator behind a proxy, and the bucket's name."""
    rascal = rascal_before(gcs_server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", rascal.url)
    name = make_gcs_bucket(gcs_server)
    return opened(gcs_options(name, storage_timeout=3.0)), rascal, name


JSON = {"Content-Type": "application/json"}


@pytest.mark.fault(134, 135)
@pytest.mark.parametrize(
    "said", [NOTHING, HTML, Said(200, b"{}", JSON), Said(200, b"[]", JSON), Said(200, b'{"a', JSON)]
)
def test_googles_answers_are_checked_too(google: tuple[Bucket, MisbehavingStore, str], said: Said) -> None:
    """Write, stat and read: one sentence each for an HTML page, an empty body, and unrelated JSON."""
    bucket, rascal, _ = google
    bucket.create("k", b"data", "image/webp", {})
    rascal.rule = answering(said, "GET", "POST")
    for call in (
        lambda: bucket.create("other", b"data", "image/webp", {}),
        lambda: bucket.overwrite("k", b"data", "image/webp", {}),
        lambda: bucket.stat("k"),
    ):
        with pytest.raises(StorageUnavailable) as raised:
            call()
        assert raised.value.detail.endswith(".")
    rascal.rule = answering("")
    assert bucket.read("k") == b"data"
    assert bucket.stat("other") is None


@pytest.mark.fault(134)
def test_googles_word_for_a_write_is_compared_with_what_is_there(google: tuple[Bucket, MisbehavingStore, str]) -> None:
    """Valid JSON about another object is not accepted."""
    bucket, rascal, _ = google
    facts = b'{"name": "k", "bucket": "b", "size": "4", "generation": "1", "md5Hash": "AAAA", "etag": "e"}'
    rascal.rule = answering(Said(200, facts, JSON), "POST")
    with pytest.raises(StorageUnavailable, match="does not have it"):
        bucket.create("k", b"data", "image/webp", {})


@pytest.mark.fault(135)
@pytest.mark.parametrize("garbage", [b"\0" * 8, b"<html>not a picture</html>", b""])
def test_garbage_at_google_counts_as_absent(google: tuple[Bucket, MisbehavingStore, str], garbage: bytes) -> None:
    """Same length with the original metadata, or any length without metadata."""
    bucket, _, _ = google
    bucket.create("k.webp", b"8 bytes!", "image/webp", {"bytes": "8"})
    blob = bucket._bucket.blob("k.webp")  # type: ignore[attr-defined]  # Google's client
    blob.metadata = bucket._bucket.get_blob("k.webp").metadata if len(garbage) == 8 else None  # type: ignore[attr-defined]  # likewise
    blob.upload_from_string(garbage, "image/webp")
    assert bucket.stat("k.webp") is None
    assert bucket.create("k.webp", b"8 bytes!", "image/webp", {"bytes": "8"})[1]
    assert bucket.read("k.webp") == b"8 bytes!"
    with pytest.raises(NotFound):
        bucket.read("none")


@pytest.mark.fault(178)
@pytest.mark.parametrize(
    "fact",
    [
        {"metadata": {"prompt": {"a": 1}}},
        {"metadata": {"seed": None}},
        {"metadata": ["x"]},
        {"contentType": "image/webp\r\nX-Evil: 1"},
        {"contentType": 5},
        {"etag": [{}]},
        {"etag": "a\r\nb"},
        {"etag": "\ud800"},
        {"size": "-5"},
    ],
)
def test_facts_of_google_that_are_none_are_of_the_storage(
    google: tuple[Bucket, MisbehavingStore, str], fact: dict[str, Any]
) -> None:
    """A write response with the right checksum but metadata that no result or header can hold is not accepted."""
    bucket, rascal, _ = google
    right = {
        "name": "k",
        "bucket": "b",
        "size": "4",
        "generation": "1",
        "md5Hash": "jXd/OF09/siBXSD3SWAm3A==",
        "etag": "e",
    }
    rascal.rule = answering(Said(200, json.dumps({**right, "size": "4", "metadata": {}}).encode(), JSON), "POST")
    assert bucket.overwrite("k", b"data", "image/webp", {}).etag == "e"
    rascal.rule = lambda method, path, headers: Said(200, json.dumps({**right, "metadata": {}, **fact}).encode(), JSON)
    with pytest.raises(StorageUnavailable):
        bucket.overwrite("k", b"data", "image/webp", {})
