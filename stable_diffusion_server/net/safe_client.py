"""HTTP client for URLs that callers name, protected against server-side request forgery.

It follows OWASP's rules: a name is resolved once, all its addresses are checked, and the connection goes to a checked
address, with the name in the Host header and in TLS.
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

_MAX_ATTEMPTS = 2
_RESOLVER_THREADS = 16
_HEADERS = {
    "User-Agent": "stable-diffusion-server",
    "Accept-Encoding": "identity",
    # Marks the request as cross-site, so that a URL of this server itself is refused.
    "Sec-Fetch-Site": "cross-site",
}


class SafeClient:
    """Connects to public addresses and to those in `allowed`. Use it on one event loop.

    `resolve` returns the addresses of a host and port; the default is the system's resolver.
    """

    def __init__(self, allowed: Sequence[AllowedTarget] = (), resolve: Resolve | None = None) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve or self._resolve_by_system
        # Own threads, because a silent DNS server must not block the default executor. A caller's share is released
        # only when its thread ends, which can be long after the request timed out.
        self._resolvers = ThreadPoolExecutor(max_workers=_RESOLVER_THREADS, thread_name_prefix="resolver")
        self._lookups = FairLimiter(_RESOLVER_THREADS)
        self._tls: ssl.SSLContext | None = None

    async def open_client(self, timeouts: httpx.Timeout) -> httpx.AsyncClient:
        """A client for one fetch, so that no connection is shared by two names or two callers."""
        if self._tls is None:
            self._tls = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
        return httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=timeouts, headers=_HEADERS
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
        """Send a request to the first of the target's addresses that accepts a connection.

        The response body is not read. `share` identifies the caller. Raises `InvalidInput` for an address that is not
        allowed, and httpx's errors.
        """
        failure: httpx.TransportError | None = None
        for address in (await self.check(target, field, share))[:_MAX_ATTEMPTS]:
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
        """Stop the resolver threads without waiting for them."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def check(self, target: UrlTarget, field: str, share: str = "") -> list[Address]:
        """Resolve the target's host and check all its addresses. Raises `InvalidInput`.

        An unknown name and a name with private addresses give the same error, which thus reveals nothing about the
        internal network.
        """
        try:
            addresses = [ipaddress.ip_address(target.host)]
        except ValueError:
            addresses = await self._resolve_addresses(target, share)
        if not addresses or not all(self._is_allowed(target, address) for address in addresses):
            raise InvalidInput(f"{field} does not lead to a public address at an ordinary port.", field=field)
        return addresses

    async def _resolve_addresses(self, target: UrlTarget, share: str) -> list[Address]:
        await self._lookups.take(share)
        lookup = asyncio.ensure_future(self._resolve(target.host, target.port))
        lookup.add_done_callback(lambda _: self._lookups.release(share))
        try:
            answers = await asyncio.shield(lookup)
            return [ipaddress.ip_address(answer.partition("%")[0]) for answer in dict.fromkeys(answers)]
        except (OSError, UnicodeError, ValueError):
            return []

    def _is_allowed(self, target: UrlTarget, address: Address) -> bool:
        if any(entry.covers(target, address) for entry in self._allowed):
            return True
        return target.port in PORTS.values() and is_public(address)

    async def _resolve_by_system(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


def describe_http_error(error: Exception) -> str:
    """The error as part of a sentence, without addresses."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "no connection"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return "the answer broke off or is not HTTP"
