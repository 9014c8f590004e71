"""A server process over painted squares that take their time, with the settings of the environment."""

import uvicorn
from fakes import Retouchers

from stable_diffusion_server.app import create_app
from stable_diffusion_server.settings.reading import read_settings

if __name__ == "__main__":
    settings = read_settings()
    app = create_app(settings, load=lambda settings: Retouchers(seconds_per_step=0.05))
    uvicorn.run(app, port=settings.port, log_level="warning", proxy_headers=False)
