"""The command line: `serve` the API, `check-storage`, or list the `settings`. Knows no HTTP and no models."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
from http import HTTPStatus
from urllib.parse import quote
from uuid import uuid4

import httpx
import uvicorn

from stable_diffusion_server.bucket_api import StorageOptions, check_bucket, object_key, open_bucket
from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.settings.reading import SettingsError, describe_settings, read_settings

_PROMPT = "a red circle on a blue background"


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 2 and one sentence for a setting that is wrong."""
    parser = argparse.ArgumentParser(prog="stable_diffusion_server", description="A prompt in, a stored picture out.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "serve", help="start the server; HOST, PORT and the other settings are read from the environment"
    )
    commands.add_parser("api", help="print the doors with their parameters and answers, as in docs/api.md")
    commands.add_parser("settings", help="print every setting with its default and meaning")
    commands.add_parser(
        "check-storage", help="try everything the server does with the bucket of the settings, one line each"
    )
    chosen = parser.parse_args(arguments).command
    if chosen == "api":
        sys.stdout.write(describe_api())
    elif chosen == "settings":
        sys.stdout.write(describe_settings() + "\n")
    elif chosen == "check-storage":
        check_storage()
    else:
        serve()


def describe_api() -> str:
    """The doors as a page of Markdown, with the defaults of every setting and the models that come along."""
    from stable_diffusion_server.api.description.markdown import markdown
    from stable_diffusion_server.app import create_app

    return markdown(create_app(Settings(_env_file=None, models="embedded")).openapi())


def check_storage() -> None:
    """Try the bucket with an object of its own, which is removed again; exits with 1 when something is wrong."""
    options = StorageOptions.of(_settings())
    key = object_key(options.bucket_path, f"check-storage-{uuid4().hex}.txt")
    where = options.local_bucket_dir if options.storage_provider == "local" else options.bucket_name
    sys.stdout.write(f"{options.storage_provider}: {where}\n")
    faults = 0
    for tried, fault in check_bucket(open_bucket(options), key, _fetched):
        sys.stdout.write(f"  ok    {tried}\n" if fault is None else f"  FAIL  {tried}: {fault}\n")
        faults += fault is not None
    sys.exit(1 if faults else 0)


def _fetched(url: str) -> bytes:
    """What anyone gets at an address. Raises `StorageUnavailable` naming it without its signature."""
    shown = url.partition("?")[0]
    try:
        answer = httpx.get(url, timeout=20)
    except httpx.HTTPError as error:
        raise StorageUnavailable(f"{shown} cannot be reached ({type(error).__name__}).") from error
    if answer.status_code != HTTPStatus.OK:
        raise StorageUnavailable(f"{shown} answers {answer.status_code}; PUBLIC_BASE_URL or SIGNED_URL_SECONDS help.")
    return answer.content


def _settings() -> Settings:
    try:
        return read_settings()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def serve() -> None:
    """Serve until a signal ends it."""
    settings = _settings()
    # Imported after the settings were read, so that a wrong one is told at once.
    from stable_diffusion_server.app import create_app

    def announce() -> None:
        sys.stdout.write(welcome(settings, port))
        sys.stdout.flush()

    # Bound before anything is loaded: a port that is taken is told at once, and PORT=0 has a number to show.
    listening = _listen(settings)
    port = listening.getsockname()[1]
    app = create_app(settings, announce=announce)
    sys.stdout.write("Loading the models; the first picture can be asked for in a few seconds.\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        # Longer than clients and proxies keep a line, so that none of them asks on one that is being closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(settings.stop_seconds),
        proxy_headers=False,  # TRUSTED_PROXIES says whose are believed
        server_header=False,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # it has stopped in good order by then
        sys.exit(128 + signal.SIGINT)


def _listen(settings: Settings) -> socket.socket:
    """The listening socket; ends the program with one sentence when the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        sys.stderr.write(f"HOST {settings.host}, PORT {settings.port} cannot be listened on ({why}).\n")
        sys.exit(2)
    # A socket made without naming TCP keeps Nagle's algorithm under asyncio, which costs 40 ms an answer.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def welcome(settings: Settings, port: int) -> str:
    """What a new user wants to see once the server can draw, with the port it really listens on."""
    here = ("127.0.0.1", "0.0.0.0", "::", "::1")  # noqa: S104  # compared, not listened on
    name = "localhost" if settings.host in here else settings.host
    base = f"http://{name}:{port}"
    path = f"{settings.bucket_path.strip('/')}/".lstrip("/")
    local = settings.storage_provider == "local"
    place = settings.local_bucket_dir.resolve() if local else f"{settings.storage_provider}: {settings.bucket_name}"
    studio = f"  or open       {base}/ui\n" if settings.ui else ""
    return f"""
Ready. Draw something:

  curl "{base}/create_and_upload_image?prompt={quote(_PROMPT)}&save_path=demo/first.webp"

  then look at  {base}/files/{path}demo/first.webp
{studio}  API docs      {base}/docs
  pictures in   {place}

"""
