"""Enforces a minimum arrival rate of bodies, and limits their memory in transit, in total and by caller."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.api.middleware.access_policy import AccessPolicy
from stable_diffusion_server.api.problems import error_response
from stable_diffusion_server.errors import RateLimited, RequestTimedOut, ServerError, number_text

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


class BodyIntakeMiddleware:
    """ASGI middleware: answers 408 if a body arrives slower than `min_rate` bytes per second.

    Measures the rate over `seconds`, so a body may pause for that time. Reserves memory before it reads each part, from
    `max_bytes` shared fairly by caller. A request that gets no memory within `seconds` gets 429 and releases all.
    Anonymous callers share half of `max_bytes`, or the size of one upload if that is larger.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy, seconds: float, min_rate: float, max_bytes: int) -> None:
        self._app = app
        self._policy = policy
        self._seconds = seconds
        self._quota = seconds * min_rate
        self._budget = ByteBudget(max_bytes, max(max_bytes // 2, policy.max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body limited."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        owner, anonymous = _owner_of(scope)
        reservation = self._budget.reserve(owner, self._expected(scope), anonymous=anonymous)
        body = _Body(self._budget, reservation, self._seconds, self._quota, receive)
        started = False

        async def answer(message: Message) -> None:
            """Forward a response. If the body was rejected, the error replaces the response."""
            nonlocal started
            if body.refused is not None and not started:
                return
            started = True
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        except Exception:
            if body.refused is None or started:
                raise
        finally:
            body.release()
        if body.refused is not None and not started:
            await self._refuse(body.refused, scope, receive, send)

    async def _refuse(self, error: ServerError, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        state["reason"] = error.kind
        response = error_response(error, scope["path"], state.get("request_id", ""))
        response.headers["Connection"] = "close"  # the client may still send the rest of the body
        await response(scope, receive, send)

    def _expected(self, scope: Scope) -> int:
        """Return the `Content-Length` of a body, or its limit without one."""
        headers = Headers(scope=scope)
        limit = self._policy.body_limit(scope["path"], headers)
        length = headers.get("content-length", "")
        declared = int(length) if length.isascii() and length.isdigit() and len(length) < len(str(2**63)) else limit
        return min(declared, limit)


class _Body:
    """A body in transit."""

    def __init__(
        self, budget: ByteBudget, reservation: Reservation, seconds: float, quota: float, receive: Receive
    ) -> None:
        self._budget, self._reservation = budget, reservation
        self._seconds, self._quota, self._receive = seconds, quota, receive
        self._complete = False
        self._arrived = 0
        self._since = 0.0
        self._new = 0
        self.refused: ServerError | None = None

    async def receive(self) -> Message:
        """Return the next message of the request. Raises the error if the body is rejected."""
        if self._complete:
            return await self._receive()
        if self.refused is not None:
            raise self.refused
        await self._reserve_memory()
        left = self._since + self._seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise self._refuse(
                RequestTimedOut(f"The body brought too little in {number_text(self._seconds)} seconds.")
            ) from None
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._complete = True
            self.release()
            return message
        received = len(message.get("body", b""))
        self._arrived += received
        self._new += received
        if self._new >= self._quota:
            self._since, self._new = time.monotonic(), 0
        return message

    def release(self) -> None:
        """Release the memory."""
        self._budget.release(self._reservation)

    async def _reserve_memory(self) -> None:
        began = time.monotonic()
        self._since = self._since or began
        try:
            async with asyncio.timeout(self._seconds):
                await self._budget.make_room(self._reservation, self._arrived)
        except TimeoutError:
            error = RateLimited("Too many bodies are being sent at a time.", retry_after=1)
            raise self._refuse(error) from None
        self._since += time.monotonic() - began  # time spent waiting for memory does not count

    def _refuse(self, error: ServerError) -> ServerError:
        self.release()
        self.refused = error
        return error


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names or any(
        name == b"content-length" and value != b"0" for name, value in scope["headers"]
    )


def _owner_of(scope: Scope) -> tuple[str, bool]:
    """Return the owner for fair sharing (the caller, otherwise the address), and whether it is anonymous."""
    caller = scope.get("state", {}).get("caller")
    if caller is not None and (caller.name or caller.address):
        return str(caller.share), caller.anonymous
    return f"address {(scope.get('client') or ('',))[0]}", True
