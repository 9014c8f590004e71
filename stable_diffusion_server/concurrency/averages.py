"""Exponential moving average of measured seconds."""

from __future__ import annotations

# Weight of the newest sample: the average follows a change within about ten samples.
_WEIGHT = 0.2


def moving_average(average: float | None, sample: float) -> float:
    """The average after one more sample; the sample itself if there was none before."""
    return sample if average is None else (1 - _WEIGHT) * average + _WEIGHT * sample
