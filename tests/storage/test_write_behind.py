"""Write-behind bucket: whatever the storage does, a finished image is spooled, found, and finally uploaded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from fakes import until

from stable_diffusion_server.errors import InvalidInput, NotFound, StorageUnavailable
from stable_diffusion_server.storage.dead_letters import DeadLetter, DeadLetters
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.storage.spool import UploadSpool
from stable_diffusion_server.storage.write_behind import WriteBehindBucket
from stable_diffusion_server.types import StoredObject

RECORD = {"digest": "abc", "seed": "7"}


class Switched(MemoryBucket):
    """A memory bucket with a switch: `off` fails, `denied` fails writes, `stuck` waits for `free`, `picky` refuses.

    On the test's own thread it always answers: that is what other servers see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = "on"
        self.asked = 0
        self.free = threading.Event()

    def _meet(self, *, writing: bool) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        self.asked += 1
        if self.state == "stuck":
            self.free.wait(60)
        if self.state == "off" or (writing and self.state == "denied"):
            raise StorageUnavailable(f"The storage is {'denied' if writing else 'off'}.")
        if self.state == "picky" and writing:
            raise InvalidInput("save_path is not to the storage's taste.", field="save_path")

    def open(self) -> None:
        self._meet(writing=self.state != "picky")

    def stat(self, key: str) -> StoredObject | None:
        self._meet(writing=False)
        return super().stat(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        self._meet(writing=True)
        return super().create(key, data, content_type, record)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        self._meet(writing=True)
        return super().overwrite(key, data, content_type, record)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., tuple[WriteBehindBucket, Switched]]]:
    """Open a write-behind bucket over a switched one, in the same folder each time, as after a restart."""
    opened: list[tuple[WriteBehindBucket, Switched]] = []

    def make(
        store: Switched | None = None, state: str = "on", max_bytes: int = 10**6, timeout: float = 20.0
    ) -> tuple[WriteBehindBucket, Switched]:
        behind = store or Switched()
        behind.state = state
        bucket = WriteBehindBucket(behind, UploadSpool(tmp_path / "spool", max_bytes), timeout, poll_seconds=0.02)
        bucket.open()
        opened.append((bucket, behind))
        return bucket, behind

    yield make
    for bucket, store in opened:
        store.free.set()
        bucket.close()


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "spool").iterdir())


def letters(folder: Path) -> list[DeadLetter]:
    return DeadLetters(folder / "dead-letters", 10**6).list_all()


def test_while_the_storage_is_up_nothing_stays_on_the_disk(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """Stored and found there, with an empty spool: winners, losers and overwriters."""
    bucket, store = made()
    stored, won = bucket.create("k", b"first", "image/webp", RECORD)
    assert won
    assert not stored.waiting
    assert not bucket.create("k", b"second", "image/webp", {})[1]
    assert bucket.overwrite("k", b"third", "image/webp", {}).size == 5
    assert store.read("k") == b"third"
    assert files(tmp_path) == []


@pytest.mark.fault(44)
def test_while_the_storage_is_down_the_picture_is_kept_and_then_brought(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """Kept with all its metadata, served to readers, and uploaded soon after the storage recovers."""
    bucket, store = made()
    store.state = "off"
    stored, won = bucket.create("k", b"data", "image/webp", RECORD)
    assert (won, stored.waiting) == (True, True)
    assert bucket.stat("k") == stored
    assert bucket.read("k", 1, 3) == b"at"
    assert bucket.url("k") is None
    assert bucket.create("k", b"other", "image/webp", {}) == (stored, False)
    assert bucket.health() is None, "an outage with space in the spool keeps no one from drawing"
    store.state = "on"
    until(lambda: files(tmp_path) == [])
    brought = bucket.stat("k")
    assert brought is not None
    assert (brought.waiting, dict(brought.record), brought.content_type) == (False, RECORD, "image/webp")
    assert store.read("k") == b"data"


@pytest.mark.fault(44)
def test_what_is_spooled_survives_a_restart(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """Ten images, a restart, the storage recovers: the new process uploads all ten."""
    bucket, store = made()
    store.state = "off"
    for number in range(10):
        bucket.create(f"{number}", b"%d" % number, "image/webp", RECORD)
    bucket.close()
    again, _ = made(store, state="off")
    assert [again.read(f"{number}") for number in range(10)] == [b"%d" % number for number in range(10)]
    store.state = "on"
    until(lambda: files(tmp_path) == [])
    assert sorted(store.list()) == [f"{number}" for number in range(10)]


def test_a_crash_while_writing_leaves_nothing_half(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """An old unfinished file is removed, a recent one is ignored; a modified one is quarantined and not uploaded."""
    bucket, store = made(state="off")
    bucket.create("k", b"data", "image/webp", RECORD)
    bucket.close()
    (tmp_path / "spool" / "1.part").write_bytes(b"half")
    os.utime(tmp_path / "spool" / "1.part", (time.time() - 601,) * 2)
    (tmp_path / "spool" / "2.part").write_bytes(b"written by another process this moment")
    spooled = next((tmp_path / "spool").glob("*.spool"))
    spooled.write_bytes(spooled.read_bytes()[:-1])
    made(store)
    assert files(tmp_path) == [".part"]
    assert [letter.path.name for letter in letters(tmp_path)] == [spooled.name]
    assert list(store.list()) == []


def test_a_storage_that_does_not_answer_is_not_waited_for_twice(
    made: Callable[..., tuple[WriteBehindBucket, Switched]],
) -> None:
    """The first call waits for its timeout, later ones not at all: images go to the spool."""
    bucket, store = made(timeout=0.2)
    store.state = "stuck"
    assert bucket.create("a", b"data", "image/webp", RECORD)[0].waiting
    asked = store.asked
    for number in range(20):
        assert bucket.create(f"{number}", b"data", "image/webp", RECORD)[0].waiting
    assert store.asked <= asked + 1, "only the background tries"
    store.state = "on"
    store.free.set()
    until(lambda: len(list(store.list())) == 21)


def test_a_full_spool_is_reported_before_anything_is_drawn(
    made: Callable[..., tuple[WriteBehindBucket, Switched]],
) -> None:
    """Storage up: no bound. Down: accepted up to the byte limit, then 503 and a health fault."""
    bucket, store = made(max_bytes=400)
    bucket.check_capacity()
    store.state = "off"
    bucket.create("a", b"d" * 300, "image/webp", RECORD)
    with pytest.raises(StorageUnavailable, match="SPOOL_BYTES") as raised:
        bucket.check_capacity()
    assert raised.value.status == 503
    assert raised.value.retry_after
    assert "SPOOL_BYTES" in (bucket.health() or "")
    store.state = "on"
    until(lambda: bucket.health() is None)
    bucket.check_capacity()


def test_the_first_to_reach_the_storage_keeps_the_name(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """Another server was faster: its image stays, and the spooled one is dropped."""
    bucket, store = made()
    store.state = "off"
    bucket.create("k", b"ours", "image/webp", RECORD)
    store.create("k", b"theirs", "image/webp", {})
    store.state = "on"
    until(lambda: files(tmp_path) == [])
    assert store.read("k") == b"theirs"


def test_overwrites_are_brought_in_their_order(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """The last requested one wins, also when it follows a spooled one."""
    bucket, store = made()
    bucket.create("k", b"old", "image/webp", RECORD)
    store.state = "off"
    for data in (b"one", b"two", b"three"):
        assert bucket.overwrite("k", data, "image/webp", RECORD).waiting
    assert bucket.read("k") == b"three"
    store.state = "on"
    until(lambda: files(tmp_path) == [])
    assert store.read("k") == b"three"


def test_a_bucket_that_may_only_be_read_still_gives_what_it_has(
    made: Callable[..., tuple[WriteBehindBucket, Switched]],
) -> None:
    """Reported as a fault from the start; reads work, and new images stay in the spool."""
    store = Switched()
    store.create("there", b"data", "image/webp", RECORD)
    bucket, _ = made(store, state="denied")
    assert bucket.health() == "The storage is denied."
    found = bucket.stat("there")
    assert found is not None
    assert not found.waiting
    assert bucket.read("there") == b"data"
    assert bucket.create("new", b"data", "image/webp", RECORD)[0].waiting
    store.state = "off"
    assert bucket.stat("there") is None
    store.state = "denied"
    until(lambda: bucket.stat("there") is not None)
    assert bucket.health() == "The storage is denied."
    store.state = "on"
    until(lambda: bucket.health() is None)


def test_a_picture_the_storage_refuses_for_good_becomes_a_dead_letter(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """It does not block other uploads, and its file stays for inspection."""
    bucket, store = made(state="off")
    bucket.create("bad", b"data", "image/webp", RECORD)
    store.state = "picky"
    until(lambda: files(tmp_path) == [])
    assert [(letter.key, letter.caller_informed) for letter in letters(tmp_path)] == [("bad", False)]
    store.state = "on"
    assert bucket.create("good", b"data", "image/webp", RECORD)[1]


def test_a_refusal_for_the_callers_fault_is_not_spooled(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """An error that no retry can fix is raised at once."""
    bucket, store = made()
    store.state = "picky"
    with pytest.raises(InvalidInput):
        bucket.create("k", b"data", "image/webp", RECORD)
    assert files(tmp_path) == []
    assert [(letter.key, letter.caller_informed) for letter in letters(tmp_path)] == [("k", True)]


def test_deleting_reaches_what_waits(made: Callable[..., tuple[WriteBehindBucket, Switched]]) -> None:
    """A deleted image is not uploaded afterwards."""
    bucket, store = made()
    store.state = "off"
    bucket.create("k", b"data", "image/webp", RECORD)
    with pytest.raises(StorageUnavailable):
        bucket.delete("k")  # the storage was unreachable, so the call raises
    assert bucket.stat("k") is None
    store.state = "on"
    until(lambda: bucket.health() is None)
    with pytest.raises(NotFound):
        store.read("k")


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    """A file in the place of the spool folder: one sentence, and no thread starts."""
    (tmp_path / "spool").write_text("in the way")
    bucket = WriteBehindBucket(Switched(), UploadSpool(tmp_path / "spool", 100), 1.0)
    with pytest.raises(StorageUnavailable, match="DATA_DIR cannot keep pictures"):
        bucket.open()
    bucket.close()


class Late(Switched):
    """A bucket whose writes complete only when released, even after the caller timed out."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[bytes, threading.Event] = {}

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        if gate := self.gates.get(data):
            gate.wait(60)
        return super().overwrite(key, data, content_type, record)


def test_a_write_that_lands_late_undoes_no_later_one(
    made: Callable[..., tuple[WriteBehindBucket, Switched]], tmp_path: Path
) -> None:
    """A timed-out write completes after a newer overwrite was requested: the newer one stays."""
    store = Late()
    gate = store.gates[b"old"] = threading.Event()
    bucket, _ = made(store, timeout=0.2)
    assert bucket.overwrite("k", b"old", "image/webp", RECORD).waiting
    assert bucket.overwrite("k", b"new", "image/webp", RECORD).waiting
    until(lambda: bucket.health() is None and bucket._calls.outage("write") is None)
    assert bucket.create("other", b"data", "image/webp", RECORD)[1], "other names are not held up"
    assert store.stat("k") is None
    with pytest.raises(StorageUnavailable, match="busy"):
        bucket.delete("k")
    bucket.overwrite("k", b"newest", "image/webp", RECORD)
    gate.set()
    until(lambda: files(tmp_path) == [])
    assert store.read("k") == b"newest"
    bucket.delete("k")
    assert store.stat("k") is None


def test_the_figures_tell_what_waits(made: Callable[..., tuple[WriteBehindBucket, Switched]]) -> None:
    """Count, bytes, age, and number of storage failures."""
    bucket, store = made()
    assert bucket.spool_stats() == {"pictures": 0, "bytes": 0, "oldest_seconds": 0.0, "failures": 0, "dead_letters": 0}
    store.state = "off"
    for number in range(3):
        bucket.create(f"{number}", b"data", "image/webp", RECORD)
    figures = bucket.spool_stats()
    assert (figures["pictures"], figures["bytes"] > 300, figures["failures"] > 0) == (3, True, True)
    assert 0 < figures["oldest_seconds"] < 600
    store.state = "on"
    until(lambda: bucket.spool_stats()["pictures"] == 0)


def test_a_look_that_rights_depend_on_is_not_answered_while_the_storage_is_down(
    made: Callable[..., tuple[WriteBehindBucket, Switched]],
) -> None:
    """`stat` reports absent, so generation continues; `look` raises, so that nobody treats the name as free."""
    bucket, store = made()
    bucket.create("k", b"data", "image/webp", RECORD)
    assert bucket.peek("k") == bucket.stat("k")
    store.state = "off"
    assert bucket.stat("k") is None
    with pytest.raises(StorageUnavailable):
        bucket.peek("k")
    store.state = "on"
    bucket.create("other", b"data", "image/webp", RECORD)
    until(lambda: bucket.stat("k") is not None)
    found = bucket.peek("k")
    assert found is not None
