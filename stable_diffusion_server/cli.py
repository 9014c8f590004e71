"""Command line: serve, draw, models, check-storage, spool, settings, api."""

from __future__ import annotations

import argparse
import math
import os
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import quote

import uvicorn

from stable_diffusion_server import __version__
from stable_diffusion_server.settings import Settings, SettingsError, describe_settings, read_settings

_PROMPT = "a red circle on a blue background"
# Request parameters that `draw` has options for.
_DRAW_FIELDS = "prompt model width height seed num_inference_steps guidance_scale negative_prompt".split()


def main(arguments: list[str] | None = None) -> None:
    """Run one command. Exits with 2 and one sentence if a setting is wrong."""
    parser = argparse.ArgumentParser(
        prog="stable-diffusion-server", description="A prompt in, the URL of a stored picture out."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "serve", help="start the server; HOST, PORT and the other settings are read from the environment"
    )
    _add_draw(commands)
    _add_models(commands)
    commands.add_parser("check-storage", help="try every operation of the bucket, one line each")
    _add_spool(commands)
    commands.add_parser("settings", help="print every setting with its default and meaning")
    commands.add_parser("api", help="print the HTTP API with parameters and responses, as in docs/api.md")
    try:
        _run(parser.parse_args(arguments))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


def _run(given: argparse.Namespace) -> None:
    match given.command:
        case "api":
            sys.stdout.write(describe_api())
        case "settings":
            sys.stdout.write(describe_settings() + "\n")
        case "serve":
            serve()
        case _:
            _run_with_settings(given, read_settings())


def _run_with_settings(given: argparse.Namespace, settings: Settings) -> None:
    # Imported after the settings were read: these imports take seconds, and a wrong setting is reported before.
    from stable_diffusion_server.app import check_storage, draw_to_file, manage_dead_letters

    match given.command:
        case "draw":
            fields = {name: value for name in _DRAW_FIELDS if (value := getattr(given, name)) is not None}
            draw_to_file(settings, fields, given.out)
        case "models":
            _run_models(given, settings)
        case "check-storage":
            check_storage(settings)
        case "spool":
            manage_dead_letters(settings.data_dir, given.action, given.ids)


def _run_models(given: argparse.Namespace, settings: Settings) -> None:
    from stable_diffusion_server.app import FetchOrder, fetch_models, inspect_model, list_models, verify_models

    match given.action:
        case "fetch":
            variant = "" if given.variant == "none" else given.variant
            order = FetchOrder(
                given.source, tuple(given.files), given.name, given.folder, given.sha256, variant, given.replace
            )
            fetch_models(settings, order)
        case "inspect":
            inspect_model(settings, given.file, as_json=given.json)
        case "verify":
            verify_models(settings, given.names, as_json=given.json)
        case _:
            list_models(settings, as_json=given.json)


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("models", help="list the models of the settings and of MODELS_DIR, or check them")
    parser.set_defaults(json=False)
    actions = parser.add_subparsers(dest="action")
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="print JSON")
    actions.add_parser("list", parents=[shown], help="the models that are used, and every model file (default)")
    inspect = actions.add_parser("inspect", parents=[shown], help="say what a file or folder is, by its header")
    inspect.add_argument("file", metavar="FILE", help="a path, or a name as `models list` prints it")
    verify = actions.add_parser("verify", parents=[shown], help="read files whole, check them and print their hashes")
    verify.add_argument("names", nargs="*", metavar="NAME", help="as `models list` prints it; default: all")
    _add_fetch(actions)


def _add_fetch(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser(
        "fetch",
        help="download a model into MODELS_DIR",
        description=(
            "Downloads a model of the Hugging Face hub, or of an address, into MODELS_DIR. The same command resumes a "
            "download that was stopped. HF_TOKEN opens gated repositories."
        ),
    )
    parser.add_argument("source", metavar="REPOSITORY[@REVISION] or URL", help="such as stabilityai/sdxl-turbo")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="of the repository; default: its diffusers folder, or its only file"
    )
    parser.add_argument("--name", default="", help="name of the file or folder; default: its own")
    parser.add_argument("--folder", default="", help="folder below MODELS_DIR; default: the one for its kind, if any")
    parser.add_argument("--sha256", default="", metavar="DIGEST", help="refuse a file of another digest")
    parser.add_argument(
        "--variant", default="fp16", help="weights of a diffusers folder; default fp16 if there are any; or none"
    )
    parser.add_argument("--replace", action="store_true", help="replace another file of that name")


def _add_draw(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("draw", help="generate one image into a file, and end")
    parser.add_argument("prompt")
    parser.add_argument("--out", type=Path, default=Path("picture.webp"), help="file: .webp, .png, .jpg")
    parser.add_argument("--model", help="name as listed by `models`; default TEXT_TO_IMAGE_MODEL")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--seed", type=int, help="the same seed gives the same image")
    parser.add_argument("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    parser.add_argument("--guidance", type=float, dest="guidance_scale", help="guidance scale")
    parser.add_argument("--negative-prompt", help="what the image should not show")


def _add_spool(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("spool", help="list, retry or drop the images that the bucket refused for good")
    parser.add_argument("action", choices=("list", "retry", "drop"))
    parser.add_argument("ids", nargs="*", metavar="ID", help="as listed, or `all`; not for list")


def describe_api() -> str:
    """Return the HTTP API as Markdown, for default settings and the embedded models."""
    from stable_diffusion_server.api import openapi_markdown
    from stable_diffusion_server.app import create_app

    return openapi_markdown(create_app(Settings(_env_file=None, models="embedded")).openapi())


def serve() -> None:
    """Serve until a signal ends it."""
    settings = read_settings()
    # Imported after the settings were read: these imports take seconds, and a wrong setting is reported before.
    from stable_diffusion_server.app import BoundedProtocol, ServingHooks, create_app, tune_malloc

    tune_malloc()
    # Bound before anything is loaded, so that a port in use is reported at once.
    listener = open_listener(settings)
    port = listener.getsockname()[1]  # with PORT=0 the one that the system chose

    class ServeHooks(ServingHooks):
        """Greets the user once the server is ready."""

        def ready(self) -> None:
            sys.stdout.write(welcome(settings, port))
            sys.stdout.flush()

    app = create_app(settings, hooks=ServeHooks())
    sys.stdout.write("Loading the models; the first picture can be asked for in a few seconds.\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        access_log=False,
        log_level="warning",
        log_config=None,  # `configure_logging` sends its records to our log
        # Longer than clients and proxies keep idle connections, so that none sends a request on one being closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_seconds),
        proxy_headers=False,  # the access middleware reads them, by TRUSTED_PROXIES
        server_header=False,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # raised after a normal shutdown
        sys.exit(128 + signal.SIGINT)


def open_listener(settings: Settings) -> socket.socket:
    """Return the listening socket. Exits with 2 and one sentence if the address is not available."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        sys.stderr.write(f"HOST {settings.host}, PORT {settings.port} cannot be listened on ({why}).\n")
        sys.exit(2)
    # asyncio only disables Nagle's algorithm on sockets created with IPPROTO_TCP; it costs 40 ms per response.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def welcome(settings: Settings, port: int) -> str:
    """Return the text that tells a new user how to generate and see a first image."""
    loopback = ("127.0.0.1", "0.0.0.0", "::", "::1")  # noqa: S104  # compared, not listened on
    name = "localhost" if settings.host in loopback else settings.host
    base = f"http://{name}:{port}"
    path = f"{settings.bucket_path.strip('/')}/".lstrip("/")
    local = settings.storage_provider == "local"
    place = settings.local_bucket_dir.resolve() if local else f"{settings.storage_provider}: {settings.bucket_name}"
    ui = f"  or open       {base}/ui\n" if settings.ui else ""
    return f"""
Ready. Draw something:

  curl "{base}/create_and_upload_image?prompt={quote(_PROMPT)}&save_path=demo/first.webp"

  then look at  {base}/files/{path}demo/first.webp
{ui}  API docs      {base}/docs
  pictures in   {place}

"""
