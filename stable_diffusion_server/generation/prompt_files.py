"""The operator's files that prompts name: the styles in a CSV file, and the lists of a folder of wildcards."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import structlog

from stable_diffusion_server.files import TextFiles, UnreadableText, walk_files
from stable_diffusion_server.parsing import PromptStyle, WildcardLines, parse_styles, parse_wildcard_lines

T = TypeVar("T")

_SUFFIX = ".txt"
_STYLES_BYTES, _LIST_BYTES = 4_194_304, 4_194_304

_log = structlog.get_logger(__name__)


class PromptFiles:
    """Reads the styles and the wildcards when they are needed, and again when they changed. Thread-safe.

    `wildcards` is searched with its subfolders, and links are followed, also out of it. What cannot be read is logged,
    each reason once.
    """

    def __init__(self, styles: Path | None = None, wildcards: Path | None = None) -> None:
        self._styles = styles
        self._wildcards = wildcards
        self._style_files = TextFiles(_unless_refused(parse_styles), _STYLES_BYTES)
        self._list_files = TextFiles(_unless_refused(parse_wildcard_lines), _LIST_BYTES)
        self._logged: set[tuple[str, str]] = set()

    def styles(self) -> Mapping[str, PromptStyle]:
        """Return the styles by name, in the order of the file; none if it cannot be read."""
        if self._styles is None:
            return {}
        return self._read(self._style_files, self._styles, "the styles cannot be used") or {}

    def lists(self) -> Callable[[str], WildcardLines | None]:
        """Return a function that returns the list of a name, `None` for an unknown, empty or unreadable one.

        The function looks into the folder at its first call. A name is compared with those of the files found, in any
        case, and never joined into a path, so it cannot leave the folder.
        """
        found: dict[str, Path] | None = None

        def list_of(name: str) -> WildcardLines | None:
            nonlocal found
            found = self._found() if found is None else found
            file = found.get(_caseless(name))
            return None if file is None else self._read(self._list_files, file, "a wildcard cannot be used")

        return list_of

    def _found(self) -> dict[str, Path]:
        """Return the files of the wildcards by name, which has the subfolders and no ending."""
        folder, found = self._wildcards, dict[str, Path]()
        for file in walk_files(folder, _SUFFIX) if folder is not None else ():
            found.setdefault(_caseless(file.with_suffix("").relative_to(folder or file).as_posix()), file)
        return found

    def _read(self, files: TextFiles[T], file: Path, event: str) -> T | None:
        try:
            return files.read(file)
        except UnreadableText as error:
            why = f"{file.name!a} {error}"
            if (file.name, why) not in self._logged:
                self._logged.add((file.name, why))
                _log.warning(event, why=why)
            return None


def _unless_refused(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return a parser that raises `UnreadableText` where `parse` raises `ValueError`."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise UnreadableText(str(error)) from error

    return parsed


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
