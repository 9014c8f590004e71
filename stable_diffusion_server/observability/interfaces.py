"""Interface for usage metrics, with methods that do nothing."""

from __future__ import annotations

from collections.abc import Mapping


class UsageMetrics:
    """Records the outcome of generation requests; this base class records nothing."""

    def record_generation(self, source: str) -> None:
        """A request was answered from `source`: drawn, cached or coalesced."""

    def record_quality_check(self, check: str) -> None:
        """A guard of quality saw something in a picture; `check` is the code its caller is warned with."""

    def record_stored(self, timings: Mapping[str, float]) -> None:
        """An image was generated and stored; `timings` are the seconds of each stage."""
