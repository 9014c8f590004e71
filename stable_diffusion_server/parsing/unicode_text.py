"""Unicode normalization of untrusted text in linear time, by a bound on runs of combining marks."""

from __future__ import annotations

import unicodedata

# The limit of UAX #15's Stream-Safe Text Format, which no language exceeds.
MAX_MARKS = 30
# Characters of combining class 0 that decompose into combining marks only.
_COMPOSED_MARKS = frozenset("\u0f73\u0f75\u0f81")


def nfc(text: str) -> str:
    """Normalize to NFC. Raises `ValueError` for more than 30 combining marks in a row.

    Normalization sorts each run of marks, in time quadratic in the length of the run.
    """
    if not text.isascii():
        _check_marks(text)
    return unicodedata.normalize("NFC", text)


def strip_marks(text: str) -> str:
    """Remove separate combining marks; precomposed letters keep theirs."""
    return text if text.isascii() else "".join(character for character in text if not _is_mark(character))


def _check_marks(text: str) -> None:
    marks = 0
    for character in text:
        marks = marks + 1 if _is_mark(character) else 0
        if marks > MAX_MARKS:
            raise ValueError(f"holds more than {MAX_MARKS} combining marks in a row")


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) != 0 or character in _COMPOSED_MARKS
