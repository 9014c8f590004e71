"""Work that visitors of the UI take turns at, of which none can have too much waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stable_diffusion_server.errors import Overasked
from stable_diffusion_server.fair_limiter import FairLimiter


class Turns:
    """`at_once` pieces of work of all visitors at a time; `asked` of one visitor that are done or wait."""

    def __init__(self, at_once: int = 2, asked: int = 8) -> None:
        self._limiter = FairLimiter(at_once)
        self._most = asked
        self._asked: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, visitor: str) -> AsyncIterator[None]:
        """Wait for this visitor's turn, and hold it for as long as the block lasts. Raises `Overasked`."""
        if self._asked[visitor] >= self._most:
            raise Overasked("Other pictures of yours are being worked on; try again in a second.", retry_after=1)
        self._asked[visitor] += 1
        try:
            async with self._limiter.hold(visitor):
                yield
        finally:
            self._asked[visitor] -= 1
            if not self._asked[visitor]:
                del self._asked[visitor]
