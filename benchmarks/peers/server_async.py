"""Runs diffusers' own example server (`examples/server-async`) with the embedded SDXL on a CPU, from a copy of it.

    MODEL=… PORT=… THREADS=… PICTURES=… SERVER_ASYNC=folder python server_async.py

The copy stays as it is. Of what the example fixes in its code (Stable Diffusion 3, an accelerator, 1024², PNG at full
effort) is changed here, at run time, what it cannot do without: the pipeline's class and device, the size, the
guidance, and the kind of file. Its request-scoped pipelines, locks and threads are what is measured.
"""

from __future__ import annotations

import contextvars
import os
import sys
import uuid
from typing import Any

import uvicorn
from anyio import to_thread
from drawing import GUIDANCE, load
from drawing import keep as store

# Of its own accord it lets forty threads draw at once, which on a few cores only wait for one another.
MODEL, SLOTS = os.environ["MODEL"], int(os.environ["WORKERS"])
# The size of the request that is served, which the example has no parameter for.
size: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("size")


class Painter:
    """Stands where the example has its Stable Diffusion 3."""

    def __init__(self, model: str = MODEL, type_models: str = "t2im") -> None:
        self.pipeline: Any = None
        self.device = "cpu"

    def initialize_pipeline(self) -> Painter:
        """The example asks for the pipeline in two steps."""
        return self

    def start(self) -> None:
        """Load it."""
        self.pipeline = load(MODEL, int(os.environ["THREADS"]))


class Sized:
    """Puts the size of a request, from its query, where the drawing thread finds it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI application around another."""
        to_thread.current_default_thread_limiter().total_tokens = SLOTS
        if scope["type"] == "http" and scope["query_string"]:
            pairs = (part.split("=") for part in scope["query_string"].decode().split("&"))
            size.set({name: int(value) for name, value in pairs})
        await self._app(scope, receive, send)


def health() -> dict[str, bool]:
    """It answers when it has started."""
    return {"ready": True}


def main() -> None:
    """Change what has to be changed, and serve."""
    sys.path.insert(0, os.environ["SERVER_ASYNC"])
    import Pipelines

    Pipelines.ModelPipelineInitializer = Painter
    import serverasync  # it loads the pipeline when it is imported

    scoped = serverasync.app.state.REQUEST_PIPE
    generate = scoped.generate

    def sized(*args: Any, **given: Any) -> Any:
        asked = size.get()
        canvas = {"width": asked["canvas_width"], "height": asked["canvas_height"]}
        return generate(*args, **{**given, **canvas, "guidance_scale": GUIDANCE})

    def save_image(self: Any, image: Any) -> str:
        return store(image, {**size.get(), "name": uuid.uuid4().hex})["path"]

    scoped.generate = sized
    serverasync.Utils.save_image = save_image
    serverasync.app.get("/health")(health)
    serverasync.app.add_middleware(Sized)
    uvicorn.run(serverasync.app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
