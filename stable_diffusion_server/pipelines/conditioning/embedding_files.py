"""Reads textual inversion embeddings: vectors in place of a prompt's tokens. Says why a file cannot be used."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraIdentity, header_of, identity_of, opened
from stable_diffusion_server.pipelines.model_spec import CHUNK_TOKENS

SUFFIX = ".safetensors"
PICKLES = (".pt", ".bin")
LARGEST_BYTES = 4 * 2**20
_LARGEST_HEADER, _LARGEST_WIDTH = 2**20, 8192
# CLIPs by their usual names: the only one of SD 1.5 and the first of SDXL, and the second of SDXL.
CLIP_L, CLIP_G = "clip_l", "clip_g"
# Names of tensors for several CLIPs, and what embeddings for one CLIP call theirs; another name if it is the only one.
_SEVERAL = {"clip_l": CLIP_L, "clip_g": CLIP_G, "text_encoders_0": CLIP_L, "text_encoders_1": CLIP_G}
_SINGLE = ("emb_params", "string_to_param.*", "string_to_param")
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Embedding:
    """An embedding: n × width numbers (float32) for each CLIP, up to 75 vectors of finite numbers.

    `digest` is the first 16 hexadecimal digits of the SHA-256 of its file.
    """

    digest: str
    vectors: Mapping[str, NDArray[np.float32]] = field(repr=False)

    @property
    def count(self) -> int:
        """The number of its vectors."""
        return len(next(iter(self.vectors.values())))

    @property
    def widths(self) -> dict[str, int]:
        """Numbers of a vector, by CLIP."""
        return {part: vectors.shape[1] for part, vectors in self.vectors.items()}

    @property
    def bytes(self) -> int:
        """Bytes of its vectors."""
        return sum(vectors.nbytes for vectors in self.vectors.values())


def sentence_of(widths: Mapping[str, int]) -> str:
    """Widths as words, such as `768 (clip_l) and 1280 (clip_g)`."""
    return " and ".join(f"{width} ({part})" for part, width in sorted(widths.items(), reverse=True)) or "none"


def read_embedding(file: Path) -> tuple[Embedding, LoraIdentity, os.stat_result]:
    """Read an embedding, with the identity of the file's content. Raises `ModelLoadError` with file and reason."""
    if file.suffix in PICKLES:
        why = "is a pickle, which can run programs when it is read; convert it to .safetensors"
        raise ModelLoadError(f"{file.name} {why}.")
    with opened(file) as (source, facts):
        if facts.st_size > LARGEST_BYTES:
            raise ModelLoadError(f"{file.name} has {facts.st_size} bytes, and an embedding at most {LARGEST_BYTES}.")
        data = source.read(LARGEST_BYTES)
        if len(data) != facts.st_size or identity_of(os.fstat(source.fileno())) != identity_of(facts):
            raise ModelLoadError(f"{file.name} is being written to at this moment; ask again.")
    tensors = header_of(io.BytesIO(data), len(data), file.name, _LARGEST_HEADER).tensors
    content = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    vectors = {part: _vectors(tensors[name], content, file.name) for name, part in _names_of(tensors, file.name)}
    if len({len(one) for one in vectors.values()}) != 1:
        raise ModelLoadError(f"{file.name} has another number of vectors for each text encoder.")
    return Embedding(hashlib.sha256(data).hexdigest()[:16], vectors), identity_of(facts), facts


def _names_of(tensors: Mapping[str, Any], name: str) -> Sequence[tuple[str, str]]:
    """Tensor names and the CLIPs they are for."""
    if several := [(tensor, part) for tensor, part in _SEVERAL.items() if tensor in tensors]:
        return several
    single = next((one for one in _SINGLE if one in tensors), next(iter(tensors)) if len(tensors) == 1 else "")
    if not single:
        first = next(iter(tensors), "nothing")[:60]
        raise ModelLoadError(f"{name} holds no embedding; its tensors are named like {first!a}.")
    return [(single, CLIP_L)]


def _vectors(facts: Mapping[str, Any], content: memoryview, name: str) -> NDArray[np.float32]:
    """The numbers of a tensor: vectors × width."""
    shape, kind = facts["shape"], facts["dtype"]
    if kind not in _TYPES:
        raise ModelLoadError(f"{name} holds numbers of the type {kind[:20]!a}, and {', '.join(_TYPES)} are read.")
    count, width = (1, *shape)[-2:] if len(shape) in (1, 2) else (0, 0)
    if not (1 <= count <= CHUNK_TOKENS and 1 <= width <= _LARGEST_WIDTH):
        limits = f"1 to {CHUNK_TOKENS} vectors of up to {_LARGEST_WIDTH} numbers"
        raise ModelLoadError(f"{name} has a tensor of the shape {shape[:4]}, and an embedding {limits}.")
    first, last = facts["data_offsets"]
    dtype = np.dtype(_TYPES[kind])
    if last - first != math.prod((count, width, dtype.itemsize)):
        raise ModelLoadError(f"{name} is not a safetensors file.")
    numbers = np.frombuffer(content[first:last], dtype).reshape(count, width)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "BF16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ModelLoadError(f"{name} has numbers that are not finite.")
    return numbers
