"""Shared capacity: limiters and queues that are fair to callers, deadlines, and progress monitoring."""

from __future__ import annotations

from stable_diffusion_server.concurrency.deadlines import deadline
from stable_diffusion_server.concurrency.fair_limiter import FairLimiter
from stable_diffusion_server.concurrency.fair_queue import FairRequestQueue
from stable_diffusion_server.concurrency.fair_share import describe_caller, largest_holder, may_hold_more
from stable_diffusion_server.concurrency.moving_windows import MovingWindows
from stable_diffusion_server.concurrency.progress_monitor import ProgressMonitor

__all__ = [
    "FairLimiter",
    "FairRequestQueue",
    "MovingWindows",
    "ProgressMonitor",
    "deadline",
    "describe_caller",
    "largest_holder",
    "may_hold_more",
]
