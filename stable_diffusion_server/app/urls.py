"""How a key becomes a URL: the bucket's own, else this server's."""

from __future__ import annotations

from fastapi import Request

from stable_diffusion_server.bucket_api import Bucket, url_path
from stable_diffusion_server.settings import Settings


class Urls:
    """URLs of keys for a client at hand, or for one that once was."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        self._settings = settings
        self._bucket = bucket

    def base_of(self, request: Request) -> str:
        """Where this server is: PUBLIC_BASE_URL, where that is not the bucket's, else where a trusted proxy is.

        Else the address the client's connection came in on; never the Host header, which the client writes.
        """
        settings = self._settings
        public = settings.public_base_url if settings.storage_provider == "local" else ""
        if base := public or str(request.scope.get("state", {}).get("base", "")):
            return base
        host, port = request.scope.get("server") or (settings.host, settings.port)
        name = f"[{host}]" if ":" in host else host
        # A forwarded scheme may be a websocket's.
        scheme = "https" if request.scope["scheme"] in ("https", "wss") else "http"
        return f"{scheme}://{name}:{port or settings.port}"

    def of(self, request: Request, key: str) -> str:
        """The URL of a key for the client at hand."""
        return self.at(self.base_of(request), key)

    def at(self, base: str, key: str) -> str:
        """The URL of a key for a client that reached this server at `base`."""
        return self._bucket.url(key) or f"{base}/files/{url_path(key)}"
