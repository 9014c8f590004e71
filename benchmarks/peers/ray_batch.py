"""The stock pipeline under Ray Serve with `@serve.batch`, as its documentation has it, replicas for the cores.

Set by MODEL, PORT, THREADS (of each replica), WORKERS (replicas), BATCH (most orders in one call) and PICTURES.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

THREADS, WORKERS, BATCH = (int(os.environ[name]) for name in ("THREADS", "WORKERS", "BATCH"))


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=64, ray_actor_options={"num_cpus": THREADS})
class Painter:
    """One replica's pipeline."""

    def __init__(self, model: str, threads: int) -> None:
        from drawing import load  # on the replica, whose path holds it

        self.pipeline = load(model, threads)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.01)
    async def draw(self, orders: list[dict[str, Any]]) -> list[dict[str, str]]:
        """Draw together what came together, store, tell where."""
        from drawing import draw, keep

        return [keep(picture, order) for picture, order in zip(draw(self.pipeline, orders), orders, strict=True)]

    async def __call__(self, request: Request) -> dict[str, str]:
        """One order."""
        if request.url.path == "/health":
            return {"ready": "yes"}
        answer: dict[str, str] = await self.draw(await request.json())
        return answer


if __name__ == "__main__":
    path = {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__)), "PICTURES": os.environ["PICTURES"]}
    ray.init(
        num_cpus=THREADS * WORKERS,
        include_dashboard=False,
        runtime_env={"env_vars": path},
        log_to_driver=False,
        object_store_memory=256 * 2**20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(Painter.bind(os.environ["MODEL"], THREADS), route_prefix="/")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
    sys.exit(0)
