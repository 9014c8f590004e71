"""The uvicorn target: `uvicorn main:app --port 8000`."""

import sys

from stable_diffusion_server.app import ServingHooks, create_app
from stable_diffusion_server.settings import SettingsError, read_settings

try:
    app = create_app(read_settings(), hooks=ServingHooks())
except SettingsError as error:
    sys.exit(str(error))
