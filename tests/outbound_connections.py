"""Records which addresses this process connects to (by an audit hook), and listens on traps that count connections."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

_CONNECT_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_recorders: list[OutboundConnections] = []
_installed = False


@dataclass
class OutboundConnections:
    """Connections and DNS lookups, in order. Connections beyond loopback are refused at the socket.

    `names` replaces DNS: a host's addresses, or several answers for successive lookups.
    """

    names: dict[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def addresses(self) -> set[str]:
        """Target addresses of packets, sent or attempted."""
        return {address for address, _ in self.dialled}

    def resolve(self, host: str, port: int, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        """Replaces `socket.getaddrinfo`."""
        turn = self.asked.count(host)
        self.asked.append(host)
        answers = self.names.get(host.rstrip(".").lower(), [])
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answers[min(turn, len(answers) - 1)]
        ]


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if not _recorders or event not in _CONNECT_EVENTS:
        return
    address = next((part for part in reversed(arguments) if isinstance(part, tuple)), None)
    if address is None:
        return  # not a network socket, or already connected
    _recorders[-1].dialled.append((str(address[0]), int(address[1])))
    if not (address[0] == "::1" or str(address[0]).startswith("127.")):
        raise ConnectionRefusedError("the test lets no packet out")


@contextmanager
def recording(connections: OutboundConnections) -> Iterator[OutboundConnections]:
    """Record connections and datagrams of all threads meanwhile."""
    global _installed  # an audit hook cannot be removed, so there is one
    if not _installed:
        sys.addaudithook(_record)
        _installed = True
    _recorders.append(connections)
    try:
        yield connections
    finally:
        _recorders.remove(connections)


class Trap:
    """Listens at one port on every IPv4 and IPv6 address of this machine, and counts connections and bytes."""

    def __init__(self) -> None:
        self.came: list[str] = []
        old = socket.create_server(("0.0.0.0", 0))  # noqa: S104  # the trap listens on every address
        self.port = int(old.getsockname()[1])
        self._listening = [old]
        with suppress(OSError):  # a machine without IPv6
            self._listening.append(socket.create_server(("::", self.port), family=socket.AF_INET6))
        self._threads = [threading.Thread(target=self._wait, args=(listening,)) for listening in self._listening]
        for thread in self._threads:
            thread.start()

    def _wait(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, address = listening.accept()
            except OSError:
                return
            self.came.append(address[0])
            connection.close()

    def close(self) -> None:
        """Stop listening."""
        for listening in self._listening:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def trap() -> Iterator[Trap]:
    """A trap that is closed afterwards."""
    trap = Trap()
    yield trap
    trap.close()
