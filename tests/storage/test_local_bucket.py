"""The local bucket: atomic, first writer wins, nothing outside the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from fakes import disc, file_of
from filelock import FileLock

from stable_diffusion_server.errors import InvalidInput, NotFound, StorageUnavailable
from stable_diffusion_server.storage.base import check_if_blob_exists
from stable_diffusion_server.storage.local import LocalBucket

RECORD = {"digest": "abc", "seed": "7"}

# A minimal image container: its content does not matter here.
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.fixture
def bucket(tmp_path: Path) -> LocalBucket:
    """An open bucket."""
    made = LocalBucket(tmp_path / "bucket")
    made.open()
    return made


def test_what_is_created_can_be_found_and_read(bucket: LocalBucket) -> None:
    """Size, type, record and bytes are read back unchanged."""
    stored, won = bucket.create("a/b c+d%2Fé.webp", b"data", "image/webp", RECORD)
    assert won
    assert bucket.stat("a/b c+d%2Fé.webp") == stored
    assert (stored.size, stored.content_type, dict(stored.record)) == (4, "image/webp", RECORD)
    assert bucket.read("a/b c+d%2Fé.webp") == b"data"


def test_what_is_absent_is_absent(bucket: LocalBucket) -> None:
    """Neither stat nor read invents one."""
    bucket.create("folder/file", b"data", "image/webp", {})
    assert bucket.stat("none") is None
    assert not check_if_blob_exists(bucket, "none")
    with pytest.raises(NotFound):
        bucket.read("none")
    assert check_if_blob_exists(bucket, "folder/file")


def test_the_second_writer_loses_and_gets_what_is_stored(bucket: LocalBucket) -> None:
    """Create never changes an existing object."""
    first, _ = bucket.create("k", b"first", "image/webp", RECORD)
    assert bucket.create("k", b"second one", "image/png", {}) == (first, False)
    assert bucket.read("k") == b"first"


def test_of_many_writers_at_once_exactly_one_wins(bucket: LocalBucket) -> None:
    """25 rounds of 8 threads; each round has one winner, and its bytes are stored."""
    for turn in range(25):
        wins: list[int] = []
        barrier = threading.Barrier(8)

        def write(writer: int, turn: int = turn, wins: list[int] = wins, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if bucket.create(f"round/{turn}", f"writer {writer}".encode(), "image/webp", {})[1]:
                wins.append(writer)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert bucket.read(f"round/{turn}") == f"writer {wins[0]}".encode()


def test_threads_of_one_server_never_wait_for_the_lock_file(
    bucket: LocalBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acquiring the lock file is polling; it must be free at every attempt here."""
    monkeypatch.setattr("stable_diffusion_server.storage.local.FileLock", partial(FileLock, timeout=0))
    with ThreadPoolExecutor(8) as threads:
        stored = threads.map(lambda n: bucket.create(f"k{n}", b"bytes", "image/webp", {}), range(64))
        assert all(won for _, won in stored)


def test_whoever_sees_an_object_sees_its_record(bucket: LocalBucket) -> None:
    """No reader sees an image without its record."""
    seen: list[bool] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            found = [bucket.stat(f"{turn}") for turn in range(40)]
            seen.extend(dict(stored.record) == RECORD for stored in found if stored is not None)

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(40):
        bucket.create(f"{turn}", b"data", "image/webp", RECORD)
    done.set()
    reader.join()
    assert seen
    assert all(seen)


def test_overwriting_replaces_bytes_and_facts(bucket: LocalBucket) -> None:
    """After an overwrite, reads return the new bytes, type, record and ETag."""
    old, _ = bucket.create("k", b"old", "image/webp", RECORD)
    new = bucket.overwrite("k", b"newer", "image/png", {"seed": "8"})
    assert bucket.stat("k") == new
    assert new.etag != old.etag
    assert bucket.read("k") == b"newer"


def test_nothing_unfinished_is_left_behind(bucket: LocalBucket, tmp_path: Path) -> None:
    """Winners, losers and overwriters all clean up."""
    bucket.create("k", b"first", "image/webp", {})
    bucket.create("k", b"second", "image/webp", {})
    bucket.overwrite("k", b"third", "image/webp", {})
    assert [path.name for path in (tmp_path / "bucket" / "tmp").iterdir()] in ([], [".lock"])


def test_an_empty_file_is_no_object_and_gives_way(bucket: LocalBucket, tmp_path: Path) -> None:
    """An empty file left by a full disk or a crash does not block the name."""
    (tmp_path / "bucket" / "objects" / "k").touch()
    assert bucket.stat("k") is None
    assert bucket.create("k", b"data", "image/webp", {})[1]


def test_a_file_put_there_by_hand_is_served_by_its_ending(bucket: LocalBucket, tmp_path: Path) -> None:
    """An object without metadata has the type of its extension and an empty record."""
    (tmp_path / "bucket" / "objects" / "mine.png").write_bytes(PNG)
    stored = bucket.stat("mine.png")
    assert stored is not None
    assert (stored.content_type, dict(stored.record)) == ("image/png", {})


def test_facts_that_do_not_belong_to_the_bytes_are_not_believed(bucket: LocalBucket, tmp_path: Path) -> None:
    """A file replaced by another program does not get the old file's record."""
    bucket.create("k.webp", b"data", "image/webp", RECORD)
    (tmp_path / "bucket" / "objects" / "k.webp").write_bytes(file_of(disc()))
    stored = bucket.stat("k.webp")
    assert stored is not None
    assert dict(stored.record) == {}
    assert not bucket.create("k.webp", b"other", "image/webp", {})[1], "someone's picture is not drawn over"


@pytest.mark.fault(45)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_that_was_cut_short_is_none_and_gives_way(
    bucket: LocalBucket, tmp_path: Path, file_format: str
) -> None:
    """Any truncation: not found, and the next create replaces it."""
    data = file_of(disc(), file_format)
    bucket.create("k", data, "image/webp", RECORD)
    for size in (len(data) - 1, len(data) // 2, 5, 0):
        (tmp_path / "bucket" / "objects" / "k").write_bytes(data[:size])
        assert bucket.stat("k") is None
        stored, won = bucket.create("k", data, "image/webp", RECORD)
        assert won
        assert bucket.stat("k") == stored


def test_a_link_out_of_the_folder_is_not_followed(bucket: LocalBucket, tmp_path: Path) -> None:
    """Neither a linked file nor a linked folder is used, for reading or writing."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "bucket" / "objects" / "file").symlink_to(outside / "secret")
    (tmp_path / "bucket" / "objects" / "folder").symlink_to(outside)
    assert bucket.stat("file") is None
    with pytest.raises(NotFound):
        bucket.stat("folder/secret")
    with pytest.raises(NotFound):
        bucket.create("folder/new", b"data", "image/webp", {})
    assert os.listdir(outside) == ["secret"]


@pytest.mark.fault(47)
@pytest.mark.parametrize("key", ["n" * 256, "taken/below", "folder"])
def test_a_name_the_disk_cannot_hold_is_the_callers_fault(bucket: LocalBucket, key: str) -> None:
    """A component too long, an image as a folder, a folder as an image: refused naming save_path, not a 500."""
    bucket.create("taken", b"data", "image/webp", {})
    bucket.create("folder/inside", b"data", "image/webp", {})
    with pytest.raises(InvalidInput) as refused:
        bucket.create(key, b"data", "image/webp", {})
    assert refused.value.field == "save_path"
    for other_way in (lambda: bucket.stat(key), lambda: bucket.overwrite(key, b"data", "image/webp", {})):
        with pytest.raises(InvalidInput):
            other_way()


def test_a_folder_that_has_gone_away_is_not_taken_for_an_empty_one(bucket: LocalBucket, tmp_path: Path) -> None:
    """A key is absent only while the folder exists; otherwise an image would be generated for nothing."""
    (tmp_path / "bucket" / "objects").rmdir()
    with pytest.raises(StorageUnavailable):
        bucket.stat("k")


def test_a_folder_that_cannot_be_made_is_reported_in_one_sentence(tmp_path: Path) -> None:
    """A file in the place of the bucket's folder is a storage error."""
    (tmp_path / "bucket").write_text("a file")
    with pytest.raises(StorageUnavailable, match="folder of pictures cannot be used"):
        LocalBucket(tmp_path / "bucket").open()


def test_a_name_the_disk_takes_for_another_is_refused(bucket: LocalBucket, tmp_path: Path) -> None:
    """A case-insensitive disk also shows A.webp as a.webp: an error, never the wrong image."""
    bucket.create("A.webp", b"data", "image/webp", RECORD)
    for folder in ("objects", "records"):  # what such a disk shows
        os.link(tmp_path / "bucket" / folder / "A.webp", tmp_path / "bucket" / folder / "a.webp")
    for refused_by in (
        lambda: bucket.stat("a.webp"),
        lambda: bucket.create("a.webp", b"other", "image/webp", {}),
        lambda: bucket.overwrite("a.webp", b"other", "image/webp", {}),
    ):
        with pytest.raises(InvalidInput, match="another letter case") as refused:
            refused_by()
        assert refused.value.field == "save_path"
    assert bucket.read("A.webp") == b"data"


@pytest.mark.fault(43, 47)
def test_a_full_disk_is_reported_and_keeps_no_partial_file(tmp_path: Path) -> None:
    """A file size limit stops the write in the middle, like a full disk: 503, no object, no leftovers."""
    code = f"""
import resource
from pathlib import Path
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.errors import StorageUnavailable
bucket = LocalBucket(Path({str(tmp_path / "bucket")!r}))
bucket.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    bucket.create("k", b"d" * 5000, "image/webp", {{}})
except StorageUnavailable as error:
    print(error.detail)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)  # noqa: S603  # our own interpreter
    assert done.stdout == "The folder of pictures cannot be used (File too large).\n"
    assert [path.name for path in (tmp_path / "bucket").rglob("*") if path.is_file()] in ([], [".lock"])


@pytest.mark.fault(47)
def test_a_nearly_full_disk_is_reported_before_anything_is_drawn(
    bucket: LocalBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With space for now: accepted. More than any disk has: 503."""
    bucket.check_capacity()
    monkeypatch.setattr("stable_diffusion_server.files.disk_space.MIN_FREE_BYTES", 2**70)
    with pytest.raises(StorageUnavailable, match="No space left"):
        bucket.check_capacity()
