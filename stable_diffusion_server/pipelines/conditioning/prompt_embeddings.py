"""Puts the vectors of textual inversion embeddings beside a CLIP's own, for the passes of one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.parsing import NamedText, NameIndex
from stable_diffusion_server.pipelines.conditioning.embedding_files import CLIP_G, CLIP_L, sentence_of
from stable_diffusion_server.pipelines.conditioning.embedding_folder import EmbeddingFolder

_current = threading.local()
# Embedding layers that substitute vectors; the hook of one never goes away.
_hooked: WeakSet[torch.nn.Module] = WeakSet()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """The embeddings of one request, with their names and digests (`used`).

    `tables` are the vectors of all of them, in a row, by CLIP: total × width. A vector has the token -1 - its row,
    since a CLIP's own tokens are 0 and above.
    """

    used: tuple[tuple[str, str], ...] = ()
    index: NameIndex = field(default_factory=NameIndex)
    rows: Mapping[str, range] = field(default_factory=dict)
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def split(self, text: str) -> list[NamedText]:
        """The parts of a text; only embeddings that fit the model have names in it."""
        parts = self.index.split(text)
        return [part if part.name in self.rows else NamedText(part.text) for part in parts]

    def tokens(self, name: str) -> tuple[int, ...]:
        """The tokens of an embedding."""
        return tuple(-1 - row for row in self.rows[name])

    @contextmanager
    def placed(self, part: str, tokens: torch.Tensor) -> Iterator[None]:
        """Run this thread's passes of a CLIP with vectors where `tokens`, rows × length, are below 0."""
        where = tokens < 0
        if not where.any():
            yield
            return
        _current.vectors = (where, self.tables[part][-1 - tokens[where]])
        try:
            yield
        finally:
            _current.vectors = None


class EmbeddingReader:
    """Reads the embeddings of requests for the CLIPs of one pipeline. Makes no change to their weights.

    `networks` are CLIPs by part, `clip_l` and `clip_g`.
    """

    def __init__(self, networks: Mapping[str, Any], folder: EmbeddingFolder | None) -> None:
        self._folder = folder or EmbeddingFolder(None)
        self.widths = {part: int(network.config.hidden_size) for part, network in networks.items()}
        if self._folder.is_offered:
            for network in networks.values():
                _hook(network.get_input_embeddings())

    def use(self, used: Sequence[tuple[str, str]]) -> PromptEmbeddings:
        """The embeddings of these names and digests. One that does not fit has no vectors, and a warning.

        Raises `InvalidInput` for a file that was replaced or removed.
        """
        if not used:
            return PromptEmbeddings()
        rows: dict[str, range] = {}
        vectors: dict[str, list[torch.Tensor]] = {part: [] for part in self.widths}
        warnings, start = [], 0
        for name, digest in used:
            embedding = self._read(name, digest)
            if embedding.widths != self.widths:
                have, want = sentence_of(embedding.widths), sentence_of(self.widths)
                warnings.append(f"The embedding {name} has vectors of {have} numbers, and the model reads {want}.")
                continue
            rows[name] = range(start, start + embedding.count)
            start += embedding.count
            for part, found in embedding.vectors.items():
                vectors[part].append(torch.from_numpy(found))
        tables = {part: torch.cat(found) for part, found in vectors.items() if found}
        index = NameIndex(name for name, _ in used)
        return PromptEmbeddings(tuple(used), index, rows, tables, tuple(warnings))

    def _read(self, name: str, digest: str) -> Any:
        try:
            embedding = self._folder.read(name)
        except ModelLoadError as error:
            raise InvalidInput(error.detail, field="prompt") from error
        if embedding.digest != digest:
            raise InvalidInput(f"{name} was replaced while the order waited; ask again.", field="prompt")
        return embedding


def clips_of(pipeline: Any) -> dict[str, Any]:
    """The CLIPs of an SD 1.5 or SDXL pipeline by part."""
    parts = {CLIP_L: "text_encoder", CLIP_G: "text_encoder_2"}
    found = {part: getattr(pipeline, name, None) for part, name in parts.items()}
    return {part: network for part, network in found.items() if network is not None}


def _hook(layer: torch.nn.Module) -> None:
    """Substitute vectors in the output of an embedding layer.

    The hook stays: adding one for each request would change a dictionary that passes of other threads iterate.
    """
    with _lock:
        if layer not in _hooked:
            _hooked.add(layer)
            layer.register_forward_hook(_substitute)


def _substitute(layer: torch.nn.Module, given: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor | None:
    vectors = getattr(_current, "vectors", None)
    if vectors is None:
        return None
    where, rows = vectors
    found = found.clone()
    found[where.to(found.device)] = rows.to(found.device, found.dtype)
    return found
