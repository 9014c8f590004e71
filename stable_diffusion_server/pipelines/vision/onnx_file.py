"""Looks through an ONNX file before ONNX Runtime reads it: what names other files or promises missing data is refused.

The file is a protobuf message (https://onnx.ai/onnx/repo-docs/IR.html). It is walked once, in linear time, and weights
are skipped. Runs in the process for models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

# Protobuf's own limit for a message.
MOST_BYTES = 2**31 - 1
_MOST_MESSAGES, _DEEPEST = 2_000_000, 40
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields that hold messages, by the kind of message: kind of the field's messages by its number.
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_IR_VERSION, _GRAPH = 1, 7
_DIMS, _EXTERNAL_DATA, _DATA_LOCATION = 1, 13, 14


class RefusedFile(Exception):
    """A model file that is not used; the text is a sentence about it, in which it is "It"."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A message that is still to be walked: its kind, its bytes from `start` to `end`, and how deep it is."""

    kind: str
    start: int
    end: int
    depth: int


def check_onnx(data: bytes) -> None:
    """Raise `RefusedFile` unless a file is one ONNX model with all of its weights in it."""
    view = memoryview(data)
    seen: set[int] = set()
    parts, walked = [_Part("model", 0, len(data), 0)], 0
    while parts:
        part = parts.pop()
        walked += 1
        if walked > _MOST_MESSAGES or part.depth > _DEEPEST:
            raise RefusedFile("It has more parts, or deeper ones, than a network has.")
        if part.kind == "tensor":
            _check_tensor(view, part)
            continue
        inner = _MESSAGES[part.kind]
        for number, wire, start, end in _fields(view, part.start, part.end):
            if part.kind == "model":
                seen.add(number)
            if number in inner:
                if wire != _BYTES:
                    raise RefusedFile("It is not an ONNX file.")
                parts.append(_Part(inner[number], start, end, part.depth + 1))
    if not {_IR_VERSION, _GRAPH} <= seen:
        raise RefusedFile("It is not an ONNX file.")


def _check_tensor(view: memoryview, part: _Part) -> None:
    """Raise `RefusedFile` for a tensor whose data are in another file, or not in this one."""
    sides: list[int] = []
    for number, wire, start, end in _fields(view, part.start, part.end):
        if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and _varint(view, start, end)[0] != 0):
            raise RefusedFile("It keeps weights in other files, which are not read; save it as one file.")
        if number == _DIMS and wire == _VARINT:
            sides.append(_varint(view, start, end)[0])
        elif number == _DIMS:
            while start < end:
                side, start = _varint(view, start, end)
                sides.append(side)
    # The smallest values, of 4 bits, are two to a byte.
    if math.prod(sides[:16]) > 2 * (part.end - part.start) or len(sides) > 16:
        raise RefusedFile("It declares larger tensors than it holds.")


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, wire type, start and end of the value of each field of a message. Raises `RefusedFile`."""
    while start < end:
        tag, start = _varint(view, start, end)
        wire = tag & 7
        if wire == _VARINT:
            length = _varint(view, start, end)[1] - start
        elif wire == _BYTES:
            length, start = _varint(view, start, end)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise RefusedFile("It is not an ONNX file.")
        if length > end - start or tag >> 3 == 0:
            raise RefusedFile("It is not an ONNX file, or not a whole one.")
        yield tag >> 3, wire, start, start + length
        start += length


def _varint(view: memoryview, start: int, end: int) -> tuple[int, int]:
    """The number at `start`, 64 bits at most, and where it ends. Raises `RefusedFile`."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            break
        byte = view[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), start
    raise RefusedFile("It is not an ONNX file, or not a whole one.")
