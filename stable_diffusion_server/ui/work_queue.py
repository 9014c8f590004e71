"""The queue of work on pictures that visitors of the UI take turns at."""

from __future__ import annotations

from stable_diffusion_server.concurrency import FairRequestQueue


def visitor_queue() -> FairRequestQueue:
    """Two pieces of work of all visitors at a time; eight of one visitor run or wait."""
    return FairRequestQueue(2, 8, "Other pictures of yours are being worked on; try again in a second.")
