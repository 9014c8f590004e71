"""The uvicorn target: `uvicorn main:app --port 8000`."""

import sys

from stable_diffusion_server.app import create_app, freeze_gc
from stable_diffusion_server.settings import SettingsError, read_settings

try:
    app = create_app(read_settings(), settle=freeze_gc)
except SettingsError as error:
    sys.exit(str(error))
