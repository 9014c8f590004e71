"""What a caller may use: the images that it owns (lists, inspects and deletes them), and the models of its API key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound
from stable_diffusion_server.imaging import read_record
from stable_diffusion_server.pipelines import ModelSpec, known_names
from stable_diffusion_server.storage import Bucket, HistoryEntry, HistoryQuery, HistoryWriter
from stable_diffusion_server.types import Caller, GenerationRequest, StoredObject

_OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Ownership:
    """Decides which caller owns an image. `keyed` is an HMAC with the server's secret; `None` without API keys.

    `folder` holds all images. With `private`, image URLs are signed. An object's record holds the owner as an HMAC, so
    that a public bucket reveals no names of API keys.
    """

    keyed: Callable[[str], str] | None = None
    folder: str = ""
    private: bool = False

    def conceal(self, digest: str, request: GenerationRequest) -> str:
        """Return the digest to use in an object key: with API keys, an HMAC that differs per API key.

        Equal requests of two API keys get different object keys, so neither caller learns about the other's request.
        """
        return digest if self.keyed is None else self.keyed(f"name\n{request.named_for}\n{digest}")

    def owner_record(self, caller: Caller) -> dict[str, str]:
        """Return the owner entry of an object's record; empty without API keys."""
        return {_OWNER: self._mark(caller)} if self.keyed is not None and caller.name else {}

    def owns(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller owns an image: its API key made it, or the object key is under the API key's prefix."""
        if caller.prefix and stored.key.startswith(self.folder + caller.prefix):
            return True
        return self.keyed is not None and bool(caller.name) and stored.record.get(_OWNER) == self._mark(caller)

    def may_know(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller may learn that an image was stored before its request. Always true without API keys."""
        return self.keyed is None or caller.has_full_access or self.owns(caller, stored)

    def visible_record(self, caller: Caller, stored: StoredObject, *, named: bool) -> bool:
        """`may_know` for the result of a request; `named`: the request chose the object key.

        Raises `Forbidden` if the result would give a private image to another API key that guessed its object key.
        """
        may_know = self.may_know(caller, stored)
        if self.private and named and not may_know:
            raise Forbidden("Another key has taken this name.", field="save_path")
        return may_know

    def check_overwrite(self, caller: Caller, stored: StoredObject | None) -> None:
        """Raise `Forbidden` for an image the caller must not overwrite."""
        if stored is not None and not (caller.has_full_access or self.owns(caller, stored)):
            raise Forbidden("The picture of this name was made by another key.", field="save_path")

    def _mark(self, caller: Caller) -> str:
        return self.keyed(f"owner\n{caller.name}")[:32] if self.keyed is not None else ""


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


class OfferedModels(Protocol):
    """The models of the server, the default one, and why others cannot be used."""

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The models by name."""

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""

    @property
    def unusable(self) -> Mapping[str, str]:
        """Reasons by name."""


class PermittedModels(Mapping[str, ModelSpec]):
    """The models of `whole` that `names` name, by name or alias; in the order of `names`.

    They are looked up at each access, since models come and go.
    """

    def __init__(self, whole: Mapping[str, ModelSpec], names: tuple[str, ...]) -> None:
        self._whole = whole
        self._names = names

    def __getitem__(self, name: str) -> ModelSpec:
        spec = self._whole[name]
        if spec.name not in set(self):
            raise KeyError(name)
        return spec

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._whole[name].name for name in self._names if name in self._whole))

    def __len__(self) -> int:
        return len(list(iter(self)))


def permitted_models(models: Mapping[str, ModelSpec], caller: Caller) -> Mapping[str, ModelSpec]:
    """Return the models that a caller may use."""
    return models if caller.uses_all_models else PermittedModels(models, caller.models)


def not_permitted(name: str, models: Mapping[str, ModelSpec]) -> str:
    """Return the sentence about a model that is not among those that a caller may use, whether there is one or not."""
    if not models:
        return "The models that this key may use are not here."
    return f"This key may not use the model {name[:100]!r}; for it {known_names(name, sorted(models))}."


def with_permitted_model(request: GenerationRequest, caller: Caller, options: OfferedModels) -> GenerationRequest:
    """Return the request with a model that the caller may use: the first of them if it names none.

    Raises `Forbidden` for another model, and equally for one that there is not.
    """
    if caller.uses_all_models:
        return request
    models = permitted_models(options.models, caller)
    wanted = request.model or options.default_model
    if wanted in models:
        return replace(request, model=models[wanted].name)
    if wanted in options.unusable and wanted in caller.models:
        return replace(request, model=wanted)  # refused with the reason
    if request.model is None and models:
        return replace(request, model=next(iter(models)))
    raise Forbidden(not_permitted(wanted, models), field="model")
