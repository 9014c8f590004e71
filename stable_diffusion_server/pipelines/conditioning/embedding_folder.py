"""The folder of textual inversion embeddings that prompts may name: lists them, and says why one cannot be used."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import structlog
from cachetools import LRUCache

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.parsing import NameIndex
from stable_diffusion_server.pipelines.conditioning.embedding_files import PICKLES, SUFFIX, Embedding, read_embedding
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraIdentity, identity_of
from stable_diffusion_server.pipelines.conditioning.named_files import NamedFiles, is_settled, why_unnamed

_CACHE_BYTES = 64 * 2**20
# Files whose content a list reads.
_MOST_LISTED = 2000
# For so long a list of names is used: every prompt is searched for them.
_FRESH_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EmbeddingList:
    """The embeddings of a folder by name, and the reasons, as sentences, why others cannot be used."""

    usable: Mapping[str, Embedding] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)

    def fitting(self, widths: Mapping[str, int]) -> dict[str, Embedding]:
        """Those with vectors of these widths, by CLIP."""
        return {name: embedding for name, embedding in self.usable.items() if embedding.widths == dict(widths)}


class EmbeddingFolder:
    """A folder of embeddings. Thread-safe; its methods read files, and a list of names is up to a second old.

    Files are named as LoRAs are: subfolders are searched and links followed. Only safetensors files are read; pickles
    have names too, so that a prompt with one gets a warning with the reason. Contents are cached by a file's device,
    inode, size and times.
    """

    def __init__(self, folder: Path | None) -> None:
        self.is_offered = folder is not None
        self._named = NamedFiles(folder, SUFFIX, *PICKLES)
        self._lock = Lock()
        self._known: LRUCache[LoraIdentity, Embedding] = LRUCache(_CACHE_BYTES, getsizeof=lambda one: one.bytes)
        self._files: dict[str, Path] = {}
        self._index = NameIndex()
        self._listed_at = -_FRESH_SECONDS
        self._logged: set[tuple[str, str]] = set()

    def index(self) -> NameIndex:
        """The names of all files, to be found in prompts."""
        return self._listed()[0]

    def read(self, name: str) -> Embedding:
        """Read the current content of a file by a name of the index. Raises `ModelLoadError` with the reason."""
        file = self._listed()[1].get(name)
        if file is None:
            raise ModelLoadError(f"{name[:100]!r} is no embedding here any more.")
        with suppress(OSError):
            identity = identity_of(os.stat(file))
            with self._lock:
                known = self._known.get(identity)
            if known is not None:
                return known
        embedding, identity, facts = read_embedding(file)
        if is_settled(facts):
            with self._lock:
                self._known[identity] = embedding
        return embedding

    def list(self) -> EmbeddingList:
        """Read the files, the first 2000 by name. Those that cannot be used are logged once."""
        usable, faults = {}, {}
        for name in sorted(self._listed()[1])[:_MOST_LISTED]:
            try:
                usable[name] = self.read(name)
            except ModelLoadError as error:
                faults[name] = error.detail
        faults |= {name: why_unnamed(name) for name in self._named.unnamed()}
        for name, why in faults.items():
            if (name, why) not in self._logged:
                self._logged.add((name, why))
                _log.warning("an embedding cannot be used", name=name, why=why)
        return EmbeddingList(usable, faults)

    def _listed(self) -> tuple[NameIndex, dict[str, Path]]:
        with self._lock:
            if self.is_offered and time.monotonic() - self._listed_at >= _FRESH_SECONDS:
                files = self._named.read()
                if files != self._files:
                    self._files, self._index = files, NameIndex(files)
                self._listed_at = time.monotonic()
            return self._index, self._files
