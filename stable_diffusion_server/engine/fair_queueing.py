"""Whose turn it is: owners take turns by what they have taken of the device. Knows no classes of work and no shapes.

Start-time fair queueing (Goyal, Vin & Cheng 1996): each owner has a tag that grows by the cost of what is taken from
its queue, and the smallest tag is next. An owner who was away starts at the present tag, so that nobody saves up.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Generic

from stable_diffusion_server.engine.interface import P
from stable_diffusion_server.engine.ticket import Ticket


@dataclass(frozen=True, slots=True)
class QueueEntry(Generic[P]):
    """A ticket in the line, and the tag it would be taken at."""

    tag: float
    ticket: Ticket[P]


class FairQueue(Generic[P]):
    """Tickets of several owners, in the order they are due."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Ticket[P]]] = {}
        self._tags: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def held_by(self, owner: str) -> int:
        """How many tickets of an owner are here."""
        return len(self._queues.get(owner, ()))

    def add(self, ticket: Ticket[P]) -> None:
        """Put a ticket at the end of its owner's queue."""
        if ticket.owner not in self._queues:
            self._queues[ticket.owner] = deque()
            self._tags[ticket.owner] = max(self._tags.get(ticket.owner, 0.0), self._now)
        self._queues[ticket.owner].append(ticket)

    def remove(self, ticket: Ticket[P]) -> bool:
        """Take a ticket out as if it had never come; false when it is not here."""
        queue = self._queues.get(ticket.owner, ())
        if ticket not in queue:
            return False
        self._queues[ticket.owner].remove(ticket)
        if not self._queues[ticket.owner]:
            del self._queues[ticket.owner]
        return True

    def take(self, ticket: Ticket[P]) -> None:
        """Take a ticket out to be drawn, and charge its owner."""
        self._now = max(self._now, self._tags[ticket.owner])
        self._tags[ticket.owner] += ticket.cost
        self.remove(ticket)
        for owner in [owner for owner, tag in self._tags.items() if owner not in self._queues and tag <= self._now]:
            del self._tags[owner]

    def in_order(self) -> list[QueueEntry[P]]:
        """All tickets in the order in which they would be taken if nobody came."""
        heads = [
            (self._tags[owner], queue[0].queued_at, number, owner)
            for number, (owner, queue) in enumerate(self._queues.items())
        ]
        heapq.heapify(heads)
        ahead = {owner: iter(queue) for owner, queue in self._queues.items()}
        nexts = {owner: next(tickets) for owner, tickets in ahead.items()}
        order = []
        while heads:
            tag, _, number, owner = heapq.heappop(heads)
            ticket = nexts[owner]
            order.append(QueueEntry(tag, ticket))
            following = next(ahead[owner], None)
            if following is not None:
                nexts[owner] = following
                heapq.heappush(heads, (tag + ticket.cost, following.queued_at, number, owner))
        return order
