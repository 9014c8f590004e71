"""Request queue: priority classes, fair queueing between owners, and the search for requests that can join a batch.

Nothing here is thread-safe; the scheduler holds the lock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from stable_diffusion_server.engine.interface import P
from stable_diffusion_server.engine.ticket import RunningRequest, Ticket

# While interactive requests wait, one in this many taken requests is a background request, against starvation.
BACKGROUND_EVERY = 8
# Number of queue entries searched for requests that can join a batch.
SEARCH_DEPTH = 64


@dataclass(frozen=True, slots=True)
class QueueEntry(Generic[P]):
    """A queued ticket and its start tag."""

    tag: float
    ticket: Ticket[P]


class FairQueue(Generic[P]):
    """Start-time fair queueing of the tickets of several owners (Goyal, Vin & Cheng 1996).

    Each owner has a tag that grows by the cost of every ticket taken from its queue; the owner with the smallest tag
    is next. An owner that returns starts at the current tag, so it does not accumulate unused time.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Ticket[P]]] = {}
        self._tags: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def held_by(self, owner: str) -> int:
        """Number of tickets of an owner."""
        return len(self._queues.get(owner, ()))

    def add(self, ticket: Ticket[P]) -> None:
        """Append a ticket to its owner's queue."""
        if ticket.owner not in self._queues:
            self._queues[ticket.owner] = deque()
            self._tags[ticket.owner] = max(self._tags.get(ticket.owner, 0.0), self._now)
        self._queues[ticket.owner].append(ticket)

    def remove(self, ticket: Ticket[P]) -> bool:
        """Remove a ticket without charging its owner. Returns false if it is not queued."""
        queue = self._queues.get(ticket.owner, ())
        if ticket not in queue:
            return False
        self._queues[ticket.owner].remove(ticket)
        if not self._queues[ticket.owner]:
            del self._queues[ticket.owner]
        return True

    def take(self, ticket: Ticket[P]) -> None:
        """Remove a ticket that goes to the device, and charge its owner."""
        self._now = max(self._now, self._tags[ticket.owner])
        self._tags[ticket.owner] += ticket.cost
        self.remove(ticket)
        for owner in [owner for owner, tag in self._tags.items() if owner not in self._queues and tag <= self._now]:
            del self._tags[owner]

    def in_order(self) -> list[QueueEntry[P]]:
        """Return all tickets in the order in which they are taken if no other ticket arrives."""
        heads = [
            (self._tags[owner], queue[0].queued_at, number, owner)
            for number, (owner, queue) in enumerate(self._queues.items())
        ]
        heapq.heapify(heads)
        remaining = {owner: iter(queue) for owner, queue in self._queues.items()}
        first = {owner: next(tickets) for owner, tickets in remaining.items()}
        entries = []
        while heads:
            tag, _, number, owner = heapq.heappop(heads)
            ticket = first[owner]
            entries.append(QueueEntry(tag, ticket))
            following = next(remaining[owner], None)
            if following is not None:
                first[owner] = following
                heapq.heappush(heads, (tag + ticket.cost, following.queued_at, number, owner))
        return entries


class RequestQueue(Generic[P]):
    """Waiting tickets in three priority classes: restarted, interactive, background.

    Interactive tickets, and background tickets, have a `FairQueue` each. The shape of the first ticket decides which
    batch runs next.
    """

    def __init__(self) -> None:
        self._restarted: deque[Ticket[P]] = deque()
        self._classes: dict[bool, FairQueue[P]] = {False: FairQueue(), True: FairQueue()}
        self._interactive_in_a_row = 0
        self._entries: list[QueueEntry[P]] | None = []

    def __len__(self) -> int:
        return len(self._restarted) + sum(map(len, self._classes.values()))

    def held_by(self, owner: str) -> int:
        """Number of waiting tickets of an owner, background ones included."""
        restarted = sum(ticket.owner == owner for ticket in self._restarted)
        return restarted + sum(queue.held_by(owner) for queue in self._classes.values())

    def add(self, ticket: Ticket[P]) -> None:
        """Append a ticket to its owner's queue."""
        self._entries = None
        self._classes[ticket.background].add(ticket)

    def add_restarted(self, tickets: Iterable[Ticket[P]]) -> None:
        """Put tickets that already were on the device before all others; their order stays the same."""
        self._entries = None
        self._restarted.extendleft(reversed(list(tickets)))

    def remove(self, ticket: Ticket[P]) -> bool:
        """Remove a ticket; false if it is not queued."""
        self._entries = None
        if ticket in self._restarted:
            self._restarted.remove(ticket)
            return True
        return self._classes[ticket.background].remove(ticket)

    def take(self, ticket: Ticket[P]) -> None:
        """Remove a ticket that goes to the device."""
        self._entries = None
        if ticket in self._restarted:
            self._restarted.remove(ticket)
            return
        background_waits = bool(len(self._classes[True]))
        self._interactive_in_a_row = self._interactive_in_a_row + 1 if background_waits and not ticket.background else 0
        self._classes[ticket.background].take(ticket)

    def in_order(self) -> list[QueueEntry[P]]:
        """Return all tickets in the order in which they are taken if no other ticket arrives."""
        if self._entries is None:
            entries = [QueueEntry(float("-inf"), ticket) for ticket in self._restarted]
            interactive, background = (deque(self._classes[late].in_order()) for late in (False, True))
            in_a_row = self._interactive_in_a_row
            while interactive or background:
                late = not interactive or (bool(background) and in_a_row >= BACKGROUND_EVERY)
                in_a_row = 0 if late else in_a_row + 1
                entries.append((background if late else interactive).popleft())
            self._entries = entries
        return self._entries

    def next_ticket(self) -> Ticket[P] | None:
        """Return the first ticket; `None` if the queue is empty."""
        entries = self.in_order()
        return entries[0].ticket if entries else None

    def find_batch_compatible(self, batch: Sequence[RunningRequest[P]], cap: int) -> Ticket[P] | None:
        """Return the next ticket that may join `batch` of at most `cap` requests; `None` if there is none.

        The first ticket may join if it has the same shape. Another ticket may overtake those before it only if they
        wait no step longer, and if no owner gets ahead of another owner by more than one full batch.
        """
        if len(batch) >= cap or any(running.ticket.alone for running in batch):
            return None
        left, ahead = max(running.steps_left for running in batch), list[QueueEntry[P]]()
        for entry in self.in_order()[:SEARCH_DEPTH]:
            ticket = entry.ticket
            if ticket.alone or ticket.request.shape != batch[0].ticket.request.shape:
                ahead.append(entry)
            elif not ahead or (ticket.steps_left <= left and may_overtake(entry, ahead, cap)):
                return ticket
        return None


def may_overtake(entry: QueueEntry[P], ahead: Iterable[QueueEntry[P]], cap: int) -> bool:
    """Whether an entry may overtake `ahead`: none has a higher class, and no owner falls too far behind."""
    ticket = entry.ticket
    limit = (cap - 1) * ticket.cost
    for other in ahead:
        if ticket.background and not other.ticket.background:
            return False
        if other.ticket.owner != ticket.owner and entry.tag - other.tag > limit:
            return False
    return True
