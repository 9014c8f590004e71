"""Shared by benchmarks of servers on loopback: a free port, waiting, and printing results."""

from __future__ import annotations

import socket
import time

import httpx


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(client: httpx.Client) -> None:
    """Wait until the server is ready, for some minutes at most."""
    for _ in range(900):
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("a server did not become ready")


def say(line: str) -> None:
    """Print a line of the results."""
    print(line, flush=True)  # noqa: T201  # its output
