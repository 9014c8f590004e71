"""Fetches images by URL, with limits on addresses, redirects, size, time and rate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import RemoteFetchFailed, TooLarge, UnsupportedMedia, number_text
from stable_diffusion_server.imaging import (
    DEFAULT_FORMATS,
    SIGNATURE_BYTES,
    describe_formats,
    matches_signature,
    media_types,
)
from stable_diffusion_server.net.safe_client import Resolve, SafeClient, describe_http_error
from stable_diffusion_server.net.url_policy import REDIRECTS, AllowedTarget, UrlTarget, parse_url, redirect_target

MAX_REDIRECTS = 3
_MAX_FETCHES = 16


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of one fetch.

    Attributes:
        max_bytes: Size of the body.
        total: Seconds for the whole fetch, including redirects.
        connect: Seconds to connect.
        first_byte: Seconds without any data.
        min_rate: Average rate in bytes per second, once `grace` seconds have passed.
        grace: Seconds before `min_rate` applies.
    """

    max_bytes: int
    total: float = 10.0
    connect: float = 3.0
    first_byte: float = 5.0
    min_rate: float = 1024.0
    grace: float = 2.0


class ImageFetcher:
    """Fetches images from public addresses and from those in `allowed`. Use it on one event loop.

    `resolve` returns the addresses of a host and port; the default is the system's resolver. `formats` are the accepted
    image formats.
    """

    def __init__(
        self,
        limits: FetchLimits,
        allowed: Sequence[AllowedTarget] = (),
        resolve: Resolve | None = None,
        formats: Sequence[str] = DEFAULT_FORMATS,
    ) -> None:
        self._limits = limits
        self._formats = formats
        self._headers = {"Accept": media_types(formats)}
        self._client = SafeClient(allowed, resolve)
        self._limiter = FairLimiter(_MAX_FETCHES)

    async def fetch(self, url: str, field: str, *, share: str = "") -> bytes:
        """Fetch the file at `url`, which must start with the signature of an accepted format.

        Callers share a limited number of concurrent fetches fairly; `share` identifies the caller. `field` is named in
        errors.

        Raises `InvalidInput` for a URL that is malformed or not allowed, `TooLarge`, `UnsupportedMedia` for other
        files, `RemoteFetchFailed`.
        """
        target = parse_url(url, field)
        async with self._limiter.hold(share):
            try:
                async with asyncio.timeout(self._limits.total):
                    return await self._follow(target, field, share)
            except TimeoutError as error:
                raise RemoteFetchFailed(
                    f"{field} was not fetched in {number_text(self._limits.total)} seconds.", field=field
                ) from error
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
                raise RemoteFetchFailed(
                    f"{field} could not be fetched: {describe_http_error(error)}.", field=field
                ) from error

    def close(self) -> None:
        """Stop the resolver threads without waiting for them."""
        self._client.close()

    async def _follow(self, target: UrlTarget, field: str, share: str) -> bytes:
        """Follow redirects one by one; each URL is checked like the first."""
        timeout = httpx.Timeout(self._limits.first_byte, connect=self._limits.connect)
        async with await self._client.open_client(timeout) as client:
            for _ in range(MAX_REDIRECTS + 1):
                client.cookies.clear()  # stored by IP address here, so they would reach other names at that address
                response = await self._client.send(client, "GET", target, field, headers=self._headers, share=share)
                try:
                    if response.status_code not in REDIRECTS:
                        return await self._read(response, field)
                    target = redirect_target(target, response.headers.get("location", ""), field)
                finally:
                    await response.aclose()
        raise RemoteFetchFailed(f"{field} redirects more than {MAX_REDIRECTS} times.", field=field)

    async def _read(self, response: httpx.Response, field: str) -> bytes:
        """Read the body, without decompression, within the limits."""
        limits = self._limits
        if response.status_code != httpx.codes.OK:
            raise RemoteFetchFailed(f"{field} was answered with status {response.status_code}.", field=field)
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RemoteFetchFailed(f"{field} is answered compressed, which was not asked for.", field=field)
        declared = response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > limits.max_bytes:
            raise TooLarge(f"{field} is larger than {limits.max_bytes} bytes.", field=field)
        data, started = bytearray(), time.monotonic()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > limits.max_bytes:
                raise TooLarge(f"{field} is larger than {limits.max_bytes} bytes.", field=field)
            if len(data) >= SIGNATURE_BYTES:
                self._check_signature(data, field)
            elapsed = time.monotonic() - started
            if elapsed > limits.grace and len(data) < limits.min_rate * elapsed:
                raise RemoteFetchFailed(f"{field} comes too slowly.", field=field)
        self._check_signature(data, field)
        return bytes(data)

    def _check_signature(self, data: bytearray, field: str) -> None:
        """Raise `UnsupportedMedia` for a body without the signature of an accepted format; ignores Content-Type."""
        if not matches_signature(data, self._formats):
            raise UnsupportedMedia(
                f"{field} leads to something that is not a {describe_formats(self._formats)} picture.", field=field
            )
