"""How a bounded room is shared by callers: who holds much leaves some to those who hold little. Knows no jobs.

Dynamic thresholds (Choudhury & Hahne 1998), as switches share their buffers: one holder may have up to nine times what
is free. Alone it gets nine tenths of the room; of two who want all, each gets nine nineteenths; and a newcomer always
finds some room. Nothing is set apart, and nobody has to be known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping

GROWTH = 9


def may_hold_more(held: float, free: float) -> bool:
    """Whether a holder of so much may take some of the room that is free."""
    return free > 0 and held < GROWTH * free


def describe_caller(share: str) -> str:
    """A caller's share as a caller is told of it: what it goes by, and nothing else of the caller."""
    kind, _, name = share.partition(" ")
    return f"the key {name!r}" if kind == "key" else "your address"


def largest_holder(held: Mapping[str, float]) -> str:
    """Who holds the most."""
    return max(held, key=lambda share: held[share])
