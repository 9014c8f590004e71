"""A server process that paints squares, slowly: `python tests/painted_server.py`, settings from the environment."""

import math
from typing import Any

import uvicorn
from fakes import PaintedSquares

from stable_diffusion_server.app import create_app
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.settings.reading import read_settings

SECONDS_PER_STEP = 0.1


def load(settings: Settings) -> Any:
    return PaintedSquares(seconds_per_step=SECONDS_PER_STEP)


if __name__ == "__main__":
    settings = read_settings()
    uvicorn.run(
        create_app(settings, load=load),
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=math.ceil(settings.stop_seconds),
    )
