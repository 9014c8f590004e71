"""Fetches a picture by URL, safe against forged addresses, slow and endless bodies. Knows only its first bytes.

The rules are OWASP's on server-side request forgery: a name is resolved once, every address it has is judged, and the
one judged is the one dialled, with the name kept for the Host header and TLS; each redirect is judged anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx

from stable_diffusion_server.errors import InvalidInput, RemoteFailed, TooLarge, UnsupportedMedia
from stable_diffusion_server.fetching.addresses import Address, is_public
from stable_diffusion_server.fetching.targets import PORTS, Allowance, Target, authority, parse

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_REDIRECTS = 3
_MAX_DIALS = 2
_MAX_AT_ONCE = 16
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "User-Agent": "stable-diffusion-server",
    "Accept": "image/webp, image/png, image/jpeg",
    "Accept-Encoding": "identity",
    # What a page of another site would send: should the address be this server's own, its doors draw nothing for it.
    "Sec-Fetch-Site": "cross-site",
}
_PNG, _JPEG, _RIFF, _WEBP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"WEBP"
_SNIFFED_BYTES = 12


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a fetch may take: bytes, seconds, and bytes per second at the least once `patience` seconds passed."""

    max_bytes: int
    total: float = 10.0
    connect: float = 3.0
    first_byte: float = 5.0
    min_rate: float = 1024.0
    patience: float = 2.0


class Fetcher:
    """Fetches pictures from public addresses and those that `allowed` covers. Used on one event loop.

    `resolve` gives the addresses of a host at a port; it is the system's resolver unless told otherwise.
    """

    def __init__(self, bounds: Bounds, allowed: Sequence[Allowance] = (), resolve: Resolve | None = None) -> None:
        self._bounds = bounds
        self._allowed = tuple(allowed)
        self._resolve = resolve or self._ask_system
        # Threads of their own: a name server that keeps silent must not use up those that everything else needs.
        self._resolvers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="resolver")
        self._places = asyncio.Semaphore(_MAX_AT_ONCE)
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, url: str, field: str) -> bytes:
        """The bytes at `url`, which begin like a PNG, JPEG or WebP; `field` is named in errors.

        Raises `InvalidInput` for an address that is malformed or not allowed, `TooLarge`, `UnsupportedMedia` for what
        is no picture, `RemoteFailed`.
        """
        target = parse(url, field)
        async with self._places:
            if self._tls is None:
                self._tls = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
            try:
                async with asyncio.timeout(self._bounds.total):
                    return await self._follow(target, field)
            except TimeoutError as error:
                raise RemoteFailed(
                    f"{field} was not fetched in {self._bounds.total:g} seconds.", field=field
                ) from error
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
                raise RemoteFailed(f"{field} could not be fetched: {_in_words(error)}.", field=field) from error

    def close(self) -> None:
        """Let go of the resolver's threads."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, target: Target, field: str) -> bytes:
        """Go through redirects by hand, each judged like the first address."""
        timeout = httpx.Timeout(self._bounds.first_byte, connect=self._bounds.connect)
        # A client per fetch: no connection is shared by two names or two callers.
        async with httpx.AsyncClient(
            verify=self._tls or True, trust_env=False, follow_redirects=False, timeout=timeout, headers=_HEADERS
        ) as client:
            for _ in range(MAX_REDIRECTS + 1):
                client.cookies.clear()  # kept by number, they would go to whatever name has the same one
                response = await _dial(client, target, await self._judged_addresses(target, field))
                try:
                    if response.status_code not in _REDIRECTS:
                        return await self._read(response, field)
                    target = _redirected(target, response.headers.get("location", ""), field)
                finally:
                    await response.aclose()
        raise RemoteFailed(f"{field} redirects more than {MAX_REDIRECTS} times.", field=field)

    async def _judged_addresses(self, target: Target, field: str) -> list[Address]:
        """Every address of the target's host, all of them fit to be dialled.

        A name without addresses is answered as one with closed ones: the difference would tell what exists inside.
        """
        try:
            addresses = [ipaddress.ip_address(target.host)]
        except ValueError:
            addresses = await self._addresses_of(target)
        if not addresses or not all(self._may_dial(target, address) for address in addresses):
            raise InvalidInput(f"{field} does not lead to a public address at an ordinary port.", field=field)
        return addresses

    async def _addresses_of(self, target: Target) -> list[Address]:
        try:
            answers = await self._resolve(target.host, target.port)
            return [ipaddress.ip_address(answer.partition("%")[0]) for answer in dict.fromkeys(answers)]
        except (OSError, UnicodeError, ValueError):
            return []

    def _may_dial(self, target: Target, address: Address) -> bool:
        if any(allowance.covers(target, address) for allowance in self._allowed):
            return True
        return target.port in PORTS.values() and is_public(address)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]

    async def _read(self, response: httpx.Response, field: str) -> bytes:
        """The body as it comes over the wire, within the bounds."""
        bounds = self._bounds
        if response.status_code != httpx.codes.OK:
            raise RemoteFailed(f"{field} was answered with status {response.status_code}.", field=field)
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RemoteFailed(f"{field} is answered compressed, which was not asked for.", field=field)
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > bounds.max_bytes:
            raise TooLarge(f"{field} is larger than {bounds.max_bytes} bytes.", field=field)
        data, started = bytearray(), time.monotonic()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > bounds.max_bytes:
                raise TooLarge(f"{field} is larger than {bounds.max_bytes} bytes.", field=field)
            if len(data) >= _SNIFFED_BYTES:
                _sniff(data, field)
            elapsed = time.monotonic() - started
            if elapsed > bounds.patience and len(data) < bounds.min_rate * elapsed:
                raise RemoteFailed(f"{field} comes too slowly.", field=field)
        _sniff(data, field)
        return bytes(data)


async def _dial(client: httpx.AsyncClient, target: Target, addresses: Sequence[Address]) -> httpx.Response:
    """Ask the first address that takes a connection, by its number and under the target's name."""
    failure: httpx.TransportError | None = None
    for address in addresses[:_MAX_DIALS]:
        request = client.build_request(
            "GET",
            f"{target.scheme}://{authority(str(address), target.port, target.scheme)}{target.path}",
            headers={"Host": target.authority},
            extensions={"sni_hostname": target.host.removesuffix(".")},
        )
        try:
            return await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = error
    raise failure or httpx.ConnectError("no address")


def _redirected(target: Target, location: str, field: str) -> Target:
    """Where a redirect leads. Raises `InvalidInput` for a place one may not be led to."""
    if not location:
        raise RemoteFailed(f"{field} redirects to nowhere.", field=field)
    onward = parse(urljoin(target.url, location), field)
    if (target.scheme, onward.scheme) == ("https", "http"):
        raise InvalidInput(f"{field} redirects from https to http.", field=field)
    return onward


def _sniff(data: bytearray, field: str) -> None:
    """Raise `UnsupportedMedia` for a body that does not begin as a picture does, whatever its Content-Type says."""
    if not (data.startswith((_PNG, _JPEG)) or (data.startswith(_RIFF) and data[8:12] == _WEBP)):
        raise UnsupportedMedia(f"{field} leads to something that is not a PNG, JPEG or WebP picture.", field=field)


def _in_words(error: Exception) -> str:
    """What went wrong, told without addresses."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "no connection"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return "the answer broke off or is not HTTP"
