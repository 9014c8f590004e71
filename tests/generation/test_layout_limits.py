"""Layouts of input images are made on a bounded number of threads, which callers share fairly."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest
from fakes import until
from service_harness import OPTIONS, order

from stable_diffusion_server.generation import layout
from stable_diffusion_server.generation.layout import ImageLayout, InputLoader
from stable_diffusion_server.generation.resolver import ResolvedRequest, resolve_request


class SlowLayouts:
    """Stands in for `lay_out_images`: counts the running calls by prompt, and ends them when the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def make(self, resolved: ResolvedRequest, image: object, mask: object, references: object) -> str:
        with self._lock:
            self.running[resolved.request.prompt] += 1
        self.gate.wait(30)
        with self._lock:
            self.running[resolved.request.prompt] -= 1
        return "laid out"


async def refuse(*args: Any, **more: Any) -> Any:
    raise AssertionError("these requests have no images to fetch or decode")


@pytest.mark.parametrize("places", [2, 3, 4])
async def test_layouts_of_one_caller_leave_threads_to_others(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """One caller gets half of the places, the next one finds one, and a caller that left holds its place to the end."""
    slow = SlowLayouts()
    monkeypatch.setattr(layout, "lay_out_images", slow.make)
    monkeypatch.setattr(layout, "_LAYOUTS", places)
    loader = InputLoader(refuse, refuse, OPTIONS.limits.max_side)

    def start(caller: str) -> asyncio.Task[ImageLayout]:
        return asyncio.create_task(loader.lay_out(resolve_request(order(caller), OPTIONS), {}, caller))

    try:
        crowd = [start("anna") for _ in range(3 * places)]
        await asyncio.to_thread(until, lambda: slow.running["anna"] == (places + 1) // 2)
        other = start("ben")
        await asyncio.to_thread(until, lambda: slow.running["ben"] == 1)
        crowd[0].cancel()
        await asyncio.sleep(0.05)
        assert slow.running["anna"] <= (places + 1) // 2
        assert not crowd[0].done()
    finally:
        slow.gate.set()
    assert await other == "laid out"
    ends = await asyncio.gather(*crowd, return_exceptions=True)
    assert isinstance(ends[0], asyncio.CancelledError)
    assert ends[1:] == ["laid out"] * (len(crowd) - 1)
