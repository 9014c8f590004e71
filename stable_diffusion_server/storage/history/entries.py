"""What the history keeps of a picture, and how it is asked. Frozen values; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A picture drawn here. `caller` is the name of the key it was drawn for; `drawn_at` in seconds since 1970, UTC.

    `record` is what the picture itself tells where it tells all, as JSON can hold it; `number` counts entries upwards
    in the order they came, 0 before it is kept.
    """

    key: str
    digest: str
    prompt: str
    model: str
    task: str
    seed: int
    width: int
    height: int
    caller: str
    drawn_at: float
    record: Mapping[str, object] = field(repr=False)
    number: int = 0


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """Which entries: keys that begin with `folder`, prompts that hold `words`, drawn by `model`, before `before`.

    Of `caller` alone, unless that is `None`, and with that `digest`, unless it is empty.
    """

    folder: str = ""
    words: str = ""
    model: str = ""
    before: int | None = None
    limit: int = 50
    caller: str | None = None
    digest: str = ""
