"""The waiting line: who is drawn next, and who may join a group. Not thread-safe; knows no device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Generic

from stable_diffusion_server.engine.fair_queueing import FairQueue, QueueEntry
from stable_diffusion_server.engine.interface import P
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket

# While others wait, one in so many taken is background work, so that it comes to an end as well.
BACKGROUND_EVERY = 8
# A group looks no further down the line for mates.
SEARCHED = 64


class RequestQueue(Generic[P]):
    """Tickets in the order they are drawn: those to be drawn again, then interactive ones, then background work.

    Within a class owners take turns (see `fairness`). The first in the line decides which shape runs next.
    """

    def __init__(self) -> None:
        self._again: deque[Ticket[P]] = deque()
        self._classes: dict[bool, FairQueue[P]] = {False: FairQueue(), True: FairQueue()}
        self._passed = 0
        self._order: list[QueueEntry[P]] | None = []

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._classes.values()))

    def held_by(self, owner: str) -> int:
        """How many tickets of an owner wait, background work included."""
        again = sum(ticket.owner == owner for ticket in self._again)
        return again + sum(queue.held_by(owner) for queue in self._classes.values())

    def add(self, ticket: Ticket[P]) -> None:
        """Put a ticket at the end of its owner's queue."""
        self._order = None
        self._classes[ticket.background].add(ticket)

    def add_again(self, tickets: Iterable[Ticket[P]]) -> None:
        """Put tickets that were on the device already before all others, in their order."""
        self._order = None
        self._again.extendleft(reversed(list(tickets)))

    def remove(self, ticket: Ticket[P]) -> bool:
        """Take a ticket out; false when it is not in the line."""
        self._order = None
        if ticket in self._again:
            self._again.remove(ticket)
            return True
        return self._classes[ticket.background].remove(ticket)

    def take(self, ticket: Ticket[P]) -> None:
        """Take a ticket out to be drawn."""
        self._order = None
        if ticket in self._again:
            self._again.remove(ticket)
            return
        waits = bool(len(self._classes[True]))
        self._passed = self._passed + 1 if waits and not ticket.background else 0
        self._classes[ticket.background].take(ticket)

    def in_order(self) -> list[QueueEntry[P]]:
        """The whole line as it would be drawn if nobody came."""
        if self._order is None:
            order = [QueueEntry(float("-inf"), ticket) for ticket in self._again]
            interactive, background = (deque(self._classes[late].in_order()) for late in (False, True))
            passed = self._passed
            while interactive or background:
                late = not interactive or (bool(background) and passed >= BACKGROUND_EVERY)
                passed = 0 if late else passed + 1
                order.append((background if late else interactive).popleft())
            self._order = order
        return self._order

    def next_ticket(self) -> Ticket[P] | None:
        """Who is next."""
        order = self.in_order()
        return order[0].ticket if order else None

    def find_batch_compatible(self, seats: list[RunningRequest[Any, P]], cap: int) -> Ticket[P] | None:
        """Who may join these seats now, if there is room.

        The first in the line may when it fits. Others who fit may pass those who do not, so long as these wait no
        step longer for it, and no owner gets ahead of another by more than one full group.
        """
        if len(seats) >= cap or any(seat.ticket.alone for seat in seats):
            return None
        left, ahead = max(seat.steps_left for seat in seats), list[QueueEntry[P]]()
        for place in self.in_order()[:SEARCHED]:
            ticket = place.ticket
            if ticket.alone or ticket.request.shape != seats[0].ticket.request.shape:
                ahead.append(place)
            elif not ahead or (ticket.steps_left <= left and may_overtake(place, ahead, cap)):
                return ticket
        return None


def may_overtake(place: QueueEntry[P], ahead: Iterable[QueueEntry[P]], cap: int) -> bool:
    """Whether a ticket may be taken before these: none of a higher class, and of no owner it got ahead of too far."""
    ticket = place.ticket
    most = (cap - 1) * ticket.cost
    for other in ahead:
        if ticket.background and not other.ticket.background:
            return False
        if other.ticket.owner != ticket.owner and place.tag - other.tag > most:
            return False
    return True
