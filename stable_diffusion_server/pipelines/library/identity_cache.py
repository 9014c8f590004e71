"""Keeps what files are in DATA_DIR, by path, size, times and inode, so that a scan reads changed files only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind, ModelTask

_log = structlog.get_logger(__name__)

# Raise it when the rules of identification change: all files are then identified again.
RULES = 6
_MAX_BYTES, _MAX_KEPT = 64 * 2**20, 20_000
# A file changed more recently than this may change again without a new timestamp.
_UNSETTLED_SECONDS = 2.0
_TEXTS = ("variant", "layout", "precision", "container", "prediction", "reason", "pipeline_class")
_LISTS = ("families", "parts", "remarks")


class IdentityCache:
    """Identities by path and facts of the file. A damaged cache is ignored. Not thread-safe."""

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._known = _read(file)
        self._used: dict[str, list[Any]] = {}
        self._changed = False

    def identity(self, path: Path, evidence: Iterable[Path], identify: Callable[[Path], FileIdentity]) -> FileIdentity:
        """The identity of a file or folder, from the cache if none of the files in `evidence` has changed."""
        facts, latest = _facts_of(evidence)
        key = os.fsencode(path).decode("utf-8", "backslashreplace")
        entry = self._known.get(key)
        if entry is not None and entry[0] == facts and (found := _restore(entry[1])) is not None:
            self._used[key] = entry
            return found
        found = identify(path)
        if facts and self._clock() - latest > _UNSETTLED_SECONDS and _facts_of(evidence)[0] == facts:
            self._used[key] = [facts, identity_as_dict(found)]
            self._changed = True
        return found

    def save(self) -> None:
        """Write what was asked for since the cache was made. A full or read-only disk is logged, not raised."""
        if self._file is None or not (self._changed or len(self._used) != len(self._known)):
            return
        kept = dict(list(self._used.items())[:_MAX_KEPT])
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = self._file.with_suffix(f".{os.getpid()}.new")
            new.write_text(json.dumps({"rules": RULES, "files": kept}))
            os.replace(new, self._file)
        except OSError as error:
            _log.warning("the list of model files cannot be kept; the next scan reads them again", why=str(error))


def identity_as_dict(identity: FileIdentity) -> dict[str, Any]:
    """An identity as a dictionary that JSON can write."""
    values = {part.name: getattr(identity, part.name) for part in fields(identity)}
    return {**values, "metadata": dict(identity.metadata)}


def _facts_of(evidence: Iterable[Path]) -> tuple[str, float]:
    """A text that changes when a file does, and the time of the latest change. Files that are missing count too."""
    facts, latest = [], 0.0
    for file in evidence:
        try:
            read = file.stat()
        except OSError:
            facts.append("-")
            continue
        facts.append(f"{read.st_dev}:{read.st_ino}:{read.st_size}:{read.st_mtime_ns}:{read.st_ctime_ns}")
        latest = max(latest, read.st_mtime, read.st_ctime)
    return ";".join(facts), latest


def _read(file: Path | None) -> dict[str, list[Any]]:
    if file is None or not file.exists():
        return {}
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")  # noqa: TRY301  # one handler for all damage
        read = json.loads(file.read_bytes())
        if read["rules"] != RULES:
            return {}
        return {
            key: entry
            for key, entry in read["files"].items()
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("the list of model files is damaged; they are read again", why=str(error))
        return {}


def _restore(plain: Any) -> FileIdentity | None:
    """An identity from the cache; `None` if a value is of another type than it should be."""
    try:
        texts: dict[str, Any] = {name: plain[name] for name in _TEXTS}
        lists: dict[str, Any] = {name: tuple(plain[name]) for name in _LISTS}
        metadata = plain["metadata"]
        words = [*texts.values(), *(word for words in lists.values() for word in words), *metadata.values()]
        if not all(isinstance(plain[name], list) for name in _LISTS):
            return None
        flags, channels = (plain["scaled"], plain["zero_snr"]), plain["in_channels"]
        if not all(isinstance(word, str) for word in (*words, *metadata)) or type(channels) is not int:
            return None
        if not all(isinstance(flag, bool) for flag in flags):
            return None
        return FileIdentity(
            Kind(plain["kind"]),
            task=ModelTask(plain["task"]),
            scaled=flags[0],
            zero_snr=flags[1],
            in_channels=channels,
            metadata=MappingProxyType(metadata),
            **texts,
            **lists,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
