"""The models of MODELS_DIR: scanned, identified and named."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from stable_diffusion_server.pipelines.library.folder_rules import evidence_of
from stable_diffusion_server.pipelines.library.identification import identify
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.pipelines.library.identity_cache import IdentityCache
from stable_diffusion_server.pipelines.library.names import SHORT_HASH, LibraryModel, ModelNames, name_models
from stable_diffusion_server.pipelines.library.scan import FoundModel, scan_folders
from stable_diffusion_server.pipelines.library.shards import with_shards
from stable_diffusion_server.pipelines.library.spec_file import OwnerSpec, read_spec, spec_path

_MAX_PARTS = 2000


class FileDigests(Protocol):
    """SHA-256 digests of files, cached."""

    def of_file(self, file: Path) -> str:
        """The digest of a file, 64 hexadecimal digits; reads it if need be. Raises `ModelLoadError`."""

    def remembered_file(self, file: Path) -> str | None:
        """The digest if it is cached and the file has not changed since."""


class ModelLibrary:
    """Every model and part of one below some folders. Not thread-safe; `refresh` reads the disk.

    `cache` is a file that keeps identities between processes; `skip` names folders that are left out.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        cache: Path | None = None,
        digests: FileDigests | None = None,
        skip: Collection[str] = (),
    ) -> None:
        self._folders = tuple(folders)
        self._cache = cache
        self._digests = digests
        self._skip = frozenset(skip)
        self.models: tuple[LibraryModel, ...] = ()
        self.remarks: tuple[str, ...] = ()
        self.names = ModelNames(())

    def refresh(self) -> None:
        """Scan the folders. Reads the headers of new and changed files only."""
        scan = scan_folders(self._folders, self._skip)
        cache = IdentityCache(self._cache)
        named = name_models((found, _identity(cache, found), _size(found), _spec(found)) for found in scan.found)
        cache.save()
        self.models = tuple(sorted(named, key=lambda model: (model.role != "model", model.role, model.name.casefold())))
        self.remarks = tuple(scan.remarks)
        remembered = self._digests.remembered_file if self._digests else lambda _: None
        self.names = ModelNames(self.models, remembered)

    def title(self, model: LibraryModel) -> str:
        """The name, with the short hash if it is known: `name [a1b2c3d4e5]`. Reads no weights."""
        known = None if self._digests is None or model.path.is_dir() else self._digests.remembered_file(model.path)
        return f"{model.name} [{known[:SHORT_HASH]}]" if known else model.name


def _identity(cache: IdentityCache, found: FoundModel) -> FileIdentity:
    evidence = with_shards(found.path) if found.ending else evidence_of(found.path)
    return cache.identity(found.path, evidence, identify)


def _spec(found: FoundModel) -> OwnerSpec:
    path = spec_path(found.path)
    return read_spec(path) if path else OwnerSpec()


def _size(found: FoundModel) -> int:
    """Bytes of a file, or of the weight files in a folder and its folders. Links are followed."""
    if found.ending:
        return sum(map(_bytes_of, with_shards(found.path)))
    try:
        inner = [found.path, *(path for path in sorted(found.path.iterdir())[:_MAX_PARTS] if path.is_dir())]
        files = [file for folder in inner for file in sorted(folder.iterdir())[:_MAX_PARTS]]
    except OSError:
        return 0
    return sum(_bytes_of(file) for file in files if file.suffix == ".safetensors")


def _bytes_of(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0
