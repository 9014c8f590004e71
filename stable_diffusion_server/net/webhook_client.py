"""Posts webhooks to URLs that callers name, by the same rules as image fetching."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import httpx

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed, number_text
from stable_diffusion_server.net.safe_client import Resolve, SafeClient, describe_http_error
from stable_diffusion_server.net.url_policy import AllowedTarget, parse_url

_CONNECT_SECONDS = 3.0


class WebhookClient:
    """Posts to public addresses and to those in `allowed`, within `seconds`; does not follow redirects."""

    def __init__(self, seconds: float, allowed: Sequence[AllowedTarget] = (), resolve: Resolve | None = None) -> None:
        self._seconds = seconds
        self._client = SafeClient(allowed, resolve)

    async def check(self, url: str, share: str = "") -> None:
        """Raise `InvalidInput` for a URL that is malformed or not allowed, or whose host is not resolved in time.

        `share` identifies the caller, since callers share the resolver threads fairly.
        """
        target = parse_url(url, "webhook_url")
        try:
            async with asyncio.timeout(self._seconds):
                await self._client.check(target, "webhook_url", share)
        except TimeoutError as error:
            raise InvalidInput(
                f"The host of webhook_url was not found in {number_text(self._seconds)} seconds.", field="webhook_url"
            ) from error

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = "") -> int:
        """Post a message; return the status of the response, whose body is not read.

        Raises `InvalidInput` for a URL that is not allowed, `RemoteFetchFailed` for everything else.
        """
        target = parse_url(url, "webhook_url")
        timeout = httpx.Timeout(self._seconds, connect=_CONNECT_SECONDS)
        try:
            async with asyncio.timeout(self._seconds), await self._client.open_client(timeout) as client:
                response = await self._client.send(
                    client, "POST", target, "webhook_url", headers=headers, content=body, share=share
                )
                await response.aclose()
                return response.status_code
        except TimeoutError as error:
            raise RemoteFetchFailed(f"webhook_url did not answer in {number_text(self._seconds)} seconds.") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            raise RemoteFetchFailed(f"webhook_url could not be reached: {describe_http_error(error)}.") from error

    def close(self) -> None:
        """Stop the resolver threads without waiting for them."""
        self._client.close()
