"""Shares limited capacity fairly among callers: a limiter, a queue with a bound per caller, and a sharing rule.

The rule is the dynamic threshold of Choudhury & Hahne (IEEE/ACM ToN 1998), which network switches use for their
buffers: a holder may have at most alpha times what is free. A single caller thus cannot take everything, and nothing
has to be reserved. Callers are identified by a string, `Caller.share`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from stable_diffusion_server.errors import RateLimited

# alpha for storage: one caller gets at most 9/10 of the capacity, each of two callers 9/19.
STORAGE_ALPHA = 9


def may_hold_more(held: float, free: float) -> bool:
    """Whether a caller that holds `held` units of storage may take some of the `free` ones."""
    return free > 0 and held < STORAGE_ALPHA * free


def describe_caller(share: str) -> str:
    """A caller as part of a sentence that is sent to that caller."""
    kind, _, name = share.partition(" ")
    return f"the key {name!r}" if kind == "key" else "your address"


def largest_holder(held: Mapping[str, float]) -> str:
    """The caller that holds the most."""
    return max(held, key=lambda share: held[share])


@dataclass(eq=False, slots=True)
class _Waiter:
    amount: int
    granted: asyncio.Future[None]


class FairLimiter:
    """Limits what callers hold together to `capacity` units, and each caller to `max_per_caller`.

    A caller that holds some gets more only while its total is no larger than what is free (alpha 1): a single caller
    gets half, and the next one always finds a free unit. Among waiting callers the one that holds least is served
    first; callers that hold the same take turns. Use it on one event loop.
    """

    def __init__(self, capacity: int, max_per_caller: int | None = None) -> None:
        self._capacity = capacity
        self._max_per_caller = capacity if max_per_caller is None else max_per_caller
        self._held_by: Counter[str] = Counter()
        self._held = 0
        self._waiting: dict[str, deque[_Waiter]] = {}

    @property
    def held(self) -> int:
        """Units held by all callers."""
        return self._held

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return sum(map(len, self._waiting.values()))

    def held_by(self, caller: str) -> int:
        """Units held by one caller."""
        return self._held_by[caller]

    @asynccontextmanager
    async def hold(self, caller: str, amount: int = 1) -> AsyncIterator[None]:
        """Wait for `amount` units and hold them during the block."""
        await self.take(caller, amount)
        try:
            yield
        finally:
            self.release(caller, amount)

    def try_take(self, caller: str, amount: int = 1) -> bool:
        """Take `amount` units if they are available now; return them with `release`."""
        if caller in self._waiting or not self._fits(caller, amount):
            return False
        self._grant(caller, amount)
        return True

    async def take(self, caller: str, amount: int = 1) -> None:
        """Wait for `amount` units and take them; return them with `release`."""
        if self.try_take(caller, amount):
            return
        waiter = _Waiter(amount, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller, deque()).append(waiter)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if not waiter.granted.cancelled():
                self.release(caller, amount)  # granted and cancelled in the same iteration of the loop
            else:
                self._remove(caller, waiter)
                self._serve()  # a smaller request of this caller may have waited behind this one
            raise

    def release(self, caller: str, amount: int = 1) -> None:
        """Return `amount` units."""
        self._held -= amount
        self._held_by[caller] -= amount
        if self._held_by[caller] <= 0:
            del self._held_by[caller]
        self._serve()

    def _fits(self, caller: str, amount: int) -> bool:
        held, free = self._held_by[caller], self._capacity - self._held
        # A caller that holds nothing may exceed its part, otherwise a large request would wait forever.
        return amount <= free and (held == 0 or held + amount <= min(free, self._max_per_caller))

    def _grant(self, caller: str, amount: int) -> None:
        self._held += amount
        self._held_by[caller] += amount

    def _serve(self) -> None:
        """Grant waiting requests that fit, one caller after the other."""
        while self._waiting:
            # The sort is stable, so callers that hold the same stay in the order of their last turns.
            for caller in sorted(self._waiting, key=lambda caller: self._held_by[caller]):
                waiter = self._waiting[caller][0]
                if waiter.granted.done() or self._fits(caller, waiter.amount):
                    break
            else:
                return
            self._remove(caller, waiter)
            if not waiter.granted.done():  # done: cancelled, and its task has not run yet
                self._grant(caller, waiter.amount)
                waiter.granted.set_result(None)
                if caller in self._waiting:
                    self._waiting[caller] = self._waiting.pop(caller)  # to the end of the turns

    def _remove(self, caller: str, waiter: _Waiter) -> None:
        if (queue := self._waiting.get(caller)) is not None and waiter in queue:
            queue.remove(waiter)
            if not queue:
                del self._waiting[caller]


class FairRequestQueue:
    """Runs `max_running` requests at a time, and rejects a caller's requests beyond `max_per_caller`.

    `max_per_caller` counts running and waiting requests; `refusal` is the error sentence for one more. Use it on one
    event loop.
    """

    def __init__(self, max_running: int, max_per_caller: int, refusal: str) -> None:
        self._limiter = FairLimiter(max_running)
        self._max_per_caller = max_per_caller
        self._refusal = refusal
        self._requests: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, caller: str) -> AsyncIterator[None]:
        """Wait for the caller's turn and hold it during the block. Raises `RateLimited`."""
        if self._requests[caller] >= self._max_per_caller:
            raise RateLimited(self._refusal, retry_after=1)
        self._requests[caller] += 1
        try:
            async with self._limiter.hold(caller):
                yield
        finally:
            self._requests[caller] -= 1
            if not self._requests[caller]:
                del self._requests[caller]
