"""Work on long texts beside the event loop, which others wait on; on short ones a thread would cost more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_LONG = 65_536


async def run_if_large(size: int, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What `work` gives, done in a thread if it is on `size` bytes or characters that are many."""
    return await asyncio.to_thread(work, *given, **named) if size > _LONG else work(*given, **named)
