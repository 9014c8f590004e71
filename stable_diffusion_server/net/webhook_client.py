"""Posts a message to a URL someone named, under the rules pictures are fetched by. Reads only the answer's status."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import httpx

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed
from stable_diffusion_server.net.safe_client import Resolve, SafeClient, describe_http_error
from stable_diffusion_server.net.url_policy import AllowedTarget, parse_url

_CONNECT = 3.0


class WebhookClient:
    """Posts to public addresses and those that `allowed` covers, within `seconds`; follows no redirect."""

    def __init__(self, seconds: float, allowed: Sequence[AllowedTarget] = (), resolve: Resolve | None = None) -> None:
        self._seconds = seconds
        self._dialler = SafeClient(allowed, resolve)

    async def check(self, url: str, share: str = "") -> None:
        """Raise `InvalidInput` for an address that is malformed or may not be dialled, or is not found in time.

        `share` tells callers apart, who share what looks names up.
        """
        target = parse_url(url, "webhook_url")
        try:
            async with asyncio.timeout(self._seconds):
                await self._dialler.check(target, "webhook_url", share)
        except TimeoutError as error:
            raise InvalidInput(
                f"The host of webhook_url was not found in {self._seconds:g} seconds.", field="webhook_url"
            ) from error

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = "") -> int:
        """The status of the answer.

        Raises `InvalidInput` for an address that may not be dialled, `RemoteFetchFailed`.
        """
        target = parse_url(url, "webhook_url")
        timeout = httpx.Timeout(self._seconds, connect=_CONNECT)
        try:
            async with asyncio.timeout(self._seconds), await self._dialler.open_client(timeout) as client:
                response = await self._dialler.send(
                    client, "POST", target, "webhook_url", headers=headers, content=body, share=share
                )
                await response.aclose()
                return response.status_code
        except TimeoutError as error:
            raise RemoteFetchFailed(f"webhook_url did not answer in {self._seconds:g} seconds.") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            raise RemoteFetchFailed(f"webhook_url could not be reached: {describe_http_error(error)}.") from error

    def close(self) -> None:
        """Let go of the resolver's threads."""
        self._dialler.close()
