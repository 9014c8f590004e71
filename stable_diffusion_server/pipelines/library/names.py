"""Names of models: gives each file its name, and finds a file by anything that a caller may call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.library.identity import DRAWING, FileIdentity, Kind
from stable_diffusion_server.pipelines.library.scan import FoundModel
from stable_diffusion_server.pipelines.library.spec_file import OwnerSpec
from stable_diffusion_server.pipelines.model_spec import nearest_names, plain_name

_MAX_NAME = 512
SHORT_HASH = 10
_KIND_ORDER = {kind: number for number, kind in enumerate((Kind.PIPELINE, Kind.CHECKPOINT, Kind.DENOISER))}
_MODEL_FOLDERS = ("", "checkpoints", "stable-diffusion", "diffusion_models", "unet")


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """A model or part of one, as the library lists it.

    Attributes:
        name: Unique among the files of its role.
        role: `model` for what a request may name as its model, otherwise its kind.
        size: Bytes of the file, or of a folder's weight files.
        note: Why it does not have the name of its file, as a sentence; empty if it does.
    """

    name: str
    role: str
    found: FoundModel
    identity: FileIdentity
    size: int = 0
    spec: OwnerSpec = field(default_factory=OwnerSpec)
    note: str = ""

    @property
    def path(self) -> Path:
        """Its path; links in it are not resolved."""
        return self.found.path

    @property
    def file_name(self) -> str:
        """Its name with the ending of the file."""
        return self.found.name + self.found.ending

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it cannot be used, as sentences: its file's and its spec's."""
        own = (f"{shown(self.file_name, 200)} {self.identity.reason}.",) if self.identity.reason else ()
        return (*own, *self.spec.faults)


def role_of(found: FoundModel, identity: FileIdentity) -> str:
    """The role of a file. One of unknown kind has that of its folder, so that who names it reads what is wrong."""
    if identity.kind in DRAWING:
        return "model"
    if identity.kind is Kind.UNKNOWN and found.folder.lower() in _MODEL_FOLDERS:
        return "model"
    return identity.kind.value


def name_models(
    models: Iterable[tuple[FoundModel, FileIdentity, int, OwnerSpec]],
) -> list[LibraryModel]:
    """Give each file its name, unique within its role without regard to case.

    Of several with one name the first keeps it, by this order: usable ones, the folder's place in MODELS_DIR, those
    nearer to the top, pipelines before checkpoints before denoisers, safetensors before GGUF, the path. The others are
    named with their ending, then with their folder, then with a number.
    """
    named: list[LibraryModel] = []
    taken: dict[tuple[str, str], str] = {}
    for found, identity, size, spec in sorted(models, key=lambda model: _order(model[0], model[1])):
        role = role_of(found, identity)
        name = next(name for name in _candidates(found) if (role, plain_name(name)) not in taken)
        note = ""
        if name != found.name:
            note = f"{shown(found.name, 200)} is the name of {shown(taken[role, plain_name(found.name)], 200)}."
        taken[role, plain_name(name)] = f"{found.folder}/{found.name}{found.ending}".lstrip("/")
        named.append(LibraryModel(name, role, found, identity, size, spec, note))
    return named


def _order(found: FoundModel, identity: FileIdentity) -> tuple[object, ...]:
    kind = _KIND_ORDER.get(identity.kind, len(_KIND_ORDER))
    return bool(identity.reason), found.root, found.name.count("/"), kind, found.ending == ".gguf", str(found.path)


def _candidates(found: FoundModel) -> Iterator[str]:
    yield found.name
    whole = found.name + found.ending
    yield whole
    if found.folder:
        yield f"{found.folder}/{found.name}"
        yield f"{found.folder}/{whole}"
    number = 2
    while True:
        yield f"{whole} ({number})"
        number += 1


class ModelNames:
    """Finds models by name. `digest_of` gives the SHA-256 of a file if it is known already, without reading it."""

    def __init__(
        self, models: Sequence[LibraryModel], digest_of: Callable[[Path], str | None] = lambda _: None
    ) -> None:
        self._models = models
        self._digest_of = digest_of
        self._by_name: dict[tuple[str, str], LibraryModel] = {}
        for names in (_names, _owner_names, _other_names):
            for model in models:
                for name in names(model):
                    self._by_name.setdefault((model.role, plain_name(name)), model)

    def resolve(self, name: str, role: str = "model", field: str = "model") -> LibraryModel:
        """The model of a name, alias, file name, path below MODELS_DIR, title or short hash.

        Raises `InvalidInput` with the nearest names.
        """
        text, digest = split_title(name[:_MAX_NAME])
        found = self._by_name.get((role, plain_name(text))) if text else None
        known = self._digest_of(found.path) if found and digest else None
        if found is not None and (known is None or known.startswith(digest)):
            return found
        if by_hash := self._by_hash(digest or plain_name(text), role):
            return by_hash
        if found is not None:
            raise InvalidInput(
                f"{shown(name)!r}: the file {shown(found.file_name)} has the hash {(known or '')[:SHORT_HASH]}.",
                field=field,
            )
        near = self.nearest(text or name, role)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise InvalidInput(f"{shown(name)!r} is not a {role.replace('-', ' ')} here{hint}", field=field)

    def every_name(self, role: str = "model") -> Mapping[str, str]:
        """Everything that a model of a role may be called, as `plain_name` gives it → the model's name."""
        return {name: model.name for (of, name), model in self._by_name.items() if of == role}

    def nearest(self, name: str, role: str = "model") -> list[str]:
        """Up to three names like this one, the nearest first."""
        near = nearest_names(name, sorted({model.name for model in self._models if model.role == role}))
        return [shown(known) for known in near]

    def _by_hash(self, digest: str, role: str) -> LibraryModel | None:
        """The model whose known digest begins with these digits; at least those of a short hash."""
        if len(digest) < SHORT_HASH or not _is_hex(digest):
            return None
        models = (model for model in self._models if model.role == role and not model.path.is_dir())
        return next((model for model in models if (self._digest_of(model.path) or "").startswith(digest)), None)


def split_title(name: str) -> tuple[str, str]:
    """`name [a1b2c3d4e5]` as name and hash; the hash is empty for other texts."""
    text = name.strip()
    if text.endswith("]"):
        start, bracket, inner = text[:-1].rpartition("[")
        if bracket and 6 <= len(inner) <= 64 and _is_hex(inner):
            return start.strip(), inner.lower()
    return text, ""


def _is_hex(text: str) -> bool:
    return bool(text) and not set(text) - set("0123456789abcdefABCDEF")


def _names(model: LibraryModel) -> Iterator[str]:
    yield model.name


def _owner_names(model: LibraryModel) -> Iterator[str]:
    yield from model.spec.aliases
    if model.spec.title:
        yield model.spec.title


def _other_names(model: LibraryModel) -> Iterator[str]:
    """The file's name with and without ending, below its folder, and without folders."""
    found = model.found
    for name in (found.name, found.name + found.ending):
        yield name
        if found.folder:
            yield f"{found.folder}/{name}"
        yield name.rpartition("/")[2]
