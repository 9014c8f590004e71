"""What is counted of orders, as the rooms that fulfil them call it. This account keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping


class Account:
    """Takes note of what becomes of orders."""

    def answered(self, source: str) -> None:
        """An order was answered from `source`: drawn, cached or coalesced."""

    def guarded(self, guard: str) -> None:
        """A guard of quality saw something in a picture; `guard` is the code its caller is warned with."""

    def stored(self, timings: Mapping[str, float]) -> None:
        """A picture was drawn and stored, with the seconds of each stage."""
