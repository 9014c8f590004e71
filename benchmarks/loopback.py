"""What measurements over servers on loopback share: a free port, waiting, and saying what came of it."""

from __future__ import annotations

import socket
import time

import httpx


def free_port() -> int:
    """A port nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(client: httpx.Client) -> None:
    """Wait until it can draw, some minutes at the most."""
    for _ in range(900):
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("a server did not become ready")


def say(line: str) -> None:
    """Print a line of the result."""
    print(line, flush=True)  # noqa: T201  # its output
