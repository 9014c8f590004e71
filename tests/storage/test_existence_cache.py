"""Existence cache: holds only keys that were seen, for a limited time, and never stale ones after local changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.storage.existence_cache import CachedBucket, ExistenceCache
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.storage.spool import UploadSpool
from stable_diffusion_server.storage.write_behind import WriteBehindBucket
from stable_diffusion_server.types import StoredObject


class Counted(MemoryBucket):
    """A memory bucket that counts its calls and can be disconnected."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.off = False

    def stat(self, key: str) -> StoredObject | None:
        self.asked += 1
        if self.off:
            raise StorageUnavailable("The storage is off.")
        return super().stat(key)


class SimulatedServer:
    """A cached bucket over a counting one, with a clock that the test sets."""

    def __init__(self, folder: Path, capacity: int = 10) -> None:
        self.store = Counted()
        self.time = 0.0
        spooling = WriteBehindBucket(self.store, UploadSpool(folder / "spool", 10**6), 20.0, poll_seconds=60.0)
        self.bucket = CachedBucket(spooling, capacity, 5.0, lambda: self.time)
        self.bucket.open()


@pytest.fixture
def running_app(tmp_path: Path) -> SimulatedServer:
    return SimulatedServer(tmp_path)


def test_what_was_seen_is_not_asked_for_again(running_app: SimulatedServer) -> None:
    """After a store or a stat: the next hit makes no call, and works during an outage."""
    running_app.store.create("theirs", b"data", "image/webp", {})
    ours, _ = running_app.bucket.create("ours", b"data", "image/webp", {})
    theirs = running_app.bucket.stat("theirs")
    running_app.store.off, asked = True, running_app.store.asked
    assert running_app.bucket.stat("ours") == ours
    assert running_app.bucket.stat("theirs") == theirs
    assert running_app.store.asked == asked


def test_absence_is_never_remembered(running_app: SimulatedServer) -> None:
    """A key that another server stores right after a miss is found at once."""
    assert running_app.bucket.stat("k") is None
    running_app.store.create("k", b"data", "image/webp", {})
    assert running_app.bucket.stat("k") is not None


def test_what_is_deleted_or_overwritten_here_is_forgotten_at_once(running_app: SimulatedServer) -> None:
    """Local changes never leave stale entries."""
    running_app.bucket.create("k", b"data", "image/webp", {"seed": "1"})
    new = running_app.bucket.overwrite("k", b"newer", "image/webp", {"seed": "2"})
    assert running_app.bucket.stat("k") == new
    running_app.bucket.delete("k")
    assert running_app.bucket.stat("k") is None


def test_what_others_delete_is_seen_when_its_time_is_over(running_app: SimulatedServer) -> None:
    """Cached until the time is over, and not longer."""
    running_app.bucket.create("k", b"data", "image/webp", {})
    running_app.store.delete("k")
    running_app.time = 4.9
    assert running_app.bucket.stat("k") is not None
    running_app.time = 5.0
    assert running_app.bucket.stat("k") is None


def test_the_oldest_gives_way_when_the_memory_is_full(tmp_path: Path) -> None:
    """The bound holds, and an evicted key is queried again."""
    running_app = SimulatedServer(tmp_path, capacity=2)
    for key in "abc":
        running_app.bucket.create(key, b"data", "image/webp", {})
    asked = running_app.store.asked
    assert running_app.bucket.stat("c")
    assert running_app.store.asked == asked
    assert running_app.bucket.stat("a")
    assert running_app.store.asked == asked + 1


def test_what_waits_is_not_remembered_as_stored(running_app: SimulatedServer) -> None:
    """The URL of a spooled object changes with its upload, so it is queried each time."""
    running_app.store.off = True
    assert running_app.bucket.create("k", b"data", "image/webp", {})[0].waiting
    found = running_app.bucket.stat("k")
    assert found is not None
    assert found.waiting
    assert running_app.bucket.url("k") is None


def test_what_others_deleted_is_forgotten_when_it_cannot_be_read(running_app: SimulatedServer) -> None:
    """Cached but deleted: the reader gets an error, and the next stat queries the bucket."""
    running_app.bucket.create("k", b"data", "image/webp", {})
    running_app.store.delete("k")
    assert running_app.bucket.cached("k") is not None
    with pytest.raises(NotFound):
        running_app.bucket.read("k")
    assert running_app.bucket.cached("k") is None
    assert running_app.bucket.stat("k") is None


def test_expired_entries_take_no_memory() -> None:
    """Size is that of the entries within the time; with a time of zero it is empty."""
    clock = [0.0]
    knowledge = ExistenceCache(1000, 2.0, now=lambda: clock[0])
    for n in range(500):
        clock[0] = n / 10
        knowledge.remember(f"k{n}", StoredObject(f"k{n}", 4, "etag", "image/webp", {}))
    assert len(knowledge) == 20
    assert (knowledge.get("k480") is not None, knowledge.get("k479")) == (True, None)
    nothing = ExistenceCache(1000, 0.0, now=lambda: clock[0])
    nothing.remember("k", StoredObject("k", 4, "etag", "image/webp", {}))
    assert (len(nothing), nothing.get("k")) == (0, None)


def test_what_was_seen_before_a_write_is_no_news_after_it() -> None:
    """A slow stat that began before a delete does not restore the deleted key."""
    knowledge = ExistenceCache(10, 60.0)
    stored = StoredObject("k", 4, "etag", "image/webp", {})
    since = knowledge.changes
    knowledge.remember("k", None)
    assert knowledge.remember("k", stored, since) == stored
    assert knowledge.get("k") is None
    knowledge.remember("k", stored, knowledge.changes)
    assert knowledge.get("k") == stored
