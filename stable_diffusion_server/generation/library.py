"""What is stored already: listed, told how it was made, deleted, each within what a caller may touch. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound
from stable_diffusion_server.generation.ownership import Ownership
from stable_diffusion_server.imaging import read_record
from stable_diffusion_server.storage import Bucket, HistoryEntry, HistoryQuery, HistoryWriter
from stable_diffusion_server.types import Caller, StoredObject


@dataclass(frozen=True, slots=True)
class ImageLibrary:
    """The pictures in `folder` of a bucket, with the history of those drawn here. Every method blocks.

    A caller with a prefix has only what is in the folder of that name in `folder`, all of it; one without who does not
    manage has what was made by its key, as `ownership` or the history tells; an anonymous one has nothing.
    """

    bucket: Bucket
    history: HistoryWriter
    folder: str
    ownership: Ownership = field(default_factory=Ownership)

    def search(self, caller: Caller, wanted: HistoryQuery) -> list[HistoryEntry]:
        """The pictures drawn here that are asked for, the newest first. Raises `Forbidden`."""
        _check_known(caller)
        own = None if caller.has_full_access or caller.prefix else caller.name
        return self.history.search(replace(wanted, prefix=self._folder_of(caller), caller=own))

    def find_by_digest(self, digest: str, caller: Caller) -> HistoryEntry | None:
        """What the history has of a picture of that digest, among those whose records the caller may read."""
        if caller.anonymous:
            return None
        own = None if caller.has_full_access or caller.prefix else caller.name
        found = self.history.search(HistoryQuery(prefix=self._folder_of(caller), digest=digest, caller=own, limit=1))
        return found[0] if found else None

    def read_record(self, key: str, caller: Caller) -> tuple[str, Mapping[str, object]]:
        """Where it is known from (history, object or picture) and how the picture was made.

        Raises `Forbidden`, and `NotFound` for a picture that is not there or of which nothing is known.
        """
        self._check(key, caller)
        stored = self._stat(key)
        if stored is None:
            raise NotFound("There is no picture under this name.")
        entry = self.history.find("key", key)
        self._check_own(stored, entry, caller)
        # Another server may have stored another picture under the name since.
        if entry is not None and stored.record.get("digest", entry.digest) == entry.digest:
            return "history", entry.record
        if stored.record:
            return "object", stored.record
        inside = read_record(self.bucket.read(key))
        if inside is None:
            raise NotFound("Nothing is known of how this picture was made.")
        return "picture", inside

    def delete(self, key: str, caller: Caller) -> None:
        """Delete a picture, and forget it; one that is not there is no error. Raises `Forbidden`."""
        self._check(key, caller)
        if not caller.has_full_access and (stored := self._stat(key)) is not None:
            self._check_own(stored, self.history.find("key", key), caller)
        self.bucket.delete(key)
        self.history.delete(key)

    def _stat(self, key: str) -> StoredObject | None:
        try:
            return self.bucket.peek(key)
        except InvalidInput:
            return None  # a name no folder can hold names nothing in it

    def _folder_of(self, caller: Caller) -> str:
        return self.folder + caller.prefix

    def _check_own(self, stored: StoredObject, entry: HistoryEntry | None, caller: Caller) -> None:
        """Raise `Forbidden` for a picture of another key. Those of before records told it are known by the history."""
        if caller.has_full_access or self.ownership.owns(caller, stored):
            return
        if "owner" in stored.record or entry is None or entry.caller != caller.name:
            raise Forbidden("This picture was made by another key.")

    def _check(self, key: str, caller: Caller) -> None:
        _check_known(caller)
        if "\0" in key or {"", ".", ".."} & set(key.split("/")):
            raise NotFound("There is no picture under this name.")
        if not key.startswith(self._folder_of(caller)):
            raise Forbidden("This key is for the pictures under another name.")


def _check_known(caller: Caller) -> None:
    if caller.anonymous:
        raise Forbidden("Without a key pictures are neither listed, deleted, nor told how they were made.")
