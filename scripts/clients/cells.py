"""Reports what one client can do, a line per column of the table in docs/clients.md.

A script prints `client<TAB>column<TAB>yes` or `no: …`; `table.py` runs all scripts and prints the table.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

from PIL import Image, ImageDraw

SERVER = os.environ.get("SERVER", "http://127.0.0.1:8000")
HOST, PORT = SERVER.rpartition("/")[2].split(":")[0], int(SERVER.rpartition(":")[2])
KEY = os.environ.get("KEY", "none")
WORDS = "a red circle on a blue background"
# Seconds to wait for what must happen; it only ends hangs.
_PATIENCE = 90.0


class ClientReport:
    """Prints the results of one client, whose name contains its version."""

    def __init__(self, client: str) -> None:
        self._client = client

    @contextmanager
    def cell(self, column: str) -> Iterator[None]:
        """Report `yes` if the block raises nothing, otherwise what it raised; a column may have several blocks."""
        try:
            yield
        except Exception as error:  # the table shows it
            self._write(column, f"no: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            self._write(column, "yes")

    def not_applicable(self, *columns: str) -> None:
        """Report columns for which the client has no call."""
        for column in columns:
            self._write(column, "–")

    def _write(self, column: str, result: str) -> None:
        sys.stdout.write(f"{self._client}\t{column}\t{result}\n")
        sys.stdout.flush()


def check(holds: object, what: str) -> None:
    """Raise AssertionError with `what` unless `holds`; unlike `assert`, also under `python -O`."""
    if not holds:
        raise AssertionError(what)


def picture_of(data: bytes | str | None) -> Image.Image:
    """Decode an image file, given as bytes, base64, a data URL or a URL of the server."""
    if isinstance(data, str):
        if data.startswith("http"):
            with urlopen(data) as file:  # noqa: S310  # the URL our own server gave
                data = file.read()
        else:
            data = base64.b64decode(data.partition(",")[2] if data.startswith("data:") else data)
    picture = Image.open(io.BytesIO(data or b""))
    picture.load()
    return picture


def circle() -> Image.Image:
    """A red circle on blue, 128 × 128."""
    picture = Image.new("RGB", (128, 128), "blue")
    ImageDraw.Draw(picture).ellipse((40, 40, 88, 88), fill="red")
    return picture


def hole() -> Image.Image:
    """A mask in OpenAI's form, 128 × 128: the transparent middle is repainted."""
    mask = Image.new("RGBA", (128, 128), "white")
    mask.paste((0, 0, 0, 0), (44, 44, 84, 84))
    return mask


def png(picture: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def outside_is_exact(edited: Image.Image) -> bool:
    """Whether an edit of `circle()` left every pixel outside `hole()` as it was."""
    before, after = circle(), edited.convert("RGB")
    kept = hole().getchannel("A").point(lambda alpha: 255 if alpha else 0)
    black = Image.new("RGB", before.size)
    return Image.composite(before, black, kept).tobytes() == Image.composite(after, black, kept).tobytes()


def cancelled_count() -> float:
    """How many requests the engine has cancelled so far."""
    return _metric("sds_jobs_total", 'outcome="cancelled"')


def running_count() -> float:
    """How many requests are on the device."""
    return _metric("sds_queue_running", "")


def cancels(start: Callable[[], object], stop: Callable[[], object]) -> None:
    """Run `start` in a thread, `stop` once it is on the device, and check that the engine cancels it."""
    before = cancelled_count()
    request = threading.Thread(target=_quietly, args=(start,), daemon=True)
    request.start()
    _wait(lambda: running_count() > 0, "the request is on the device")
    stop()
    _wait(lambda: cancelled_count() > before, "the engine cancels the request")
    request.join(_PATIENCE)


def _quietly(start: Callable[[], object]) -> None:
    try:
        start()
    except Exception as error:  # a cancelled request may raise anything
        sys.stderr.write(f"the cancelled request raised {type(error).__name__}\n")


def _wait(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not holds():
        check(time.monotonic() < until, f"waited in vain until {what}")
        time.sleep(0.02)


def _metric(name: str, labels: str) -> float:
    with urlopen(Request(f"{SERVER}/metrics", headers={"X-API-Key": KEY})) as answer:  # noqa: S310  # our own server
        lines = answer.read().decode()
    values = re.findall(rf"^{name}(?:{{[^}}]*{labels}[^}}]*}})? (\S+)$", lines, re.MULTILINE)
    return sum(map(float, values))
