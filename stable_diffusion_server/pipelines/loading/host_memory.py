"""The machine's memory as this process may use it: what is free, and how much there is, within its cgroup's limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_CONTROL_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Limit, usage, and the line of memory.stat with file pages that the kernel can take back; of cgroup v2 and v1.
_VERSIONS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_memory() -> int:
    """Bytes that this process can still take: free in the machine and in each cgroup that it belongs to."""
    rooms = [limit - used for limit, used in _limits()]
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def total_host_memory() -> int:
    """Bytes of the machine's memory, or of the smallest limit of a cgroup."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """The limit of each cgroup above this process, and the bytes that are used of it."""
    for folder in _folders():
        for limit_file, usage_file, reclaimable in _VERSIONS:
            limit, used = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and used is not None:
                yield limit, max(0, used - _statistic(folder / "memory.stat", reclaimable))


def _folders() -> Iterator[Path]:
    """The folders of the cgroups for memory, from this process's own to the root."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or "memory" in controllers.split(","):
            root = _CONTROL_GROUPS / "memory" if controllers else _CONTROL_GROUPS
            # In a container, the path may be that of the machine, which is not mounted here: the root holds the limit.
            own = root / path.lstrip("/")
            yield from dict.fromkeys([*(place for place in (own, *own.parents) if place.is_relative_to(root)), root])


def _number(file: Path) -> int | None:
    """The number in a file; `None` if there is none, as for `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    try:
        pairs = (line.split() for line in file.read_text().splitlines())
        return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == name), 0)
    except (OSError, ValueError):
        return 0
