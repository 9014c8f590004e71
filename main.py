"""The uvicorn target: `uvicorn main:app --port 8000`."""

import sys

from stable_diffusion_server.app import create_app, freeze_gc
from stable_diffusion_server.settings import SettingsError, read_settings

try:
    settings = read_settings()
except SettingsError as error:
    sys.exit(str(error))

app = create_app(settings, settle=freeze_gc)
