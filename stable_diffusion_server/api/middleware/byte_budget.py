"""A memory budget for request bodies: reserved as bytes arrive, shared fairly by caller, free of deadlocks."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

# Bytes of a body's first reservation, and the minimum of the following ones.
STEP = 65_536
# Larger bodies reserve more at a time, but at most this many bytes ahead of the received bytes.
MOST_AHEAD = 4 * STEP


@dataclass(eq=False, slots=True)
class Reservation:
    """The bytes that one body of `owner` holds. `claim` is the maximum it may need."""

    owner: str
    claim: int
    anonymous: bool = False
    number: int = 0
    held: int = 0
    wanted: int = 0
    granted: asyncio.Future[None] | None = field(default=None, repr=False)


class ByteBudget:
    """Limits all bodies together to `capacity` bytes, and those of anonymous callers to `anonymous` of these bytes.

    A caller gets more memory only while it holds at most as much as is free, so a single caller gets at most half (the
    dynamic threshold of Choudhury & Hahne, IEEE/ACM ToN 1998). Two bodies are exempt: the caller's oldest one, which
    otherwise might never complete, and the one that needs the least of all. Bodies cannot deadlock: the budget grants
    bytes only while all bodies could complete one after the other (Dijkstra's banker's algorithm). Among the waiting
    callers, the one that holds the least is next. For one event loop.
    """

    def __init__(self, capacity: int, anonymous: int) -> None:
        self._capacity = {False: capacity, True: min(anonymous, capacity)}
        self._taken = {False: 0, True: 0}
        self._held: Counter[str] = Counter()
        self._bodies: dict[str, dict[Reservation, None]] = {}
        self._waiting: dict[str, dict[Reservation, None]] = {}
        # Per body, sorted: bytes it may still need, bytes it holds, its number.
        self._needs: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        self._numbers = count()
        self._longest = 0
        self._serving: asyncio.Handle | None = None

    @property
    def held(self) -> int:
        """Bytes held by all bodies."""
        return self._taken[False]

    def reserve(self, owner: str, claim: int, *, anonymous: bool = False) -> Reservation:
        """Return an empty reservation. Limits the claim to the capacity."""
        reservation = Reservation(
            owner, min(max(claim, STEP), self._capacity[anonymous]), anonymous, next(self._numbers)
        )
        self._longest = max(self._longest, reservation.claim)
        return reservation

    async def make_room(self, reservation: Reservation, arrived: int) -> None:
        """Reserve memory for the arrived bytes and the next ones; wait for memory if needed.

        One call at a time per reservation. Release the reservation if this call is cancelled.
        """
        least = min(reservation.claim, arrived + STEP)
        if least <= reservation.held:
            return
        ahead = min(max(STEP, arrived // 4), MOST_AHEAD)
        for wanted in (min(reservation.claim, arrived + ahead), least):
            reservation.wanted = wanted
            if self._fits(reservation):
                self._grant(reservation)
                return
        reservation.granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(reservation.owner, {})[reservation] = None
        try:
            await reservation.granted
        finally:
            _discard(self._waiting, reservation)

    def release(self, reservation: Reservation) -> None:
        """Release everything. May be called more than once."""
        if not reservation.held:
            return
        self._count(reservation, 0)
        if not self._held[reservation.owner]:
            del self._held[reservation.owner]
        _discard(self._bodies, reservation)
        if self._waiting and self._serving is None:  # at most once per loop iteration
            self._serving = asyncio.get_running_loop().call_soon(self._serve)

    def _fits(self, reservation: Reservation) -> bool:
        more, holding = reservation.wanted - reservation.held, self._held[reservation.owner]
        exempt = self._is_exempt(reservation)
        for part in {False, reservation.anonymous}:
            free = self._capacity[part] - self._taken[part]
            if more > free or not (exempt or holding + more <= free):
                return False
            if free - more < self._longest and not self._can_complete(part, reservation, free - more):
                return False
        return True

    def _is_exempt(self, reservation: Reservation) -> bool:
        """Return whether a body is exempt from the fair share, because other bodies may wait for it."""
        if next(iter(self._bodies.get(reservation.owner, ())), reservation) is reservation:
            return True
        return reservation.held > 0 and reservation.claim - reservation.held <= self._needs[False][0][0]

    def _can_complete(self, part: bool, reservation: Reservation, free: int) -> bool:
        """Return whether all bodies of that part could complete if this one got the bytes it wants."""
        need, counted = reservation.claim - reservation.wanted, False
        for other_need, other_held, number in self._needs[part]:
            if number == reservation.number:
                continue
            if not counted and need <= min(other_need, free):
                free, counted = free + reservation.wanted, True
            if free >= self._longest:
                return True
            if other_need > free:
                return False
            free += other_held
        return counted or need <= free

    def _grant(self, reservation: Reservation) -> None:
        self._count(reservation, reservation.wanted)
        self._bodies.setdefault(reservation.owner, {})[reservation] = None

    def _count(self, reservation: Reservation, held: int) -> None:
        """Set the bytes that a body holds, and update all sums."""
        for part in {False, reservation.anonymous}:
            self._taken[part] += held - reservation.held
            needs = self._needs[part]
            if reservation.held:
                del needs[bisect_left(needs, _need_of(reservation, reservation.held))]
            if held:
                insort(needs, _need_of(reservation, held))
        self._held[reservation.owner] += held - reservation.held
        reservation.held = held

    def _serve(self) -> None:
        """Grant memory to waiting callers; callers that hold the least come first."""
        self._serving = None
        owners = sorted(self._waiting, key=lambda owner: self._held[owner])
        while owners:
            owners = [owner for owner in owners if self._serve_one(self._waiting.get(owner, ()))]

    def _serve_one(self, waiting: Iterable[Reservation]) -> bool:
        """Grant one body of an owner: the first, or the partial one that needs least. Checking all would be slow."""
        waiters = [waiter for waiter in waiting if waiter.granted is not None and not waiter.granted.done()]
        if not waiters:
            return False
        for waiter in (waiters[0], min(waiters, key=lambda waiter: (not waiter.held, waiter.claim - waiter.held))):
            if waiter.granted is not None and self._fits(waiter):
                self._grant(waiter)
                waiter.granted.set_result(None)
                return True
        return False


def _need_of(reservation: Reservation, held: int) -> tuple[int, int, int]:
    return reservation.claim - held, held, reservation.number


def _discard(table: dict[str, dict[Reservation, None]], reservation: Reservation) -> None:
    if (own := table.get(reservation.owner)) is not None:
        own.pop(reservation, None)
        if not own:
            del table[reservation.owner]
