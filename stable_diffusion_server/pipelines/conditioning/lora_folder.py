"""The folder of LoRAs that requests may name: lists them, and says why one cannot be used."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

import structlog
from cachetools import LRUCache

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.conditioning.lora_files import (
    DENOISERS,
    LARGEST_BYTES,
    LoraFile,
    LoraIdentity,
    check_lora,
    denoisers_of,
    identity_of,
    opened,
    read_lora,
)
from stable_diffusion_server.pipelines.conditioning.named_files import NamedFiles, is_settled, why_unnamed

SUFFIX = ".safetensors"
_CACHE_SIZE = 4096

_log = structlog.get_logger(__name__)


class LoraFolder:
    """A folder of LoRAs. Thread-safe; its methods read files.

    Subfolders are searched and links followed, also out of the folder. Of two files of one name the one nearer to the
    top has it, and the other its path in the folder. A name may be asked for in any case, with the file's ending, and
    with the subfolders before it. Results are cached by a file's device, inode, size and times.
    """

    def __init__(self, folder: Path | None, largest: int = LARGEST_BYTES) -> None:
        self.folder = folder
        self._named = NamedFiles(folder, SUFFIX)
        self._largest = largest
        self._fits: LRUCache[LoraIdentity, Collection[str]] = LRUCache(_CACHE_SIZE)
        self._digests: LRUCache[LoraIdentity, str] = LRUCache(_CACHE_SIZE)
        self._refused: LRUCache[tuple[LoraIdentity, str], str] = LRUCache(_CACHE_SIZE)
        self._lock = Lock()
        self._logged: set[tuple[str, str]] = set()

    def names(self, denoisers: Collection[str] = tuple(DENOISERS)) -> tuple[str, ...]:
        """Names of the LoRAs that may fit one of these denoisers, by header and earlier refusals; sorted."""
        return tuple(
            name for name, (why, fits) in self._checked_files().items() if not why and set(fits) & set(denoisers)
        )

    def largest_bytes(self, denoiser: str, count: int) -> int:
        """Bytes of the `count` largest LoRA files that may fit a denoiser."""
        files, sizes = self._named.read(), []
        for name in self.names({denoiser}):
            with suppress(OSError, KeyError):  # removed meanwhile
                sizes.append(files[name].stat().st_size)
        return sum(sorted(sizes)[-count:])

    def faults(self) -> dict[str, str]:
        """The LoRAs that cannot be used: name → reason, a sentence. Each is logged once."""
        faults = {name: why for name, (why, _) in self._checked_files().items() if why}
        faults |= {name: why_unnamed(name) for name in self._named.unnamed()}
        for name, why in faults.items():
            if (name, why) not in self._logged:
                self._logged.add((name, why))
                _log.warning("an adapter cannot be used", name=name, why=why)
        return faults

    def __contains__(self, name: object) -> bool:
        """Whether a file of that name exists; its content is not checked."""
        return isinstance(name, str) and self._find(name) is not None

    def file(self, name: str) -> Path:
        """The path of a LoRA by name. Raises `InvalidInput` if the folder holds no such file.

        The name is compared with the files found and never joined into a path, so it cannot leave the folder.
        """
        if self.folder is None or not self.folder.is_dir():
            raise InvalidInput("No adapters are offered here.", field="lora")
        file = self._find(name)
        if file is None:
            raise InvalidInput(f"{name[:100]!r} is not an adapter here.", field="lora")
        return file

    def check(self, name: str) -> None:
        """Raise `InvalidInput` with the reason when the file's header shows that it is not a usable LoRA."""
        file = self.file(name)
        with _as_request_error(), opened(file) as (source, facts):
            check_lora(source, facts, file.name, self._largest)

    def digest(self, name: str) -> str:
        """The digest of a LoRA's current content. Raises `InvalidInput` with the reason if it cannot be used."""
        file = self.file(name)
        with _as_request_error(), opened(file) as (source, facts):
            settled, identity = is_settled(facts), identity_of(facts)
            with self._lock:
                known = self._digests.get(identity)
            if known is not None:
                return known
            check_lora(source, facts, file.name, self._largest)
            source.seek(0)
            digest = hashlib.file_digest(source, "sha256").hexdigest()[:16]  # type: ignore[arg-type]  # as above
            if identity_of(os.fstat(source.fileno())) != identity:
                raise ModelLoadError(f"{file.name} is being written to at this moment; ask again.")
        if settled:
            with self._lock:
                self._digests[identity] = digest
        return digest

    def read(self, name: str) -> LoraFile:
        """Read a LoRA's current content. Raises `InvalidInput` with the reason."""
        with _as_request_error():
            return read_lora(self.file(name), self._largest)

    def refuse(self, file: LoraFile, denoiser: str, why: str) -> None:
        """Remember that this content does not fit a denoiser, so that it is no longer listed for it."""
        with self._lock:
            self._refused[file.identity, denoiser] = why

    def available(self, denoisers: Collection[str]) -> Mapping[str, str]:
        """The LoRAs usable with these denoisers: name → digest. The digest is computed on lookup.

        A lookup raises `InvalidInput` with the reason for a LoRA that cannot be used, and `KeyError` for an
        unknown name.
        """
        return _AvailableLoras(self, denoisers)

    def _find(self, asked: str) -> Path | None:
        """The path of the LoRA that is asked for, by its name or by another form of it."""
        files = self._named.read()
        if asked in files:
            return files[asked]
        wanted = _caseless(asked).removesuffix(SUFFIX)
        named = (
            file for name, file in files.items() if wanted in (_caseless(name), _caseless(self._named.place(file)))
        )
        return next(named, None)

    def _checked_files(self) -> dict[str, tuple[str, Collection[str]]]:
        """Name → (what is wrong with the file, as a sentence, or empty; the denoisers it may fit)."""
        return {name: self._check_file(file) for name, file in sorted(self._named.read().items())}

    def _check_file(self, file: Path) -> tuple[str, Collection[str]]:
        with suppress(OSError):
            identity = identity_of(os.stat(file))
            with self._lock:
                known = self._fits.get(identity)
            if known is not None:
                return self._remaining(identity, known)
        try:
            with opened(file) as (source, facts):
                identity, settled = identity_of(facts), is_settled(facts)
                fits = denoisers_of(check_lora(source, facts, file.name, self._largest))
        except ModelLoadError as error:
            return error.detail, ()
        if settled:
            with self._lock:
                self._fits[identity] = fits
        return self._remaining(identity, fits)

    def _remaining(self, identity: LoraIdentity, fits: Collection[str]) -> tuple[str, Collection[str]]:
        """The reason if every denoiser refused this content, otherwise empty; and the denoisers that did not."""
        with self._lock:
            known = {denoiser: self._refused.get((identity, denoiser), "") for denoiser in fits}
        left = [denoiser for denoiser, why in known.items() if not why]
        return ("" if left else next(iter(known.values()))), left


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class _AvailableLoras(Mapping[str, str]):
    """The LoRAs of a folder for some denoisers, by name, with digests."""

    def __init__(self, folder: LoraFolder, denoisers: Collection[str]) -> None:
        self._folder = folder
        self._denoisers = denoisers

    def __getitem__(self, name: str) -> str:
        if name not in self._folder:
            raise KeyError(name)
        return self._folder.digest(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.names(self._denoisers))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextmanager
def _as_request_error() -> Iterator[None]:
    """Translate `ModelLoadError` into `InvalidInput` for the request that names the file."""
    try:
        yield
    except ModelLoadError as error:
        raise InvalidInput(error.detail, field="lora") from error


def names_in(folder: Path | None) -> tuple[str, ...]:
    """Names of the usable LoRAs in a folder, sorted."""
    return LoraFolder(folder).names()


def find(folder: Path | None, name: str) -> Path:
    """The path of a LoRA by name. Raises `InvalidInput` with the reason if it cannot be used."""
    offered = LoraFolder(folder)
    offered.check(name)
    return offered.file(name)
