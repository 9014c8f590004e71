"""A bucket in front of a bucket, which never loses what it was given. Knows no HTTP and no kind of bucket."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from stable_diffusion_server.errors import InvalidInput, NotFound, ServerError, StorageUnavailable
from stable_diffusion_server.orders import Stored
from stable_diffusion_server.spool.files import Kept, Spool
from stable_diffusion_server.spool.store import Store

_log = structlog.get_logger(__name__)

T = TypeVar("T")

# Calls to the bucket that may be under way at once.
_CALLS = 8
_PAUSE_LONGEST = 60.0


class Spooling:
    """A bucket in front of `store` that takes a picture whether or not the store does.

    A picture goes to the spool's disk first, then to the store, then off the disk. When the store fails, or does not
    answer within `patience` seconds, the picture stays spooled, counts as stored but `waiting`, and is brought to the
    store in the background, over restarts. While the store is known to be down nobody waits for it: only the
    background tries, every `pause` seconds at first and more and more seldom.

    A write that nobody waits for any more may still land. Until it is known to have ended nothing else is brought
    under its key, so that it undoes no later one.
    """

    def __init__(self, store: Store, spool: Spool, patience: float, pause: float = 1.0) -> None:
        self._store = store
        self._spool = spool
        self._patience = patience
        self._pause = pause
        self._calls = ThreadPoolExecutor(_CALLS, thread_name_prefix="storage")
        # What does not work ("read", "write") and why. Reading may well work where writing is not allowed.
        self._down: dict[str, str] = {}
        self._was_up = False
        self._failures = 0
        # Writes by key that were not waited for to their end.
        self._late: dict[str, Future[Any]] = {}
        self._bringing = threading.Lock()
        self._stop = threading.Event()
        self._drain = threading.Thread(target=self._drain_until_stopped, name="spool", daemon=True)

    def open(self) -> None:
        """Open spool and store and start the drain. A store that cannot be opened is told by `fault` and tried again.

        Raises `StorageUnavailable` when the spool's folder cannot be used, and may be called again then.
        """
        if self._drain.is_alive():
            return
        self._spool.open()
        with suppress(StorageUnavailable):
            self._ask("write", self._store.open)
            self._was_up = True
        self._drain.start()

    def close(self) -> None:
        """Stop the drain; what is spooled stays for the next start."""
        self._stop.set()
        if self._drain.is_alive():
            self._drain.join(self._patience)
        self._calls.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def fault(self) -> str | None:
        """Why the store could not be opened since the start, or that it is down and the spool full."""
        down = self._down.get("write")
        if down is not None and not self._was_up:
            return down
        try:
            self.admit()
        except StorageUnavailable as error:
            return error.detail
        return None

    def admit(self) -> None:
        """Raises `StorageUnavailable` when the store is down and the spool full: asked before anything is drawn."""
        if (down := self._down.get("write")) is not None:
            try:
                self._spool.admit()
            except StorageUnavailable as error:
                raise StorageUnavailable(f"{down} {error.detail}", retry_after=30) from error

    def figures(self) -> dict[str, float]:
        """For the operator: pictures that wait, their bytes, the oldest one's age in seconds, failures so far."""
        count, size, age = self._spool.figures()
        return {"pictures": count, "bytes": size, "oldest_seconds": age, "failures": self._failures}

    def stat(self, key: str) -> Stored | None:
        """What waits under `key`, else what the store has; `None` as well while the store is down."""
        if (kept := self._spool.newest(key)) is not None:
            return kept.stored
        try:
            return self._ask("read", lambda: self._store.stat(key))
        except StorageUnavailable:
            return None

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[Stored, bool]:
        """Store `data` if `key` is absent. Who was first while the store was down is settled when it is up again."""
        if (kept := self._spool.newest(key)) is not None:
            return kept.stored, False
        stored = _waiting(key, data, content_type, record)
        return self._give(data, stored, lambda: self._store.create(key, data, content_type, record), overwrite=False)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        """Store `data` under `key`, after whatever waits there already."""
        stored = _waiting(key, data, content_type, record)
        if self._spool.newest(key) is not None or self._is_late(key):
            self._spool.hand_over(self._spool.put(data, stored, overwrite=True))
            return stored

        def bring() -> tuple[Stored, bool]:
            return self._store.overwrite(key, data, content_type, record), True

        return self._give(data, stored, bring, overwrite=True)[0]

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to before `end`, from the spool or the store. Raises `NotFound`."""
        if (kept := self._spool.newest(key)) is not None:
            with suppress(NotFound):  # brought to the store this very moment
                return self._spool.read(kept)[start:end]
        return self._ask("read", lambda: self._store.read(key, start, end))

    def delete(self, key: str) -> None:
        """Remove it from the spool and from the store."""
        for kept in self._spool.waiting():
            if kept.stored.key == key:
                self._spool.drop(kept)
        if self._is_late(key) or not self._bringing.acquire(timeout=self._patience):
            raise StorageUnavailable("The storage is still busy with an earlier write of this name.", retry_after=30)
        try:
            self._ask("write", lambda: self._store.delete(key))
        finally:
            self._bringing.release()

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys in the store that begin with `prefix`."""
        return self._store.list(prefix)

    def url(self, key: str) -> str | None:
        """The store's address; `None` for what waits here, which only this server can give."""
        return None if self._spool.newest(key) is not None else self._store.url(key)

    def _give(
        self, data: bytes, stored: Stored, bring: Callable[[], tuple[Stored, bool]], *, overwrite: bool
    ) -> tuple[Stored, bool]:
        """Spool, bring, and take off the spool; or leave it there, waiting."""
        kept: Kept | None = None
        with suppress(StorageUnavailable):  # a full disk here is no harm as long as the store is up
            kept = self._spool.put(data, stored, overwrite=overwrite)
        try:
            answer = self._ask("write", bring, stored.key)
        except StorageUnavailable:
            if kept is None:
                raise
            self._spool.hand_over(kept)
            return stored, True
        except ServerError:  # refused for good; whatever else may happen, the file is found at the next start
            if kept is not None:
                self._spool.drop(kept)
            raise
        if kept is not None:
            self._spool.drop(kept)
        return answer

    def _ask(self, what: str, call: Callable[[], T], writes: str | None = None) -> T:
        """The store's answer, waited for no longer than `patience`, and not at all while it is known to be down.

        `writes` is the key that the call writes.
        """
        if (down := self._down.get(what)) is not None:
            raise StorageUnavailable(down, retry_after=30)
        answer = self._calls.submit(call)
        try:
            return answer.result(self._patience)
        except TimeoutError as error:
            if writes is not None and not answer.cancel():
                self._late[writes] = answer
            late = StorageUnavailable(f"The storage did not answer within {self._patience:g} seconds.", retry_after=30)
            self._found_down(what, late.detail)
            raise late from error
        except StorageUnavailable as error:
            self._found_down(what, error.detail)
            raise

    def _is_late(self, key: str) -> bool:
        """Whether a write of this key that was given up is still under way."""
        late = self._late.get(key)
        if late is None or not late.done():
            return late is not None
        self._late.pop(key, None)
        return False

    def _found_down(self, what: str, why: str) -> None:
        self._failures += 1
        if what not in self._down:
            _log.error("the storage is down", to=what, reason=why)
        self._down[what] = why

    def _drain_until_stopped(self) -> None:
        pause = self._pause
        while not self._stop.wait(pause):
            # Each by itself: a bucket that may only be read is to be read again after an outage.
            well = [self._tried(what, recover) for what, recover in (("read", self._look), ("write", self._empty))]
            pause = self._pause if all(well) else min(2 * pause, _PAUSE_LONGEST)

    def _tried(self, what: str, recover: Callable[[], None]) -> bool:
        """Whether it went well; what had been down is up again then."""
        try:
            recover()
        except ServerError as error:
            self._found_down(what, error.detail)
        except Exception:
            _log.exception("the spool stumbled and goes on")
        else:
            if self._down.pop(what, None) is not None:
                _log.info("the storage is up again", to=what)
            return True
        return False

    def _look(self) -> None:
        if "read" in self._down:
            self._store.stat("?")

    def _empty(self) -> None:
        """Bring what waits, after a look whether writing works when it did not."""
        if "write" in self._down:
            self._store.open()
            self._was_up = True
        for kept in self._spool.waiting():
            if self._stop.is_set():
                return
            with self._bringing:
                # What is late is brought in a later round, and all that waits behind it under the same key.
                if not self._is_late(kept.stored.key):
                    self._bring(kept)

    def _bring(self, kept: Kept) -> None:
        stored = kept.stored
        if not kept.path.exists():
            self._spool.drop(kept)  # deleted, or brought by another process, since this round began
            return
        try:
            data = self._spool.read(kept)
            if kept.overwrite:
                self._store.overwrite(stored.key, data, stored.content_type, stored.record)
            elif not self._store.create(stored.key, data, stored.content_type, stored.record)[1]:
                _log.warning("another server stored this name meanwhile; the spooled one is dropped", name=stored.key)
        except (InvalidInput, ValueError) as error:
            _log.exception("the storage refuses a spooled picture for good; it is set aside", reason=str(error))
            self._spool.set_aside(kept)
            return
        except NotFound:
            pass  # another process with this folder brought it
        self._spool.drop(kept)


def _waiting(key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
    return Stored(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record), waiting=True)
