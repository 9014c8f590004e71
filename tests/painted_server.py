"""A server process over a slow fake model: `painted_server.py [seconds per step]`, default 0.05.

A prompt that says "poison" loses the device, as a device-side assertion does. One that says "segfault", "abort",
"exits" or "hangs" ends the process or never finishes, at its second step.
"""

import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Sequence

import uvicorn
from fakes import Canvas, FakeImageDenoiser

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.http_protocol import BoundedProtocol
from stable_diffusion_server.errors import DeviceLost
from stable_diffusion_server.settings.loader import read_settings
from stable_diffusion_server.types import DiffusionRequest


class CrashingDenoiser(FakeImageDenoiser):
    """Fake model whose device can be lost."""

    def prepare(self, job: DiffusionRequest) -> Canvas:
        if "poison" in job.prompt:
            raise DeviceLost("The device reported an error it cannot recover from.")
        return super().prepare(job)

    def step(self, states: Sequence[Canvas]) -> None:
        """A step that causes the fault named in the prompt."""
        super().step(states)
        for state in states:
            if state.index == 2:
                end_as_told(state.job.prompt)


def end_as_told(prompt: str) -> None:
    """End the process in the way the prompt names."""
    if "segfault" in prompt:
        ctypes.string_at(0)
    elif "abort" in prompt:
        os.abort()
    elif "exits" in prompt:
        os._exit(3)
    elif "hangs" in prompt:
        time.sleep(600)


if __name__ == "__main__":
    settings = read_settings()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.05
    app = create_app(settings, load=lambda settings: CrashingDenoiser(seconds_per_step=seconds))
    grace = math.ceil(settings.shutdown_grace_seconds)
    config = uvicorn.Config(
        app,
        port=settings.port,
        http=BoundedProtocol,
        log_level="warning",
        log_config=None,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
    )
    try:
        uvicorn.Server(config).run()
    except KeyboardInterrupt:  # as `serve` ends, which a watchdog tells from an intended end
        sys.exit(128 + signal.SIGINT)
