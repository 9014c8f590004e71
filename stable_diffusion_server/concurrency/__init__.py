"""Limits shared by callers: fair limiters and queues, rate windows, deadlines and progress monitoring."""

from __future__ import annotations

from stable_diffusion_server.concurrency.deadlines import ProgressMonitor, deadline
from stable_diffusion_server.concurrency.fair_limiter import (
    FairLimiter,
    FairRequestQueue,
    describe_caller,
    largest_holder,
    may_hold_more,
)
from stable_diffusion_server.concurrency.moving_windows import MovingWindows, moving_average

__all__ = [
    "FairLimiter",
    "FairRequestQueue",
    "MovingWindows",
    "ProgressMonitor",
    "deadline",
    "describe_caller",
    "largest_holder",
    "may_hold_more",
    "moving_average",
]
