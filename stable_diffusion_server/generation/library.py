"""The images that a caller owns: lists, inspects and deletes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound
from stable_diffusion_server.generation.permissions import Ownership
from stable_diffusion_server.imaging import read_record
from stable_diffusion_server.storage import Bucket, HistoryEntry, HistoryQuery, HistoryWriter
from stable_diffusion_server.types import Caller, StoredObject


@dataclass(frozen=True, slots=True)
class ImageLibrary:
    """The images in `folder` of a bucket, and the history of images generated here. Every method blocks.

    A caller with a prefix can access exactly the images under that prefix. A caller with neither prefix nor full access
    can access the images made by its API key (read from `ownership` or the history). An anonymous caller has no access.
    """

    bucket: Bucket
    history: HistoryWriter
    folder: str
    ownership: Ownership = field(default_factory=Ownership)

    def search(self, caller: Caller, wanted: HistoryQuery) -> list[HistoryEntry]:
        """Return the history entries that match a query, newest first. Raises `Forbidden`."""
        _check_known(caller)
        own = None if caller.has_full_access or caller.prefix else caller.name
        return self.history.search(replace(wanted, prefix=self._folder_of(caller), caller=own))

    def find_by_digest(self, digest: str, caller: Caller) -> HistoryEntry | None:
        """Return the history entry of a digest, `None` unless the caller may read its record."""
        if caller.anonymous:
            return None
        own = None if caller.has_full_access or caller.prefix else caller.name
        found = self.history.search(HistoryQuery(prefix=self._folder_of(caller), digest=digest, caller=own, limit=1))
        return found[0] if found else None

    def read_record(self, key: str, caller: Caller) -> tuple[str, Mapping[str, object]]:
        """Return the source of the record (`history`, `object` or `picture`), and how the image was made.

        Raises `Forbidden`, and `NotFound` if the image is missing or has no record.
        """
        self._check(key, caller)
        stored = self._stat(key)
        if stored is None:
            raise NotFound("There is no picture under this name.")
        entry = self.history.find("key", key)
        self._check_own(stored, entry, caller)
        # Another server may have overwritten the key since.
        if entry is not None and stored.record.get("digest", entry.digest) == entry.digest:
            return "history", entry.record
        if stored.record:
            return "object", stored.record
        inside = read_record(self.bucket.read(key))
        if inside is None:
            raise NotFound("Nothing is known of how this picture was made.")
        return "picture", inside

    def delete(self, key: str, caller: Caller) -> None:
        """Delete an image and its history entry. A missing image is not an error. Raises `Forbidden`."""
        self._check(key, caller)
        if not caller.has_full_access and (stored := self._stat(key)) is not None:
            self._check_own(stored, self.history.find("key", key), caller)
        self.bucket.delete(key)
        self.history.delete(key)

    def _stat(self, key: str) -> StoredObject | None:
        try:
            return self.bucket.peek(key)
        except InvalidInput:
            return None  # a key that the bucket refuses cannot exist

    def _folder_of(self, caller: Caller) -> str:
        return self.folder + caller.prefix

    def _check_own(self, stored: StoredObject, entry: HistoryEntry | None, caller: Caller) -> None:
        """Raise `Forbidden` for another API key's image. The history may know owners that records lack."""
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
        raise Forbidden("Without an API key, pictures cannot be listed, inspected or deleted.")
