"""Connects to addresses others name, safe against forged ones. Knows nothing of what is asked there.

The rules are OWASP's on server-side request forgery: a name is resolved once, every address it has is judged, and the
one judged is the one dialled, with the name kept for the Host header and TLS.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.net.public_ip import Address, is_public
from stable_diffusion_server.net.url_policy import PORTS, AllowedTarget, UrlTarget, authority

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_MAX_DIALS = 2
_RESOLVERS = 16
_HEADERS = {
    "User-Agent": "stable-diffusion-server",
    "Accept-Encoding": "identity",
    # What a page of another site would send: should the address be this server's own, its doors draw nothing for it.
    "Sec-Fetch-Site": "cross-site",
}


class SafeClient:
    """Dials public addresses and those that `allowed` covers. Used on one event loop.

    `resolve` gives the addresses of a host at a port; it is the system's resolver unless told otherwise.
    """

    def __init__(self, allowed: Sequence[AllowedTarget] = (), resolve: Resolve | None = None) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve or self._ask_system
        # Threads of their own: a name server that keeps silent must not use up those that everything else needs. Shared
        # by caller, and held until the thread has ended, which may be long after its caller has given up.
        self._resolvers = ThreadPoolExecutor(max_workers=_RESOLVERS, thread_name_prefix="resolver")
        self._lookups = FairLimiter(_RESOLVERS)
        self._tls: ssl.SSLContext | None = None

    async def open_client(self, patience: httpx.Timeout) -> httpx.AsyncClient:
        """A client for one errand: no connection is shared by two names or two callers."""
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
        return httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=patience, headers=_HEADERS
        )

    async def send(
        self,
        client: httpx.AsyncClient,
        method: str,
        target: UrlTarget,
        field: str,
        *,
        headers: Mapping[str, str],
        content: bytes | None = None,
        share: str = "",
    ) -> httpx.Response:
        """Ask the target's first address that takes a connection, by its number and under the target's name.

        The body is not read yet; `share` tells callers apart. Raises `InvalidInput` for an address that may not be
        dialled, and httpx's errors.
        """
        failure: httpx.TransportError | None = None
        for address in (await self.check(target, field, share))[:_MAX_DIALS]:
            request = client.build_request(
                method,
                f"{target.scheme}://{authority(str(address), target.port, target.scheme)}{target.path}",
                headers={**headers, "Host": target.authority},
                content=content,
                extensions={"sni_hostname": target.host.removesuffix(".")},
            )
            try:
                return await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure or httpx.ConnectError("no address")

    def close(self) -> None:
        """Let go of the resolver's threads."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def check(self, target: UrlTarget, field: str, share: str = "") -> list[Address]:
        """Every address of the target's host, all of them fit to be dialled. Raises `InvalidInput`.

        A name without addresses is answered as one with closed ones: the difference would tell what exists inside.
        """
        try:
            addresses = [ipaddress.ip_address(target.host)]
        except ValueError:
            addresses = await self._addresses_of(target, share)
        if not addresses or not all(self._may_dial(target, address) for address in addresses):
            raise InvalidInput(f"{field} does not lead to a public address at an ordinary port.", field=field)
        return addresses

    async def _addresses_of(self, target: UrlTarget, share: str) -> list[Address]:
        await self._lookups.take(share)
        looking = asyncio.ensure_future(self._resolve(target.host, target.port))
        looking.add_done_callback(lambda _: self._lookups.release(share))
        try:
            answers = await asyncio.shield(looking)
            return [ipaddress.ip_address(answer.partition("%")[0]) for answer in dict.fromkeys(answers)]
        except (OSError, UnicodeError, ValueError):
            return []

    def _may_dial(self, target: UrlTarget, address: Address) -> bool:
        if any(allowance.covers(target, address) for allowance in self._allowed):
            return True
        return target.port in PORTS.values() and is_public(address)

    async def _ask_system(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


def describe_http_error(error: Exception) -> str:
    """What went wrong, told without addresses."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "no connection"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return "the answer broke off or is not HTTP"
