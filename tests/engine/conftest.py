"""Engines that end with their test, and a painter who can be held."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import PaintedSquares, until
from squares import EngineOf, open_gate

from stable_diffusion_server.engine import Engine, Phase


@pytest.fixture
def engine_of() -> Iterator[EngineOf]:
    """Make a running engine."""
    made: list[Engine[Any, Any]] = []

    def make(painter: PaintedSquares, queue_limit: int = 32, max_batch: int = 4, **more: Any) -> Engine[Any, Any]:
        engine: Engine[Any, Any] = Engine(lambda: painter, queue_limit=queue_limit, max_batch=max_batch, **more)
        engine.start()
        until(lambda: engine.phase is Phase.READY)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop(10)


@pytest.fixture
def gated() -> Iterator[PaintedSquares]:
    """Squares whose every step waits until the gate is open."""
    painter = PaintedSquares(gate=threading.Event())
    yield painter
    open_gate(painter)
