"""One-shot CLI commands: draw a file, check the storage, manage dead letters."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from stable_diffusion_server.app import create_app
from stable_diffusion_server.engine import EngineState
from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.settings import Settings, set_compiler_cache
from stable_diffusion_server.storage import DeadLetters, check_bucket, object_key, open_bucket

FORMATS = {".webp": "webp", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
_POLL_SECONDS = 0.1


def draw_to_file(settings: Settings, fields: Mapping[str, Any], out: Path) -> None:
    """Generate one image into a file by the HTTP API of an application in this process.

    Exits with 2 for an invalid request or a file that cannot be written, and with 1 if the generation fails.
    """
    if out.suffix.lower() not in FORMATS:
        _exit(2, f"--out must end in one of {', '.join(FORMATS)}.")
    if not out.parent.is_dir():
        _exit(2, f"There is no folder {out.parent}.")
    with tempfile.TemporaryDirectory(prefix="draw-") as folder:
        local = {
            "storage_provider": "local",
            "data_dir": Path(folder, "data"),
            "local_bucket_dir": Path(folder, "bucket"),
        }
        # The compiler's cache must outlive the temporary data folder.
        set_compiler_cache((settings.data_dir / "compiled").resolve())
        minimal = {"log_level": "error", "ui": False, "api_keys": (), "rate_limit": "", "warmup_sizes": ()}
        temporary = settings.model_copy(update={**local, **minimal})
        response = asyncio.run(_generate(temporary, {**fields, "format": FORMATS[out.suffix.lower()]}))
    if response.status_code != HTTPStatus.OK:
        problem = response.json()
        field = f"{problem['field']}: " if problem.get("field") else ""
        _exit(2 if response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR else 1, f"{field}{problem['detail']}")
    out.write_bytes(response.content)
    sys.stdout.write(f"{out}\n")


async def _generate(settings: Settings, fields: Mapping[str, Any]) -> httpx.Response:
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client,  # noqa: S113  # its own deadline ends it
    ):
        while True:
            ready = await client.get("/readyz")
            # /readyz may report another model as missing although the engine is ready; then send the request anyway.
            if ready.status_code == HTTPStatus.OK or app.state.engine.state is EngineState.READY:
                return await client.post("/make_image", json=fields)
            if app.state.engine.state is EngineState.FAILED:
                sentence = {"detail": " ".join(ready.json()["missing"])}
                return httpx.Response(HTTPStatus.SERVICE_UNAVAILABLE, json=sentence)
            await asyncio.sleep(_POLL_SECONDS)


def check_storage(settings: Settings) -> None:
    """Try every operation of the bucket with a temporary object, and exit; status 1 if an operation fails."""
    key = object_key(settings.bucket_path, f"check-storage-{uuid4().hex}.txt")
    where = settings.local_bucket_dir if settings.storage_provider == "local" else settings.bucket_name
    sys.stdout.write(f"{settings.storage_provider}: {where}\n")
    faults = 0
    for step, fault in check_bucket(open_bucket(settings), key, _fetch):
        sys.stdout.write(f"  ok    {step}\n" if fault is None else f"  FAIL  {step}: {fault}\n")
        faults += fault is not None
    sys.exit(1 if faults else 0)


def manage_dead_letters(data_dir: Path, action: str, ids: list[str]) -> None:
    """List, retry or delete images that the bucket refused permanently. A server may run at the same time.

    Exits with 2 for an unknown id, and with 1 if a file cannot be moved.
    """
    letters = DeadLetters(data_dir / "dead-letters", sys.maxsize)
    found = {letter.id: letter for letter in letters.list_all()}
    if action == "list":
        for letter in found.values():
            sys.stdout.write(
                f"{printable(letter.id)}  {letter.size} bytes  {letter.key!r}  {printable(letter.reason)}\n"
            )
        return
    if ids == ["all"] and not found:
        sys.stdout.write("There are no dead letters.\n")
        return
    by_printed_id = {printable(name): name for name in found}
    chosen = list(found) if ids == ["all"] else [by_printed_id.get(name, name) for name in dict.fromkeys(ids)]
    if not chosen or set(chosen) - set(found):
        absent = ", ".join(sorted(map(printable, set(chosen) - set(found))))
        _exit(2, f"Give ids as `spool list` prints them, or `all`{f'; there is no {absent}' if absent else ''}.")
    act, failed = {"retry": letters.retry, "drop": letters.drop}[action], 0
    for name in chosen:
        try:
            act(found[name])
            sys.stdout.write(f"  ok    {action} {printable(name)}\n")
        except (OSError, ValueError) as error:
            failed += 1
            why = error.strerror if isinstance(error, OSError) else error
            sys.stdout.write(f"  FAIL  {action} {printable(name)}: {why}\n")
    sys.exit(1 if failed else 0)


def printable(text: str) -> str:
    """Return a text that is safe to print on one terminal line: escapes everything except printable ASCII."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def _fetch(url: str) -> bytes:
    """Download a URL without credentials. Raises `StorageUnavailable`, with the URL but not its signature."""
    shown = url.partition("?")[0]
    try:
        answer = httpx.get(url, timeout=20)
    except httpx.HTTPError as error:
        raise StorageUnavailable(f"{shown} cannot be reached ({type(error).__name__}).") from error
    if answer.status_code != HTTPStatus.OK:
        raise StorageUnavailable(f"{shown} answers {answer.status_code}; PUBLIC_BASE_URL or SIGNED_URL_SECONDS help.")
    return answer.content


def _exit(status: int, sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(status)
