"""A limited capacity shared out among callers, so that none of them can take what the others need. Knows no work."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _Waiter:
    amount: int
    granted: asyncio.Future[None]


class FairLimiter:
    """Lets callers hold at most `capacity` units together, and one caller at most `most` of them. On one event loop.

    A caller who holds some gets more only while its whole part is no larger than what is free: alone it gets half, and
    the next caller always finds a place (the dynamic threshold of Choudhury & Hahne, IEEE/ACM ToN 1998, with alpha
    1). Of the callers who wait, the one who holds least is next, and equals take turns.
    """

    def __init__(self, capacity: int, max_per_caller: int | None = None) -> None:
        self._capacity = capacity
        self._most = capacity if max_per_caller is None else max_per_caller
        self._held: Counter[str] = Counter()
        self._taken = 0
        self._waiting: dict[str, deque[_Waiter]] = {}

    @property
    def held(self) -> int:
        """Units that are held by anyone."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return sum(map(len, self._waiting.values()))

    def held_by(self, caller: str) -> int:
        """Units that a caller holds."""
        return self._held[caller]

    @asynccontextmanager
    async def hold(self, caller: str, amount: int = 1) -> AsyncIterator[None]:
        """Hold so many units for as long as the block lasts; waits for them first."""
        await self.take(caller, amount)
        try:
            yield
        finally:
            self.release(caller, amount)

    def try_take(self, caller: str, amount: int = 1) -> bool:
        """Take so many units if they can be had at once; `release` gives them back."""
        if caller in self._waiting or not self._fits(caller, amount):
            return False
        self._grant(caller, amount)
        return True

    async def take(self, caller: str, amount: int = 1) -> None:
        """Take so many units, waiting for this caller's turn; `release` gives them back."""
        if self.try_take(caller, amount):
            return
        waiter = _Waiter(amount, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller, deque()).append(waiter)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():
                self.release(caller, amount)  # granted in the same turn of the loop
            else:
                self._forget(caller, waiter)
                self._serve()  # a smaller request may have stood behind this one
            raise

    def release(self, caller: str, amount: int = 1) -> None:
        """Give so many units back."""
        self._taken -= amount
        self._held[caller] -= amount
        if self._held[caller] <= 0:
            del self._held[caller]
        self._serve()

    def _fits(self, caller: str, amount: int) -> bool:
        held, free = self._held[caller], self._capacity - self._taken
        # Who holds nothing gets what it asks for, be it more than its part: else it would wait for ever.
        return amount <= free and (held == 0 or held + amount <= min(free, self._most))

    def _grant(self, caller: str, amount: int) -> None:
        self._taken += amount
        self._held[caller] += amount

    def _serve(self) -> None:
        """Let those in who fit now, each caller in turn."""
        while self._waiting:
            turns = sorted(self._waiting, key=lambda caller: self._held[caller])  # stable: equals by their last turn
            for caller in turns:
                waiter = self._waiting[caller][0]
                if waiter.granted.done() or self._fits(caller, waiter.amount):
                    break
            else:
                return
            self._forget(caller, waiter)
            if not waiter.granted.done():  # else it was cancelled, and its task has not run since
                self._grant(caller, waiter.amount)
                waiter.granted.set_result(None)
                if caller in self._waiting:
                    self._waiting[caller] = self._waiting.pop(caller)  # to the end

    def _forget(self, caller: str, waiter: _Waiter) -> None:
        if (queue := self._waiting.get(caller)) is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[caller]
