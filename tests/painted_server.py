"""A server process over painted squares that take their time: `painted_server.py [seconds a step]`, else 0.05.

A prompt that says "poison" loses the device, as an assertion on it does.
"""

import math
import signal
import sys

import uvicorn
from fakes import Canvas, Retouchers

from stable_diffusion_server.app import create_app
from stable_diffusion_server.errors import DevicePoisoned
from stable_diffusion_server.orders import Job
from stable_diffusion_server.settings.reading import read_settings


class Mortal(Retouchers):
    """Painters whose device can be lost."""

    def prepare(self, job: Job) -> Canvas:
        if "poison" in job.prompt:
            raise DevicePoisoned("The device reported an error it cannot recover from.")
        return super().prepare(job)


if __name__ == "__main__":
    settings = read_settings()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.05
    app = create_app(settings, load=lambda settings: Mortal(seconds_per_step=seconds))
    grace = math.ceil(settings.stop_seconds)
    config = uvicorn.Config(
        app, port=settings.port, log_level="warning", proxy_headers=False, timeout_graceful_shutdown=grace
    )
    try:
        uvicorn.Server(config).run()
    except KeyboardInterrupt:  # as `serve` ends, which a watchdog tells from an end that was wanted
        sys.exit(128 + signal.SIGINT)
