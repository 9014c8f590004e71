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
    """What was dialled and which names were asked for, in order. What lies beyond loopback is refused at the socket.

    `names` answers for the name server: a host's addresses, or several answers that are given one after the other.
    """

    names: dict[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def addresses(self) -> set[str]:
        """Where packets were to go, or went."""
        return {address for address, _ in self.dialled}

    def resolve(self, host: str, port: int, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        """In the place of `socket.getaddrinfo`."""
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
        return  # a socket that is not of the network, or one that is connected already
    _recorders[-1].dialled.append((str(address[0]), int(address[1])))
    if not (address[0] == "::1" or str(address[0]).startswith("127.")):
        raise ConnectionRefusedError("the test lets no packet out")


@contextmanager
def recording(connections: OutboundConnections) -> Iterator[OutboundConnections]:
    """Hear of every connection and datagram of any thread meanwhile."""
    global _installed  # the interpreter keeps an audit hook for good, so there is one
    if not _installed:
        sys.addaudithook(_record)
        _installed = True
    _recorders.append(connections)
    try:
        yield connections
    finally:
        _recorders.remove(connections)


class Trap:
    """Listens at one port on every address of this machine, old and new, and counts connections and bytes."""

    def __init__(self) -> None:
        self.came: list[str] = []
        old = socket.create_server(("0.0.0.0", 0))  # noqa: S104  # a trap has to be everywhere
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
    """A trap that is gone afterwards."""
    trap = Trap()
    yield trap
    trap.close()
