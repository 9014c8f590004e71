"""What the server and its process for models say to each other: a head, JSON, and pixels or none."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import NamedTuple

# A request, and an answer, is the length of JSON and of pixels, then both.
HEAD = struct.Struct(">IQ")
MOST_JSON = 4 * 2**20
# Verdicts of an answer; without one it is done.
REFUSED, NO_MEMORY = "refused", "no memory"
# Boxes that a detector answers at most.
MOST_BOXES = 300


class FoundBox(NamedTuple):
    """A thing in a picture: its box in pixels, its score from 0 to 1, its class by number and name."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    label_number: int
    label: str


def packed(body: Mapping[str, object], size: int) -> bytes:
    """The head and the JSON of a message with `size` bytes of pixels."""
    text = json.dumps(body).encode()
    return HEAD.pack(len(text), size) + text


def head_of(data: bytes) -> tuple[int, int]:
    """The length of JSON and of pixels."""
    length, size = HEAD.unpack(data)
    return int(length), int(size)
