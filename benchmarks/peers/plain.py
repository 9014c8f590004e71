"""A plain server of the stock pipeline, behind a lock, as most begin: FastAPI and uvicorn, and nothing else.

Set by MODEL, PORT, THREADS (of each process), WORKERS (processes) and PICTURES (the folder they are stored in).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from drawing import draw, keep, load, redraw
from fastapi import FastAPI

PORT, WORKERS = int(os.environ["PORT"]), int(os.environ["WORKERS"])
pipeline: Any = None
lock = threading.Lock()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the pipeline, in each process."""
    global pipeline
    pipeline = load(os.environ["MODEL"], int(os.environ["THREADS"]))
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
def health() -> dict[str, bool]:
    """It answers when it has started."""
    return {"ready": True}


@app.post("/draw")
def create(order: dict[str, Any]) -> dict[str, str]:
    """Draw alone, store, tell where."""
    with lock:
        picture = redraw(pipeline, order) if "image" in order else draw(pipeline, [order])[0]
    return keep(picture, order)


@app.post("/bare")
def bare(order: dict[str, Any]) -> dict[str, float]:
    """Seconds of the bare pipeline call, and of enlarging, encoding and storing after it."""
    with lock:
        started = time.perf_counter()
        picture = draw(pipeline, [order])[0]
        drawn = time.perf_counter()
    keep(picture, order)
    return {"draw": drawn - started, "keep": time.perf_counter() - drawn}


if __name__ == "__main__":
    uvicorn.run(
        "plain:app", port=PORT, workers=WORKERS, timeout_worker_healthcheck=600, log_level="warning", access_log=False
    )
