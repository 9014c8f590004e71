"""The folder of LoRAs that requests may name: which there are, and which cannot be used and why."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import deque
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
from stable_diffusion_server.types import LORA_NAME_PATTERN

SUFFIX = ".safetensors"
_NAME = re.compile(LORA_NAME_PATTERN)
_MAX_DEPTH, _MAX_ENTRIES, _CACHE_SIZE = 6, 50_000, 4096
# A file changed more recently than this may change again without a new timestamp.
_UNSETTLED_SECONDS = 2.0

_log = structlog.get_logger(__name__)


class LoraFolder:
    """A folder of LoRAs. Thread-safe; its methods read files.

    Subfolders are searched and links followed, also out of the folder; of two files of one name the one nearer to the
    top counts. Results are cached by a file's device, inode, size and times.
    """

    def __init__(self, folder: Path | None, largest: int = LARGEST_BYTES) -> None:
        self.folder = folder
        self._largest = largest
        self._fits: LRUCache[LoraIdentity, Collection[str]] = LRUCache(_CACHE_SIZE)
        self._digests: LRUCache[LoraIdentity, str] = LRUCache(_CACHE_SIZE)
        self._refused: LRUCache[tuple[LoraIdentity, str], str] = LRUCache(_CACHE_SIZE)
        self._lock = Lock()
        self._logged: set[tuple[str, str]] = set()

    def names(self, denoisers: Collection[str] = tuple(DENOISERS)) -> tuple[str, ...]:
        """The adapters that can be used with one of these denoisers, as far as it is known, sorted."""
        return tuple(
            name for name, (why, fits) in self._checked_files().items() if not why and set(fits) & set(denoisers)
        )

    def faults(self) -> dict[str, str]:
        """The LoRAs that cannot be used: name → reason, a sentence. Each is logged once."""
        faults = {name: why for name, (why, _) in self._checked_files().items() if why}
        for file in _walk(self.folder) if self.folder is not None else ():
            if not _NAME.fullmatch(file.stem):
                name = ascii(file.name)  # it may not be valid text
                faults[name] = f"{name} cannot be asked for: names have letters, digits, '.', '_' and '-' alone."
        for name, why in faults.items():
            if (name, why) not in self._logged:
                self._logged.add((name, why))
                _log.warning("an adapter cannot be used", name=name, why=why)
        return faults

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of that name, whatever it holds."""
        return name in self._files()

    def file(self, name: str) -> Path:
        """The file of an adapter by its name. Raises `InvalidInput` for a name that is none of the folder's own.

        Names are compared with what the folder holds and never joined into a path.
        """
        if self.folder is None or not self.folder.is_dir():
            raise InvalidInput("No adapters are offered here.", field="lora")
        file = self._files().get(name)
        if file is None:
            raise InvalidInput(f"{name[:100]!r} is not an adapter here.", field="lora")
        return file

    def check(self, name: str) -> None:
        """Raise `InvalidInput` with the reason when an adapter's file is none, as far as its header tells."""
        file = self.file(name)
        with _as_request_error(), opened(file) as (source, facts):
            check_lora(source, facts, file.name, self._largest)

    def digest(self, name: str) -> str:
        """The digest of an adapter's present content. Raises `InvalidInput` with the reason for one that is unfit."""
        file = self.file(name)
        with _as_request_error(), opened(file) as (source, facts):
            settled, identity = _is_settled(facts), identity_of(facts)
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
        """An adapter's present content. Raises `InvalidInput` with the reason."""
        with _as_request_error():
            return read_lora(self.file(name), self._largest)

    def refuse(self, file: LoraFile, denoiser: str, why: str) -> None:
        """Remember that a file as it was read does not fit a denoiser, so that it is no longer offered for it."""
        with self._lock:
            self._refused[file.identity, denoiser] = why

    def available(self, denoisers: Collection[str]) -> Mapping[str, str]:
        """The adapters that can be used with these denoisers, each with its digest, which is read when looked up.

        Looking up one that cannot be used raises `InvalidInput` with the reason, and `KeyError` where there is none.
        """
        return _AvailableLoras(self, denoisers)

    def _files(self) -> dict[str, Path]:
        """Every adapter's file by its name."""
        files: dict[str, Path] = {}
        for file in _walk(self.folder) if self.folder is not None else ():
            if _NAME.fullmatch(file.stem):
                files.setdefault(file.stem, file)
        return files

    def _checked_files(self) -> dict[str, tuple[str, Collection[str]]]:
        """Each adapter with what is wrong with it, in a sentence, and the denoisers it may fit."""
        return {name: self._check_file(file) for name, file in sorted(self._files().items())}

    def _check_file(self, file: Path) -> tuple[str, Collection[str]]:
        with suppress(OSError):
            identity = identity_of(os.stat(file))
            with self._lock:
                known = self._fits.get(identity)
            if known is not None:
                return self._remaining(identity, known)
        try:
            with opened(file) as (source, facts):
                identity, settled = identity_of(facts), _is_settled(facts)
                fits = denoisers_of(check_lora(source, facts, file.name, self._largest))
        except ModelLoadError as error:
            return error.detail, ()
        if settled:
            with self._lock:
                self._fits[identity] = fits
        return self._remaining(identity, fits)

    def _remaining(self, identity: LoraIdentity, fits: Collection[str]) -> tuple[str, Collection[str]]:
        """The denoisers that have not refused a content yet, and the reason when none is left."""
        with self._lock:
            known = {denoiser: self._refused.get((identity, denoiser), "") for denoiser in fits}
        left = [denoiser for denoiser, why in known.items() if not why]
        return ("" if left else next(iter(known.values()))), left


def _is_settled(facts: os.stat_result) -> bool:
    """Whether a change from now on would show in a file's times."""
    return time.time() - max(facts.st_mtime, facts.st_ctime) > _UNSETTLED_SECONDS


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


def _walk(folder: Path) -> Iterator[Path]:
    """What is called like an adapter's file in a folder and its sub-folders, those near the top first.

    Links are followed, and no folder is entered twice, so that they may lead in circles; a folder that cannot be
    listed is passed over.
    """
    entered: set[tuple[int, int]] = set()
    left, most = deque([(folder, 0)]), _MAX_ENTRIES
    while left and most > 0:
        place, depth = left.popleft()
        try:
            facts = place.stat()
            known = (facts.st_dev, facts.st_ino) in entered
            entered.add((facts.st_dev, facts.st_ino))
            entries = [] if known else sorted(place / entry for entry in os.listdir(place))
        except OSError:
            continue
        most -= len(entries)
        for entry in entries:
            if entry.suffix == SUFFIX:
                yield entry
            elif depth < _MAX_DEPTH and not entry.name.startswith(".") and entry.is_dir():
                left.append((entry, depth + 1))


@contextmanager
def _as_request_error() -> Iterator[None]:
    """Report a fault of a file as an error of the request that names it."""
    try:
        yield
    except ModelLoadError as error:
        raise InvalidInput(error.detail, field="lora") from error


def names_in(folder: Path | None) -> tuple[str, ...]:
    """The adapters of a folder that can be used, by name and sorted."""
    return LoraFolder(folder).names()


def find(folder: Path | None, name: str) -> Path:
    """The file of an adapter by its name. Raises `InvalidInput` with the reason for one that cannot be used."""
    offered = LoraFolder(folder)
    offered.check(name)
    return offered.file(name)
