"""Walks a folder of the operator's, in which requests name files without paths: LoRAs, embeddings, wildcards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_MAX_DEPTH, _MAX_ENTRIES = 6, 50_000


def walk_files(folder: Path, *suffixes: str) -> Iterator[Path]:
    """Yield the files with one of some suffixes, such as `.txt`, in a folder and its subfolders, breadth first.

    Follows links, also out of the folder, and visits each folder once, so circular links are safe. Skips hidden names
    and folders that cannot be listed. Ends after 6 levels of subfolders, and after the folder with the 50,000th entry.
    """
    entered: set[tuple[int, int]] = set()
    left, most = deque([(folder, 0)]), _MAX_ENTRIES
    while left and most > 0:
        place, depth = left.popleft()
        try:
            facts = place.stat()
            known = (facts.st_dev, facts.st_ino) in entered
            entered.add((facts.st_dev, facts.st_ino))
            entries = [] if known else sorted(place / entry for entry in os.listdir(place))
        except OSError:
            continue
        most -= len(entries)
        for entry in entries:
            if entry.name.startswith("."):  # among them files that are still being fetched
                continue
            if entry.suffix in suffixes:
                yield entry
            elif depth < _MAX_DEPTH and entry.is_dir():
                left.append((entry, depth + 1))
