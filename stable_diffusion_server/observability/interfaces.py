"""What is counted of orders, as the rooms that fulfil them call it. This account keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping


class UsageMetrics:
    """Takes note of what becomes of orders."""

    def record_generation(self, source: str) -> None:
        """An order was answered from `source`: drawn, cached or coalesced."""

    def record_quality_check(self, check: str) -> None:
        """A guard of quality saw something in a picture; `check` is the code its caller is warned with."""

    def record_stored(self, timings: Mapping[str, float]) -> None:
        """A picture was drawn and stored, with the seconds of each stage."""
