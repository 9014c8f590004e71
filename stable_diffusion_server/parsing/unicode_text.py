"""Unicode normalization in time that grows with the text: runs of combining marks are bounded before it."""

from __future__ import annotations

import unicodedata

# As UAX #15 has it for its Stream-Safe Text Format: no language needs more.
MAX_MARKS = 30
# Of class 0 themselves, and nothing but marks once they are taken apart.
_COMPOSED_MARKS = frozenset("\u0f73\u0f75\u0f81")


def nfc(text: str) -> str:
    """The text in NFC. Raises `ValueError` for more than 30 combining marks in a row.

    Normalizing sorts the marks of a run, which takes time with the square of their number.
    """
    if not text.isascii():
        _check_marks(text)
    return unicodedata.normalize("NFC", text)


def strip_marks(text: str) -> str:
    """The text without the combining marks that stand in it by themselves; those of composed letters stay."""
    return text if text.isascii() else "".join(character for character in text if not _is_mark(character))


def _check_marks(text: str) -> None:
    marks = 0
    for character in text:
        marks = marks + 1 if _is_mark(character) else 0
        if marks > MAX_MARKS:
            raise ValueError(f"holds more than {MAX_MARKS} combining marks in a row")


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) != 0 or character in _COMPOSED_MARKS
