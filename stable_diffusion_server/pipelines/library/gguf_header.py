"""Reads the header of a GGUF file, with names, shapes, types and places of its tensors, in bounded time and memory.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from stable_diffusion_server.pipelines.library.file_headers import (
    MAX_TENSORS,
    TensorHeader,
    opened_file,
    shown,
)
from stable_diffusion_server.pipelines.library.identity import UnreadableModel

# Text encoders hold their tokenizer here: 150,000 words take 4 MB.
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_ENTRIES, _MAX_ITEMS, _MAX_DEPTH, _MAX_NAME = 4096, 1_000_000, 4, 1024
_MAX_TEXT = 1_000_000
_MAX_SIDES = 5
_STRING, _ARRAY = 8, 9
# struct format of a metadata value, by its type's number; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

GGUF = ".gguf"

# Number → name, elements in a block, bytes of a block. From ggml.h.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
# Type → weights in a block, bytes of a block.
GGUF_BLOCKS = {name: (weights, stored) for name, weights, stored in _TYPES.values()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file: shape in PyTorch's order, type, and the place of its bytes in the file."""

    shape: tuple[int, ...]
    format: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata of a GGUF file by name, and its tensors by name."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


@dataclass(slots=True)
class _Reader:
    """Reads values in sequence. Raises `UnreadableModel` beyond the end of the file or the bound of the header.

    Lists of metadata hold tokenizers: without `lists` they are skipped.
    """

    source: BinaryIO
    limit: int
    lists: bool
    offset: int = 0

    def take(self, size: int) -> bytes:
        self._advance(size)
        read = self.source.read(size)
        if len(read) != size:
            raise UnreadableModel("is truncated within its header")
        return read

    def skip(self, size: int) -> None:
        self._advance(size)
        self.source.seek(size, 1)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self, most: int) -> str:
        length = self.number("Q")
        if length > most:
            raise UnreadableModel(f"has a text of {length:,} bytes in its header, and {most:,} are read")
        return self.take(length).decode("utf-8", "replace")

    def _advance(self, size: int) -> None:
        self.offset += size
        if self.offset > self.limit:
            raise UnreadableModel("is truncated within its header, or has one that is too long")


def read_gguf(file: Path) -> TensorHeader:
    """The names and types of a GGUF file. Raises `UnreadableModel`."""
    header = read_gguf_header(file)
    amounts: dict[str, int] = {}
    for tensor in header.tensors.values():
        amounts[tensor.format] = amounts.get(tensor.format, 0) + prod(tensor.shape)
    texts = {name: str(value) for name, value in header.fields.items() if isinstance(value, str | int | float)}
    return TensorHeader({name: tensor.shape for name, tensor in header.tensors.items()}, amounts, texts, "gguf")


def read_gguf_header(file: Path, *, lists: bool = False) -> GgufHeader:
    """Read and check the header of a GGUF file; with `lists`, also the lists of its metadata, which else are `None`.

    Raises `UnreadableModel`.
    """
    with opened_file(file) as (source, size):
        reader = _Reader(source, min(size, _MAX_HEADER_BYTES), lists)
        if size < 24 or reader.take(4) != b"GGUF":
            raise UnreadableModel(f"is not a GGUF file ({size:,} bytes)")
        version = reader.number("I")
        if version not in (2, 3):
            raise UnreadableModel(f"is GGUF version {version if version < 1000 else 'unknown'}; 2 and 3 are read")
        count, entries = reader.number("Q"), reader.number("Q")
        if count > MAX_TENSORS or entries > _MAX_ENTRIES:
            raise UnreadableModel(f"has {count:,} tensors and {entries:,} entries, more than are read")
        fields = _read_metadata(reader, entries)
        tensors = _read_tensors(reader, count)
        base = _base(reader.offset, fields.get("general.alignment", 32))
    end = base + max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if size < end:
        raise UnreadableModel(f"is truncated: {size:,} of {end:,} bytes are there")
    return GgufHeader(fields, {name: replace(tensor, start=base + tensor.start) for name, tensor in tensors.items()})


def holds_t5_tokenizer(file: Path) -> bool:
    """Whether a GGUF file holds T5's tokenizer. Raises `UnreadableModel`."""
    return bool(read_gguf_header(file).fields.get("tokenizer.ggml.model") == "t5")


def _read_metadata(reader: _Reader, entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = reader.text(_MAX_NAME)
        if name in metadata:
            raise UnreadableModel(f"has a header that gives {shown(name)} twice")
        metadata[name] = _read_value(reader, reader.number("I"), 0)
    return metadata


def _read_value(reader: _Reader, kind: int, depth: int) -> Any:
    """One value."""
    if kind == _STRING:
        return reader.text(_MAX_TEXT)
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind])
    if kind != _ARRAY or depth >= _MAX_DEPTH:
        raise UnreadableModel("has a header with values of an unknown type")
    inner, length = reader.number("I"), reader.number("Q")
    if length > _MAX_ITEMS:
        raise UnreadableModel(f"has a list of {length:,} values in its header, and {_MAX_ITEMS:,} are read")
    if reader.lists and inner in _SCALARS:
        code = f"<{length}{_SCALARS[inner]}"
        return list(struct.unpack(code, reader.take(struct.calcsize(code))))
    if reader.lists:
        return [_read_value(reader, inner, depth + 1) for _ in range(length)]
    if inner in _SCALARS:
        reader.skip(length * struct.calcsize(_SCALARS[inner]))
    elif inner == _STRING:
        for _ in range(length):
            reader.skip(reader.number("Q"))
    else:
        for _ in range(length):
            _read_value(reader, inner, depth + 1)
    return None


def _read_tensors(reader: _Reader, count: int) -> dict[str, GgufTensor]:
    """The tensors by name; they start at the end of the header."""
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = reader.text(_MAX_NAME)
        sides = reader.number("I")
        if name in tensors or sides > _MAX_SIDES:
            raise UnreadableModel(f"has a header that is nonsense at {shown(name)}")
        shape = tuple(reader.number("Q") for _ in range(sides))
        kind, offset = reader.number("I"), reader.number("Q")
        if kind not in _TYPES:
            raise UnreadableModel(f"has weights of an unknown GGUF type (number {kind}, {shown(name)})")
        dtype, block, bytes_of_block = _TYPES[kind]
        elements = prod(shape)
        if elements % block or (shape and shape[0] % block):
            raise UnreadableModel(f"has a header that is nonsense at {shown(name)}")
        tensors[name] = GgufTensor(shape[::-1], dtype, offset, elements // block * bytes_of_block)
    return tensors


def _base(header: int, alignment: Any) -> int:
    """Where the weights begin."""
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise UnreadableModel("has a header with an alignment that is nonsense")
    return -(-header // alignment) * alignment
