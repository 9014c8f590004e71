"""Finds names in a prompt, such as those of textual inversion embeddings, whatever their number in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# ComfyUI's mark before a name, after which the name may have its file's ending.
_MARK = "embedding:"
_ENDINGS = (".safetensors", ".pt", ".bin")
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class NamedText:
    """A part of a text. `name` is the name that is written there, empty if these are other words."""

    text: str
    name: str = ""


class NameIndex:
    """Names to find in texts: as whole words, in any case, of several at one place the longest.

    A word ends where a letter, digit or underscore stands beside another character. `embedding:` before a name, with
    the ending of its file after it, belongs to the name.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names: dict[str, str] = {}
        lengths: dict[str, set[int]] = {}
        for name in names:
            lower = _lower(name)
            if (first := _PIECE.match(lower)) is not None:
                self._names.setdefault(lower, name)
                lengths.setdefault(first[0], set()).add(len(lower))
        # First piece of a name → lengths of the names that begin with it, so that few are compared at each place.
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def __len__(self) -> int:
        return len(self._names)

    def split(self, text: str) -> list[NamedText]:
        """Return the parts of a text in order: names, and the words between them."""
        return [part for part in self._parts(text) if part.text] if self._names else [NamedText(text)]

    def _parts(self, text: str) -> Iterator[NamedText]:
        lower, done = _lower(text), 0
        for piece in _PIECE.finditer(lower):
            start = piece.start()
            if start < done or not (found := self._name_at(lower, piece)):
                continue
            begin, end = start, start + len(found)
            if lower.endswith(_MARK, done, start) and not _is_word(lower[start - len(_MARK) - 1 : start - len(_MARK)]):
                begin = start - len(_MARK)
                ending = next((one for one in _ENDINGS if lower.startswith(one, end)), "")
                end += len(ending)
            yield NamedText(text[done:begin])
            yield NamedText(text[start : start + len(found)], self._names[found])
            done = end
        yield NamedText(text[done:])

    def _name_at(self, lower: str, piece: re.Match[str]) -> str:
        """The longest name that begins at a piece, in lower case; empty if there is none."""
        for length in self._lengths.get(piece[0], ()):
            end = piece.start() + length
            name = lower[piece.start() : end]
            if name in self._names and not (_is_word(name[-1]) and _is_word(lower[end : end + 1])):
                return name
        return ""


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _lower(text: str) -> str:
    """The text in lower case, of the same length."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(one if len(one) == 1 else other for one, other in zip(map(str.lower, text), text, strict=True))
