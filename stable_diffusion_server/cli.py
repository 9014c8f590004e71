"""The command line: `serve` the API, or list the `settings`. Knows no HTTP and no models."""

from __future__ import annotations

import argparse
import sys
from urllib.parse import quote

import uvicorn

from stable_diffusion_server.settings import Settings, SettingsError, describe_settings, read_settings

_PROMPT = "a red circle on a blue background"


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 2 and one sentence for a setting that is wrong."""
    parser = argparse.ArgumentParser(prog="stable_diffusion_server", description="A prompt in, a stored picture out.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "serve", help="start the server; HOST, PORT and the other settings are read from the environment"
    )
    commands.add_parser("settings", help="print every setting with its default and meaning")
    chosen = parser.parse_args(arguments).command
    if chosen == "settings":
        sys.stdout.write(describe_settings() + "\n")
    else:
        serve()


def serve() -> None:
    """Serve until a signal ends it."""
    try:
        settings = read_settings()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    # Imported after the settings were read, so that a wrong one is told at once.
    from stable_diffusion_server.app import create_app

    app = create_app(settings, announce=lambda: sys.stdout.write(welcome(settings)) and sys.stdout.flush())
    sys.stdout.write("Loading the models; the first picture can be asked for in a few seconds.\n")
    sys.stdout.flush()
    uvicorn.run(app, host=settings.host, port=settings.port, access_log=False, log_level="warning")


def welcome(settings: Settings) -> str:
    """What a new user wants to see once the server can draw."""
    here = ("127.0.0.1", "0.0.0.0", "::", "::1")  # noqa: S104  # compared, not listened on
    name = "localhost" if settings.host in here else settings.host
    base = f"http://{name}:{settings.port}"
    path = f"{settings.bucket_path.strip('/')}/".lstrip("/")
    return f"""
Ready. Draw something:

  curl "{base}/create_and_upload_image?prompt={quote(_PROMPT)}&save_path=demo/first.webp"

  then look at  {base}/files/{path}demo/first.webp
  API docs      {base}/docs
  pictures in   {settings.local_bucket_dir.resolve()}

"""
