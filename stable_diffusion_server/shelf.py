"""What is stored already: listed, told how it was made, deleted, each within what a caller may touch. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stable_diffusion_server.bucket_api import Bucket
from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound
from stable_diffusion_server.history.entries import Entry, Wanted
from stable_diffusion_server.history.recorder import Recorder
from stable_diffusion_server.inscriptions import read_record
from stable_diffusion_server.orders import Caller, Stored


@dataclass(frozen=True, slots=True)
class Shelf:
    """The pictures in `folder` of a bucket, with the history of those drawn here. Every method blocks.

    A caller with a prefix has only what is in the folder of that name in `folder`.
    """

    bucket: Bucket
    history: Recorder
    folder: str

    def listed(self, caller: Caller, wanted: Wanted) -> list[Entry]:
        """The pictures drawn here that are asked for, the newest first."""
        return self.history.search(replace(wanted, folder=self._folder_of(caller)))

    def record_of(self, key: str, caller: Caller) -> tuple[str, Mapping[str, object]]:
        """Where it is known from (history, object or picture) and how the picture was made.

        Raises `Forbidden`, and `NotFound` for a picture that is not there or of which nothing is known.
        """
        self._check(key, caller)
        stored = self._stat(key)
        if stored is None:
            raise NotFound("There is no picture under this name.")
        entry = self.history.find("key", key)
        # Another server may have stored another picture under the name since.
        if entry is not None and stored.record.get("digest", entry.digest) == entry.digest:
            return "history", entry.record
        if stored.record:
            return "object", stored.record
        inside = read_record(self.bucket.read(key))
        if inside is None:
            raise NotFound("Nothing is known of how this picture was made.")
        return "picture", inside

    def remove(self, key: str, caller: Caller) -> None:
        """Delete a picture, and forget it; one that is not there is no error. Raises `Forbidden`."""
        self._check(key, caller)
        self.bucket.delete(key)
        self.history.forget(key)

    def _stat(self, key: str) -> Stored | None:
        try:
            return self.bucket.stat(key)
        except InvalidInput:
            return None  # a name no folder can hold names nothing in it

    def _folder_of(self, caller: Caller) -> str:
        return self.folder + caller.prefix

    def _check(self, key: str, caller: Caller) -> None:
        if "\0" in key or {"", ".", ".."} & set(key.split("/")):
            raise NotFound("There is no picture under this name.")
        if not key.startswith(self._folder_of(caller)):
            raise Forbidden("This key is for the pictures under another name.")
