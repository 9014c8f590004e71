"""The /files route (caching, ranges, signatures, records, deletion) and the image history."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser
from fastapi import FastAPI
from fastapi.testclient import TestClient

from stable_diffusion_server.api import problems
from stable_diffusion_server.api.routes import files
from stable_diffusion_server.errors import Forbidden, RateLimited
from stable_diffusion_server.generation.library import ImageLibrary
from stable_diffusion_server.storage.history.entries import HistoryEntry, HistoryQuery
from stable_diffusion_server.storage.history.index import HistoryIndex
from stable_diffusion_server.storage.history.writer import HistoryWriter
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.storage.signed_urls import UrlSigner
from stable_diffusion_server.types import Caller

pytestmark = pytest.mark.slow


@pytest.fixture
def picture(running_app: RunningApp) -> httpx.Response:
    """A stored image, fetched."""
    return running_app.client.get(running_app.draw(prompt="a red square", save_path="a.webp").json()["path"])


def again(running_app: RunningApp, **headers: str) -> httpx.Response:
    return running_app.client.get(
        "/files/static/uploads/a.webp", headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_a_picture_comes_with_its_type_and_its_name(picture: httpx.Response) -> None:
    """Content type, length, strong ETag, a download name, and `nosniff`."""
    headers = picture.headers
    assert headers["content-type"] == "image/webp"
    assert headers["content-disposition"] == 'inline; filename="a.webp"'
    assert headers["etag"].startswith('"')
    assert headers["x-content-type-options"] == "nosniff"
    assert int(headers["content-length"]) == len(picture.content)


def test_a_known_etag_is_answered_304(running_app: RunningApp, picture: httpx.Response) -> None:
    """Exact, weak, listed and `*` ETags: 304 without a body; another ETag: the image."""
    etag = picture.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = again(running_app, if_none_match=known)
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert again(running_app, if_none_match='"other"').status_code == 200


def test_a_range_is_answered_in_part(running_app: RunningApp, picture: httpx.Response) -> None:
    """First bytes, last bytes, one byte; beyond the end is 416."""
    size = len(picture.content)
    for wanted, part in (("0-9", slice(0, 10)), ("-5", slice(size - 5, size)), ("7-7", slice(7, 8))):
        answer = again(running_app, range=f"bytes={wanted}")
        assert (answer.status_code, answer.content) == (206, picture.content[part])
    assert again(running_app, range=f"bytes={size}-").status_code == 416
    for no_range in ("lines=1-2", "bytes", "bytes=a-b", "bytes=-"):
        assert again(running_app, range=no_range).content == picture.content


def test_a_range_of_another_version_gets_the_whole_picture(running_app: RunningApp, picture: httpx.Response) -> None:
    """If-Range prevents a client from joining parts of two images."""
    assert again(running_app, range="bytes=0-9", if_range='"other"').content == picture.content
    assert len(again(running_app, range="bytes=0-9", if_range=picture.headers["etag"]).content) == 10


def test_head_tells_without_sending(running_app: RunningApp, picture: httpx.Response) -> None:
    """HEAD sends the same headers and no body."""
    answer = running_app.client.head("/files/static/uploads/a.webp")
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
def test_nothing_but_pictures_is_served(running_app: RunningApp, picture: httpx.Response, path: str) -> None:
    """Missing files, folders and every path traversal: 404, although the files exist."""
    (running_app.folder / "bucket" / "secret").write_text("secret")
    assert (running_app.folder / "bucket" / "records" / "static" / "uploads" / "a.webp").is_file()
    answer = running_app.client.get(f"/files/{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_file_that_is_no_picture_is_not_shown_inline(running_app: RunningApp) -> None:
    """HTML placed in the folder by hand must not run under this server's origin."""
    folder = running_app.folder / "bucket" / "objects"
    (folder / "page.html").write_text("<script>alert(1)</script>")
    answer = running_app.client.get("/files/page.html")
    assert answer.headers["content-disposition"] == 'attachment; filename="page.html"'
    assert "sandbox" in answer.headers["content-security-policy"]


def test_what_is_named_by_its_content_may_be_kept_for_ever(running_app: RunningApp) -> None:
    """A content-derived key never changes its image.

    A chosen name can be overwritten, so caches revalidate after a minute.
    """
    content = running_app.client.get(running_app.draw(prompt="a red square").json()["path"])
    assert content.headers["cache-control"] == "public, max-age=31536000, immutable"
    named = running_app.client.get(running_app.draw(prompt="a red square", save_path="a.webp").json()["path"])
    assert named.headers["cache-control"] == "public, max-age=60"


class AddressedBucket(MemoryBucket):
    """A bucket whose objects have their own URLs."""

    def url(self, key: str) -> str:
        return f"https://bucket.example/{key}?signature=secret"


@pytest.mark.parametrize("private", [True, False])
def test_the_files_endpoint_gives_signed_urls_to_those_who_hold_one(private: bool, tmp_path: Path) -> None:
    """For a private bucket only a signed URL redirects, and no key outside BUCKET_PATH is ever served."""
    bucket = AddressedBucket()
    for key in ("static/uploads/a.webp", "backups/db.sql", "static/uploads-not/a.webp"):
        bucket.create(key, b"data", "image/webp", {})
    signer = UrlSigner("a secret", tmp_path / "none", 60) if private else None
    app = FastAPI()
    app.include_router(
        files.files_router(bucket, ImageLibrary(bucket, HistoryWriter(None), ""), signer, "static/uploads/")
    )
    problems.install_exception_handlers(app)
    with TestClient(app, follow_redirects=False) as client:
        assert client.get("/files/static/uploads/a.webp").status_code == (403 if private else 307)
        if signer:
            signed = f"/files/static/uploads/a.webp?{signer.query('static/uploads/a.webp')}"
            assert client.get(signed).status_code == 307
            assert client.get(signed.replace("a.webp", "b.webp")).status_code == 403
        for other in ("backups/db.sql", "static/uploads-not/a.webp", "static/uploads/../../backups/db.sql"):
            answer = client.get(f"/files/{other}")
            assert answer.status_code in (403, 404)
            assert "location" not in answer.headers


def test_a_signed_address_of_the_local_bucket_gives_the_picture_for_a_while(
    run_app: Callable[..., RunningApp],
) -> None:
    """The signature covers name and expiry only.

    Shared caches may not store it; first and cached responses get the same one.
    """
    running_app = run_app(signed_url_seconds=60)
    first, again = (running_app.draw(prompt="a red square", save_path="b c.webp").json() for _ in range(2))
    assert (first["cached"], again["cached"]) == (False, True)
    pictures = [running_app.client.get(receipt["path"]) for receipt in (first, again)]
    assert pictures[0].content == pictures[1].content
    assert pictures[0].headers["cache-control"].startswith("private, max-age=")
    plain, _, query = first["path"].partition("?")
    expires = query.partition("&")[0]
    later = query.replace(expires, f"expires={int(expires[8:]) + 1000}")
    for wrong in ("", "?" + expires, "?" + later, "?" + query[:-1], "?expires=²&signature=é", "?expires=1&signature=1"):
        assert running_app.client.get(plain + wrong).status_code == 403
    secret = running_app.folder / "data" / "url-secret"
    assert (len(secret.read_bytes()), secret.stat().st_mode & 0o777) == (32, 0o600)
    run_app(signed_url_seconds=60)
    assert running_app.client.get(first["path"]).status_code == 200, "the secret outlives a restart"


def test_a_signature_ends(tmp_path: Path) -> None:
    """Valid up to its expiry second, not after, and never with another secret."""
    time = 1000.0
    signer = UrlSigner("one", tmp_path / "none", 60, lambda: time)
    expires, signature = (part.partition("=")[2] for part in signer.query("k").split("&"))
    assert signer.verify("k", expires, signature) == 1060
    assert UrlSigner("two", tmp_path / "none", 60, lambda: time).verify("k", expires, signature) is None
    time = 1060.0
    assert signer.verify("k", expires, signature) is None


def listed(running_app: RunningApp, **query: object) -> list[str]:
    answer = running_app.client.get("/history", params=query)  # type: ignore[arg-type]  # httpx accepts numbers too
    assert answer.status_code == 200, answer.text
    return [picture["key"].rpartition("/")[2] for picture in answer.json()["pictures"]]


def test_the_history_lists_what_was_drawn_newest_first(running_app: RunningApp) -> None:
    """Generated images with their facts and URLs, each once; cached responses add no entry."""
    for name, prompt in (("a", "a red square"), ("b", "A BLUE Straße"), ("c", "100% _red_"), ("a", "a red square")):
        running_app.draw(prompt=prompt, save_path=f"{name}.webp")
    newest = running_app.client.get("/history").json()["pictures"][0]
    assert (newest["prompt"], newest["width"], newest["task"]) == ("100% _red_", 64, "text_to_image")
    assert running_app.client.get(newest["path"]).status_code == 200
    assert listed(running_app) == ["c.webp", "b.webp", "a.webp"]
    assert listed(running_app, q="RED") == ["c.webp", "a.webp"]
    assert listed(running_app, q="blue strasse") == ["b.webp"]
    assert listed(running_app, q="0% _") == ["c.webp"]
    assert listed(running_app, q="_") == ["c.webp"]
    assert listed(running_app, q="green") == []


def test_the_history_is_filtered_by_model(running_app: RunningApp) -> None:
    """By the model that generated the image, also combined with words; a model without images yields an empty list."""
    for name, prompt, model in (("a", "a red square", "sdxl"), ("b", "a red square", "flux"), ("c", "blue", "flux")):
        running_app.draw(prompt=prompt, save_path=f"{name}.webp", model=model)
    assert listed(running_app, model="flux") == ["c.webp", "b.webp"]
    assert listed(running_app, model="flux", q="red") == ["b.webp"]
    assert listed(running_app, model="flu") == []


def test_the_history_is_turned_over_page_by_page(running_app: RunningApp) -> None:
    """`next` continues after the last entry; the last page has none."""
    for name in "abcde":
        running_app.draw(prompt=f"a red square {name}", save_path=f"{name}.webp")
    found, before = [], None
    while True:
        answer = running_app.client.get(
            "/history", params={"limit": 2, **({"before": before} if before else {})}
        ).json()
        found += [picture["key"][-6] for picture in answer["pictures"]]
        if (before := answer["next"]) is None:
            break
    assert found == list("edcba")


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "before=0", "before=²", "page=2", "q=" + "x" * 1001, "model=" + "x" * 101],
)
def test_the_history_refuses_by_name(running_app: RunningApp, query: str) -> None:
    """422 with the field's name."""
    answer = running_app.client.get(f"/history?{query}")
    assert (answer.status_code, answer.json()["field"]) == (422, query.partition("=")[0])


def test_an_overwritten_picture_has_one_entry(running_app: RunningApp) -> None:
    """The history keeps only the current image."""
    running_app.draw(prompt="a red square", save_path="a.webp")
    running_app.draw(prompt="a blue square", save_path="a.webp", overwrite=True)
    assert [picture["prompt"] for picture in running_app.client.get("/history").json()["pictures"]] == ["a blue square"]


def test_the_history_is_bounded_in_number_and_age(run_app: Callable[..., RunningApp]) -> None:
    """The newest entries stay; entries past the maximum age are not listed."""
    running_app = run_app(history_entries=3, history_days=1)
    for name in "abcde":
        running_app.draw(prompt=f"a red square {name}", save_path=f"{name}.webp")
    assert listed(running_app) == ["e.webp", "d.webp", "c.webp"]
    with sqlite3.connect(running_app.folder / "data" / "history.db") as base:
        base.execute("UPDATE drawn SET drawn_at = drawn_at - 86401 WHERE key LIKE '%d.webp'")
    assert listed(running_app) == ["e.webp", "c.webp"]


def test_without_a_history_nothing_is_kept(run_app: Callable[..., RunningApp]) -> None:
    """HISTORY_ENTRIES=0: no file, an empty list, and images are still generated."""
    running_app = run_app(history_entries=0)
    assert running_app.draw(prompt="a red square").status_code == 200
    assert listed(running_app) == []
    assert not (running_app.folder / "data" / "history.db").exists()


def test_a_broken_history_fails_no_picture(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """A corrupt database is quarantined and recreated. A folder in its place: reading fails, generating works."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "history.db").write_bytes(b"this is no database, and longer than a header of one " * 50)
    running_app = run_app()
    running_app.draw(prompt="a red square", save_path="a.webp")
    assert listed(running_app) == ["a.webp"]
    assert len(list((tmp_path / "data").glob("history.db.broken-*"))) == 1
    for file in (tmp_path / "data").glob("history.db*"):
        file.unlink()
    (tmp_path / "data" / "history.db").mkdir()
    answer = running_app.draw(prompt="a red square", save_path="b.webp")
    assert answer.status_code == 200
    assert running_app.client.get("/history").status_code == 503
    assert running_app.client.get("/files/static/uploads/b.webp?record=1").json()["source"] == "object"


@pytest.mark.parametrize(("file_format", "embedded"), [("webp", "full"), ("png", "none"), ("jpeg", "full")])
def test_the_record_of_a_picture_is_reported(
    run_app: Callable[..., RunningApp], file_format: str, embedded: str
) -> None:
    """Read from the history, otherwise from the object, otherwise from the image file."""
    running_app = run_app(embed_metadata=embedded)
    key = running_app.draw(prompt="a red square", save_path=f"a.{file_format}").json()["key"]

    def record() -> tuple[str, dict[str, str]]:
        answer = running_app.client.get(f"/files/{key}?record=1")
        return (answer.json()["source"], answer.json()["record"]) if answer.status_code == 200 else ("", {})

    source, reported = record()
    assert (source, reported["prompt"], reported["model"]) == ("history", "a red square", "sdxl")
    (digest,) = {reported["digest"]}
    with sqlite3.connect(running_app.folder / "data" / "history.db") as base:
        base.execute("DELETE FROM drawn")
    source, reported = record()
    assert (source, reported["digest"]) == ("object", digest)
    (running_app.folder / "bucket" / "records" / key).unlink()
    source, reported = record()
    assert (source, reported.get("digest")) == (("picture", digest) if embedded == "full" else ("", None))
    assert running_app.client.get("/files/static/uploads/none.webp?record=1").status_code == 404


def test_records_and_deleting_ask_for_a_key(run_app: Callable[..., RunningApp]) -> None:
    """Anyone with the URL can read an image; its prompt, the history and deletion need a key."""
    running_app = run_app(api_keys="hunter2")
    with_key = {"X-API-Key": "hunter2"}
    drawing = "/create_and_upload_image?prompt=a+red+square&save_path=a.webp&width=64&height=64"
    assert running_app.client.get(drawing, headers=with_key).status_code == 200
    path = "/files/static/uploads/a.webp"
    assert running_app.client.get(path).status_code == 200
    for method, what in (
        ("GET", path + "?record=1"),
        ("GET", path + "?%72ecord=1"),
        ("DELETE", path),
        ("GET", "/history"),
    ):
        assert running_app.client.request(method, what).status_code == 401
        assert running_app.client.request(method, what, headers={"Origin": "https://evil.example"}).status_code == 403
    assert running_app.client.get(path + "?record=1", headers=with_key).status_code == 200
    assert running_app.client.delete(path, headers=with_key).status_code == 204


def test_a_deleted_picture_is_gone_and_drawn_again(running_app: RunningApp) -> None:
    """Removed from bucket and history; a second delete is no error; the name can be used again."""
    running_app.draw(prompt="a red square", save_path="a.webp")
    for _ in range(2):
        assert running_app.client.delete("/files/static/uploads/a.webp").status_code == 204
    assert running_app.client.get("/files/static/uploads/a.webp").status_code == 404
    assert listed(running_app) == []
    assert running_app.draw(prompt="a blue square", save_path="a.webp").json()["cached"] is False
    for path in ("/files/elsewhere.webp", "/files/static/uploads/%2e%2e/%2e%2e/x", "/files/"):
        assert running_app.client.delete(path).status_code in (403, 404)


def test_a_caller_touches_only_what_is_under_its_prefix(tmp_path: Path) -> None:
    """Its history, records and deletions are limited to its prefix; those of others are refused."""
    recorder = HistoryWriter(HistoryIndex(tmp_path / "history.db", 10, 0))
    recorder.start()
    bucket, caller = MemoryBucket(), Caller("a", "team-a/")
    library = ImageLibrary(bucket, recorder, "static/uploads/")
    for key in ("static/uploads/team-a/x.webp", "static/uploads/team-b/x.webp", "static/uploads/team-a.webp"):
        bucket.create(key, b"data", "image/webp", {"digest": "d"})
        recorder.record(
            HistoryEntry(key, "d", "a red square", "sdxl", "text_to_image", 7, 64, 64, "a", time.time(), {"seed": 7})
        )
    assert [entry.key for entry in library.search(caller, HistoryQuery())] == ["static/uploads/team-a/x.webp"]
    assert len(library.search(Caller(), HistoryQuery())) == 3
    for key in ("static/uploads/team-b/x.webp", "static/uploads/team-a.webp", "team-a/x.webp"):
        for touch in (library.read_record, library.delete):
            with pytest.raises(Forbidden):
                touch(key, caller)
    assert library.read_record("static/uploads/team-a/x.webp", caller) == ("history", {"seed": 7})
    library.delete("static/uploads/team-a/x.webp", caller)
    assert len(library.search(Caller(), HistoryQuery())) == 2
    recorder.close()


def test_what_comes_within_a_moment_is_recorded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction costs the same for one entry as for many; a reader forces the pending ones to be written."""
    monkeypatch.setattr("stable_diffusion_server.storage.history.writer._BATCH_SECONDS", 30.0)
    index, written = HistoryIndex(tmp_path / "history.db", 100, 0), list[int]()
    add = index.add
    monkeypatch.setattr(index, "add", lambda entries: (written.append(len(entries)), add(entries)))
    recorder = HistoryWriter(index)
    recorder.start()
    for n in range(20):
        recorder.record(
            HistoryEntry(f"{n}.webp", "d", "a red square", "sdxl", "text_to_image", 7, 64, 64, "", time.time(), {})
        )
    assert len(recorder.search(HistoryQuery())) == 20
    assert written == [20]
    recorder.record(
        HistoryEntry("last.webp", "d", "a red square", "sdxl", "text_to_image", 7, 64, 64, "", time.time(), {})
    )
    recorder.close()
    assert written == [20, 1]


def test_a_cached_answer_repeats_the_warnings_of_the_quality_checks(run_app: Callable[..., RunningApp]) -> None:
    """The first result was black, so it was generated twice: a later cache hit gets the warning too."""
    running_app = run_app(FakeImageDenoiser(spoil=["black"]))
    codes = [
        [warning["code"] for warning in running_app.draw(prompt="a red square", save_path="a.webp").json()["warnings"]]
        for _ in range(2)
    ]
    assert "redrawn-black" in codes[0]
    assert codes[1] == codes[0]


async def test_who_looks_for_pictures_leaves_calls_to_the_bucket_to_those_who_draw() -> None:
    """200 requests of one anonymous client use at most half of the slots at a time; the excess gets 429."""
    readers, under_way, most = files.bucket_queue(), 0, 0

    async def read() -> None:
        nonlocal under_way, most
        async with readers.hold("address 203.0.113.5"):
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.001)
            under_way -= 1

    ends = await asyncio.gather(*(read() for _ in range(200)), return_exceptions=True)
    assert sum(isinstance(end, RateLimited) for end in ends) == 200 - files.MAX_PER_CALLER
    assert most <= files.CONCURRENCY // 2
