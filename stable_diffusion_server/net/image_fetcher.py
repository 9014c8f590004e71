"""Fetches a picture by URL, safe against forged addresses, slow and endless bodies. Knows only its first bytes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin

import httpx

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed, TooLarge, UnsupportedMedia
from stable_diffusion_server.imaging import (
    DEFAULT_FORMATS,
    SIGNATURE_BYTES,
    describe_formats,
    matches_signature,
    media_types,
)
from stable_diffusion_server.net.safe_client import Resolve, SafeClient, describe_http_error
from stable_diffusion_server.net.url_policy import AllowedTarget, UrlTarget, parse_url

MAX_REDIRECTS = 3
_MAX_AT_ONCE = 16
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """How much a fetch may take: bytes, seconds, and bytes per second at the least once `patience` seconds passed."""

    max_bytes: int
    total: float = 10.0
    connect: float = 3.0
    first_byte: float = 5.0
    min_rate: float = 1024.0
    grace: float = 2.0


class ImageFetcher:
    """Fetches pictures from public addresses and those that `allowed` covers. Used on one event loop.

    `resolve` gives the addresses of a host at a port; it is the system's resolver unless told otherwise. `formats` are
    the kinds of files that are taken for pictures.
    """

    def __init__(
        self,
        limits: FetchLimits,
        allowed: Sequence[AllowedTarget] = (),
        resolve: Resolve | None = None,
        formats: Sequence[str] = DEFAULT_FORMATS,
    ) -> None:
        self._bounds = limits
        self._formats = formats
        self._headers = {"Accept": media_types(formats)}
        self._dialler = SafeClient(allowed, resolve)
        self._places = FairLimiter(_MAX_AT_ONCE)

    async def fetch(self, url: str, field: str, *, share: str = "") -> bytes:
        """The bytes at `url`, which begin like a picture that is taken; `field` is named in errors.

        A few are fetched at a time, shared out by caller; `share` tells callers apart.

        Raises `InvalidInput` for an address that is malformed or not allowed, `TooLarge`, `UnsupportedMedia` for what
        is no picture, `RemoteFetchFailed`.
        """
        target = parse_url(url, field)
        async with self._places.hold(share):
            try:
                async with asyncio.timeout(self._bounds.total):
                    return await self._follow(target, field, share)
            except TimeoutError as error:
                raise RemoteFetchFailed(
                    f"{field} was not fetched in {self._bounds.total:g} seconds.", field=field
                ) from error
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
                raise RemoteFetchFailed(
                    f"{field} could not be fetched: {describe_http_error(error)}.", field=field
                ) from error

    def close(self) -> None:
        """Let go of the resolver's threads."""
        self._dialler.close()

    async def _follow(self, target: UrlTarget, field: str, share: str) -> bytes:
        """Go through redirects by hand, each judged like the first address."""
        timeout = httpx.Timeout(self._bounds.first_byte, connect=self._bounds.connect)
        async with await self._dialler.open_client(timeout) as client:
            for _ in range(MAX_REDIRECTS + 1):
                client.cookies.clear()  # kept by number, they would go to whatever name has the same one
                response = await self._dialler.send(client, "GET", target, field, headers=self._headers, share=share)
                try:
                    if response.status_code not in _REDIRECTS:
                        return await self._read(response, field)
                    target = _redirected(target, response.headers.get("location", ""), field)
                finally:
                    await response.aclose()
        raise RemoteFetchFailed(f"{field} redirects more than {MAX_REDIRECTS} times.", field=field)

    async def _read(self, response: httpx.Response, field: str) -> bytes:
        """The body as it comes over the wire, within the bounds."""
        bounds = self._bounds
        if response.status_code != httpx.codes.OK:
            raise RemoteFetchFailed(f"{field} was answered with status {response.status_code}.", field=field)
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RemoteFetchFailed(f"{field} is answered compressed, which was not asked for.", field=field)
        declared = response.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > bounds.max_bytes:
            raise TooLarge(f"{field} is larger than {bounds.max_bytes} bytes.", field=field)
        data, started = bytearray(), time.monotonic()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > bounds.max_bytes:
                raise TooLarge(f"{field} is larger than {bounds.max_bytes} bytes.", field=field)
            if len(data) >= SIGNATURE_BYTES:
                self._sniff(data, field)
            elapsed = time.monotonic() - started
            if elapsed > bounds.grace and len(data) < bounds.min_rate * elapsed:
                raise RemoteFetchFailed(f"{field} comes too slowly.", field=field)
        self._sniff(data, field)
        return bytes(data)

    def _sniff(self, data: bytearray, field: str) -> None:
        """Raise `UnsupportedMedia` for a body that does not begin as a picture does, whatever its Content-Type says."""
        if not matches_signature(data, self._formats):
            raise UnsupportedMedia(
                f"{field} leads to something that is not a {describe_formats(self._formats)} picture.", field=field
            )


def _redirected(target: UrlTarget, location: str, field: str) -> UrlTarget:
    """Where a redirect leads. Raises `InvalidInput` for a place one may not be led to."""
    if not location:
        raise RemoteFetchFailed(f"{field} redirects to nowhere.", field=field)
    try:
        url = urljoin(target.url, location)
    except ValueError as error:
        raise InvalidInput(f"{field} redirects to what is not a URL.", field=field) from error
    onward = parse_url(url, field)
    if (target.scheme, onward.scheme) == ("https", "http"):
        raise InvalidInput(f"{field} redirects from https to http.", field=field)
    return onward
