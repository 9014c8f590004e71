"""One contract for every kind of bucket: real server processes on loopback, the local folder, and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from storage_servers import (
    KEYS,
    MisbehavingStore,
    StorageServer,
    changed,
    conditions_on_the_wire,
    gcs_options,
    make_gcs_bucket,
    make_s3_bucket,
    opened,
    r2_options,
    s3_client,
    storage_options,
)

from stable_diffusion_server.errors import NotFound, StorageRefused, StorageUnavailable
from stable_diffusion_server.storage.base import Bucket, check_if_blob_exists
from stable_diffusion_server.storage.factory import StorageOptions, open_bucket
from stable_diffusion_server.storage.memory import MemoryBucket

pytestmark = pytest.mark.slow

RECORD = {"digest": "abc", "seed": "7", "model": "sdxl"}
KINDS = ("memory", "local", "r2", "s3", "gcs")
REMOTE = ("r2", "gcs")


@pytest.fixture
def options_of(
    s3_server: StorageServer, gcs_server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StorageOptions]:
    """Options for a new bucket of a kind, reached directly or through a proxy."""

    def make(kind: str, rascal: MisbehavingStore | None = None, **changes: object) -> StorageOptions:
        if kind == "gcs":
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", rascal.url if rascal else gcs_server.url)
            return gcs_options(make_gcs_bucket(gcs_server), **changes)
        name, url = make_s3_bucket(s3_server), rascal.url if rascal else s3_server.url
        if kind == "s3":
            # As for AWS: without endpoint, so the client derives the URL.
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
            return storage_options(storage_provider="s3", bucket_name=name, **{**KEYS, **changes})  # type: ignore[arg-type]  # a test's own shorthand
        return r2_options(url, name, **changes)

    return make


@pytest.fixture(params=KINDS)
def bucket(
    request: pytest.FixtureRequest, tmp_path: Path, options_of: Callable[..., StorageOptions]
) -> Iterator[Bucket]:
    """An open, empty bucket of each kind."""
    made: Bucket
    if request.param == "memory":
        made = MemoryBucket()
    elif request.param == "local":
        made = open_bucket(storage_options(local_bucket_dir=tmp_path / "bucket"))
    else:
        made = open_bucket(options_of(request.param))
    made.open()
    yield made
    made.close()


@pytest.mark.parametrize(
    "key",
    ["a.webp", "static/uploads/b c.webp", "100%.webp", "a%2Fb.webp", "a+b&c=d?e#f.webp", "猫/über.webp", "'\"<>;.webp"],
)
def test_what_is_created_is_found_read_and_listed(bucket: Bucket, key: str) -> None:
    """Any valid key: bytes, size, type and record are read back unchanged."""
    stored, won = bucket.create(key, b"data", "image/webp", RECORD)
    assert won
    assert bucket.stat(key) == stored
    assert (stored.key, stored.size, stored.content_type, dict(stored.record)) == (key, 4, "image/webp", RECORD)
    assert bucket.read(key) == b"data"
    assert list(bucket.list()) == [key]
    assert list(bucket.list(key[:1])) == [key]
    assert check_if_blob_exists(bucket, key)


def test_what_is_absent_is_absent(bucket: Bucket) -> None:
    """Not found, not listed, and deleting it is no error."""
    assert bucket.stat("none.webp") is None
    assert not check_if_blob_exists(bucket, "none.webp")
    assert list(bucket.list()) == []
    bucket.delete("none.webp")
    with pytest.raises(NotFound):
        bucket.read("none.webp")


@pytest.mark.fault("40b")
def test_the_second_writer_loses_and_gets_what_is_stored(bucket: Bucket) -> None:
    """Create never changes an existing object."""
    first, _ = bucket.create("k", b"first", "image/webp", RECORD)
    assert bucket.create("k", b"second one", "image/png", {}) == (first, False)
    assert bucket.read("k") == b"first"


@pytest.mark.fault(41)
def test_of_eight_writers_at_once_exactly_one_wins_in_each_of_25_rounds(bucket: Bucket) -> None:
    """One winner in 25 of 25 rounds; all get the same object, and the winner's bytes are stored."""
    with ThreadPoolExecutor(8) as pool:
        for turn in range(25):
            barrier, key = threading.Barrier(8), f"round/{turn}"

            def write(writer: int, barrier: threading.Barrier = barrier, key: str = key) -> tuple[str, bool]:
                barrier.wait()
                stored, won = bucket.create(key, f"writer {writer}".encode(), "image/webp", RECORD)
                return stored.etag, won

            answers = list(pool.map(write, range(8)))
            assert [won for _, won in answers].count(True) == 1
            assert len({etag for etag, _ in answers}) == 1
            winner = next(number for number, (_, won) in enumerate(answers) if won)
            assert bucket.read(key) == f"writer {winner}".encode()


def test_overwriting_replaces_bytes_and_facts(bucket: Bucket) -> None:
    """After an overwrite, reads return the new bytes, type, record and ETag."""
    old, _ = bucket.create("k", b"old", "image/webp", RECORD)
    new = bucket.overwrite("k", b"newer", "image/png", {"seed": "8"})
    assert bucket.stat("k") == new
    assert new.etag != old.etag
    assert bucket.read("k") == b"newer"


def test_a_deleted_object_is_gone_and_its_name_is_free(bucket: Bucket) -> None:
    """Even if the name is that of a folder that is now empty."""
    bucket.create("folder/k", b"data", "image/webp", RECORD)
    bucket.delete("folder/k")
    assert bucket.stat("folder/k") is None
    assert bucket.create("folder", b"other", "image/webp", RECORD)[1]
    assert list(bucket.list()) == ["folder"]


def test_lists_are_by_prefix(bucket: Bucket) -> None:
    """A prefix need not end at a folder."""
    for key in ("a/1", "a/2", "ab", "b/1"):
        bucket.create(key, b"data", "image/webp", {})
    assert sorted(bucket.list("a")) == ["a/1", "a/2", "ab"]
    assert sorted(bucket.list("a/")) == ["a/1", "a/2"]
    assert sorted(bucket.list("zzz/none")) == []


@pytest.mark.parametrize(
    ("start", "end", "part"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 5, b"34"),
        (0, 1, b"0"),
        (8, 99, b"89"),
        (5, 5, b""),
        (10, None, b""),
    ],
)
def test_a_part_can_be_read(bucket: Bucket, start: int, end: int | None, part: bytes) -> None:
    """From the first byte to before the last; fewer bytes beyond the end."""
    bucket.create("k", b"0123456789", "image/webp", {})
    assert bucket.read("k", start, end) == part


@pytest.mark.fault(45)
def test_an_empty_object_is_none_and_gives_way(bucket: Bucket) -> None:
    """An image is never empty: an empty object left by a failure does not block the name."""
    bucket.overwrite("k", b"", "image/webp", {})
    assert bucket.stat("k") is None
    assert list(bucket.list()) == []
    stored, won = bucket.create("k", b"data", "image/webp", RECORD)
    assert won
    assert bucket.stat("k") == stored
    assert bucket.read("k") == b"data"


@pytest.mark.fault(45)
def test_an_object_cut_short_is_none_and_gives_way(bucket: Bucket) -> None:
    """Its length differs from its record: not found, and the next create replaces it."""
    record = {**RECORD, "bytes": "9"}
    bucket.overwrite("k", b"cut sh", "image/webp", record)
    assert bucket.stat("k") is None
    stored, won = bucket.create("k", b"whole one", "image/webp", record)
    assert won
    assert bucket.stat("k") == stored
    assert bucket.read("k") == b"whole one"
    assert not bucket.create("k", b"other", "image/webp", {})[1]


def test_twenty_megabytes_are_stored_whole_and_only_once(bucket: Bucket) -> None:
    """Larger than one upload part: still atomic, and the first writer still wins."""
    data = bytes(range(256)) * 81_920
    stored, won = bucket.create("big", data, "image/png", RECORD)
    assert won
    assert bucket.stat("big") == stored
    assert stored.size == len(data) == 20_971_520
    assert bucket.read("big") == data
    assert bucket.read("big", 20_971_500) == data[-20:]
    assert bucket.create("big", data[::-1], "image/png", {}) == (stored, False)


def test_a_record_survives_whatever_it_says(bucket: Bucket) -> None:
    """Headers are ASCII and lose outer spaces; a record does not."""
    record = {"model": "größer – 猫", "scheduler": " spaced ", "note": "100% \t \n +a=b"}
    bucket.create("k", b"data", "image/webp", record)
    stored = bucket.stat("k")
    assert stored is not None
    assert dict(stored.record) == record


def test_opening_twice_and_a_second_server_change_nothing(bucket: Bucket) -> None:
    """A restart finds existing objects, and the write probe is never listed."""
    bucket.create("k", b"data", "image/webp", RECORD)
    bucket.open()
    assert list(bucket.list()) == ["k"]


@pytest.mark.parametrize("kind", REMOTE)
@pytest.mark.parametrize("base", ["https://pictures.example", "https://cdn.example/pics"])
def test_the_address_is_the_base_and_the_key_encoded_once(
    kind: str, base: str, options_of: Callable[..., StorageOptions]
) -> None:
    """The URL is the same before and after the object is stored."""
    bucket = open_bucket(options_of(kind, public_base_url=base))
    assert bucket.url("a b/100%+猫.webp") == f"{base}/a%20b/100%25%2B%E7%8C%AB.webp"


@pytest.mark.parametrize("kind", REMOTE)
def test_without_a_base_only_a_bucket_named_after_its_domain_has_an_address(
    kind: str, options_of: Callable[..., StorageOptions]
) -> None:
    """As in the seed: https://BUCKET_NAME/key, if that is a valid host name; otherwise the server serves it."""
    options = options_of(kind)
    assert open_bucket(options).url("k.webp") is None
    named = {
        name: open_bucket(changed(options, bucket_name=name)).url("k.webp") for name in ("static.example.com", "a.1")
    }
    assert named == {"static.example.com": "https://static.example.com/k.webp", "a.1": None}


def test_a_signed_address_gives_the_object(options_of: Callable[..., StorageOptions]) -> None:
    """Anyone can fetch it, without credentials."""
    bucket = opened(options_of("r2", signed_url_seconds=60))
    bucket.create("a b/猫.webp", b"data", "image/webp", RECORD)
    url = bucket.url("a b/猫.webp")
    assert url
    assert "X-Amz-Signature" in url
    answer = httpx.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"data", "image/webp")


def test_what_cannot_sign_says_so_at_open(options_of: Callable[..., StorageOptions]) -> None:
    """Google's signed URLs need a private key; an anonymous client fails at open, before any image is generated."""
    bucket = open_bucket(options_of("gcs", signed_url_seconds=60))
    with pytest.raises(StorageUnavailable, match="cannot sign"):
        bucket.open()


def test_google_is_asked_for_generation_zero(
    options_of: Callable[..., StorageOptions], gcs_server: StorageServer
) -> None:
    """The server sees `ifGenerationMatch=0` for small and big uploads, and none for an overwrite."""
    bucket, small, big, over = opened(options_of("gcs")), uuid4().hex, uuid4().hex, uuid4().hex
    bucket.create(small, b"data", "image/webp", RECORD)
    bucket.create(big, b"d" * 10_000_000, "image/webp", RECORD)
    bucket.overwrite(over, b"data", "image/webp", RECORD)
    assert conditions_on_the_wire(gcs_server, small) == ["0"]
    assert conditions_on_the_wire(gcs_server, big)[0] == "0"
    assert conditions_on_the_wire(gcs_server, over) == [None]


def test_no_acl_is_sent_unless_asked_for(
    options_of: Callable[..., StorageOptions],
    s3_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
) -> None:
    """R2 has no ACLs and many buckets refuse them; a setting enables one."""
    rascal = rascal_before(s3_server)
    opened(options_of("r2", rascal)).create("k", b"data", "image/webp", RECORD)
    assert not any("x-amz-acl" in name.lower() for _, _, headers in rascal.requests for name in headers)
    opened(options_of("r2", rascal, bucket_acl="public-read")).create("k", b"data", "image/webp", RECORD)
    assert any("x-amz-acl" in name.lower() for _, _, headers in rascal.requests for name in headers)


@pytest.fixture(params=REMOTE)
def troubled(
    request: pytest.FixtureRequest,
    options_of: Callable[..., StorageOptions],
    rascal_before: Callable[[StorageServer], MisbehavingStore],
    s3_server: StorageServer,
    gcs_server: StorageServer,
) -> tuple[Bucket, MisbehavingStore]:
    """An open bucket behind a proxy that can misbehave."""
    rascal = rascal_before(gcs_server if request.param == "gcs" else s3_server)
    return opened(options_of(request.param, rascal, storage_timeout=1.0)), rascal


@pytest.mark.fault(40, 43)
@pytest.mark.parametrize("word", ["slow-down", "reset", "lose-answer"])
def test_one_mishap_is_mended_without_being_noticed(troubled: tuple[Bucket, MisbehavingStore], word: str) -> None:
    """Throttled, connection reset, response lost: retried, and the writer still knows that it won."""
    bucket, rascal = troubled
    rascal.mischief.append(word)
    assert bucket.create("k", b"data" * 1000, "image/webp", RECORD)[1]
    assert bucket.read("k") == b"data" * 1000
    assert not rascal.mischief


@pytest.mark.fault(40, 44)
@pytest.mark.parametrize("word", ["slow-down", "lose-answer", "slow"])
def test_lasting_trouble_is_reported_as_storage_unavailable(
    troubled: tuple[Bucket, MisbehavingStore], word: str
) -> None:
    """Bounded retries and no SDK error: 503 in one sentence, and the next request succeeds."""
    bucket, rascal = troubled
    rascal.mischief.extend([word] * 50)
    with pytest.raises(StorageUnavailable) as raised:
        bucket.stat("k")
    assert raised.value.status == 503
    rascal.mischief.clear()
    rascal.release.set()
    assert bucket.stat("k") is None


@pytest.mark.parametrize("kind", REMOTE)
def test_a_missing_bucket_is_named(kind: str, options_of: Callable[..., StorageOptions]) -> None:
    """At open, with the name of the setting."""
    bucket = open_bucket(changed(options_of(kind), bucket_name="no-such-bucket-here"))
    with pytest.raises(StorageUnavailable, match=r"no bucket 'no-such-bucket-here'.*BUCKET_NAME"):
        bucket.open()


@pytest.mark.parametrize("kind", REMOTE)
def test_a_storage_that_is_not_there_is_reported(
    kind: str, monkeypatch: pytest.MonkeyPatch, options_of: Callable[..., StorageOptions]
) -> None:
    """Connection refused: one sentence."""
    options = changed(options_of(kind), storage_timeout=0.5)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    bucket = open_bucket(changed(options, r2_endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StorageUnavailable, match="does not answer"):
        bucket.open()


def test_a_store_that_ignores_conditions_is_found_out_and_used_honestly(
    options_of: Callable[..., StorageOptions],
    s3_server: StorageServer,
    rascal_before: Callable[[StorageServer], MisbehavingStore],
) -> None:
    """The conditional headers are dropped: detected at open, and create then checks before it writes."""
    rascal = rascal_before(s3_server)
    rascal.drops.add("If-None-Match")
    bucket = opened(options_of("r2", rascal))
    assert bucket.create("k", b"first", "image/webp", RECORD)[1]
    assert not bucket.create("k", b"second", "image/webp", RECORD)[1]
    assert bucket.read("k") == b"first"


def test_a_record_too_long_for_s3_is_refused_at_once(options_of: Callable[..., StorageOptions]) -> None:
    """S3 accepts 2 KB of metadata."""
    bucket = opened(options_of("r2"))
    with pytest.raises(StorageRefused, match="2048"):
        bucket.create("k", b"data", "image/webp", {"note": "x" * 2048})


def test_an_objects_metadata_can_be_read_by_other_tools(
    options_of: Callable[..., StorageOptions], s3_server: StorageServer
) -> None:
    """Digest, seed and model are plain metadata of the object."""
    options = options_of("r2")
    opened(options).create("k", b"data", "image/webp", RECORD)
    head = s3_client(s3_server.url).head_object(Bucket=options.bucket_name, Key="k")
    assert {name: head["Metadata"][name] for name in RECORD} == RECORD
    assert head["CacheControl"] == "public, max-age=60", "a given name may be overwritten"
    assert head["ContentDisposition"] == 'inline; filename="k"'


@pytest.mark.parametrize("kind", REMOTE)
def test_a_name_from_the_content_may_be_kept_for_ever(kind: str, options_of: Callable[..., StorageOptions]) -> None:
    """The record says so; the object's headers have the long Cache-Control and the download name."""
    options = options_of(kind)
    bucket = opened(options)
    bucket.create("pictures/k über.webp", b"data", "image/webp", {**RECORD, "lasting": "1"})
    if kind == "gcs":
        blob = bucket._bucket.get_blob("pictures/k über.webp")  # type: ignore[attr-defined]  # Google's client
        headers = (blob.cache_control, blob.content_disposition)
    else:
        head = s3_client(options.r2_endpoint_url).head_object(Bucket=options.bucket_name, Key="pictures/k über.webp")
        headers = (head["CacheControl"], head["ContentDisposition"])
    name = "inline; filename=\"k uber.webp\"; filename*=UTF-8''k%20%C3%BCber.webp"
    assert headers == ("public, max-age=31536000, immutable", name)
