"""Defines the interface for usage metrics, with methods that do nothing."""

from __future__ import annotations

from collections.abc import Mapping


class UsageMetrics:
    """Records the outcome of generation requests; this base class records nothing."""

    def record_generation(self, source: str) -> None:
        """Record a request answered from `source`: drawn, cached or coalesced."""

    def record_quality_check(self, check: str) -> None:
        """Record that a quality check found a fault in an image; `check` is the code of the caller's warning."""

    def record_stored(self, timings: Mapping[str, float]) -> None:
        """Record a generated and stored image; `timings` are the seconds of each stage."""
