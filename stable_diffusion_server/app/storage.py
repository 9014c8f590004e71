"""Builds the storage: bucket with its decorators, history, image library, and URLs of keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog
from fastapi import Request

from stable_diffusion_server.app.credentials import ServerCredentials
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.generation import ImageLibrary, Ownership
from stable_diffusion_server.observability import Metrics
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.storage import (
    Bucket,
    CachedBucket,
    HistoryIndex,
    HistoryWriter,
    InstrumentedBucket,
    LocalBucket,
    ServerSecret,
    UploadSpool,
    UrlSigner,
    WriteBehindBucket,
    open_bucket,
    url_path,
)
from stable_diffusion_server.types import StoredObject

_log = structlog.get_logger(__name__)


class StorageStack:
    """The bucket with its decorators, the history, the image library and the URLs of keys. `open` opens them.

    `metrics` records the calls to a remote bucket.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self.bucket = _bucket_of(settings, metrics)
        self.folder = f"{settings.bucket_path.strip('/')}/".lstrip("/")
        self.signer = _signer_of(settings)
        self.credentials = ServerCredentials(settings)
        self.history = _history_of(settings)
        # Without API keys, images have no owner, and object keys are derived from the request only.
        self.secret = ServerSecret(*_secret_of(settings)) if settings.read_keys() else None
        keyed = self.secret.hmac_hex if self.secret is not None else None
        self.ownership = Ownership(keyed, self.folder, private=settings.signed_url_seconds > 0)
        self.library = ImageLibrary(self.bucket, self.history, self.folder, self.ownership)

    def open(self, faults: dict[str, str]) -> None:
        """Open all parts. Adds failures to `faults`, for `/readyz`; the other parts work."""
        faults.clear()
        try:
            # 0700: other users of this machine must not read prompts, spooled images and the signing key.
            self._settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            faults["data"] = f"DATA_DIR cannot be used ({error.strerror})."
        parts = {"bucket": self.bucket, "signer": self.signer, "secret": self.secret, "credentials": self.credentials}
        for name, part in parts.items():
            try:
                if part is not None and (name == "bucket" or "data" not in faults):
                    part.open()
            except ServerError as error:
                faults[name] = error.detail
        self.history.start()
        _warn_without_public_url(self._settings)
        for fault in faults.values():
            _log.error("not able to draw", reason=fault)

    def close(self) -> None:
        """Finish running writes and close all parts."""
        self.history.close()
        self.bucket.close()

    def known(self, key: str) -> StoredObject | None:
        """Return the object of a key if it is known without a request to the bucket."""
        return self.bucket.cached(key)

    def waiting(self) -> Mapping[str, float]:
        """Return the statistics of the spool, see `WriteBehindBucket.spool_stats`; empty for a local bucket."""
        return self.bucket.spool_stats()

    def base_of(self, request: Request) -> str:
        """Return the base URL of this server: PUBLIC_BASE_URL if the bucket is local, otherwise the client's.

        That is scheme and Host header, which the access middleware has checked against ALLOWED_HOSTS. Behind a
        trusted proxy they are the ones that the client sent to the proxy.
        """
        settings = self._settings
        if settings.storage_provider == "local" and settings.public_base_url:
            return settings.public_base_url
        # X-Forwarded-Proto may name a websocket's scheme.
        scheme = "https" if request.scope["scheme"] in ("https", "wss") else "http"
        return f"{scheme}://{request.headers['host'].strip()}"

    def url_of(self, request: Request, key: str) -> str:
        """Return the URL of a key for the client of a request."""
        return self.url_at(self.base_of(request), key)

    def url_at(self, base: str, key: str) -> str:
        """Return the URL of a key: in the bucket, or below `base`, the URL of this server."""
        if (url := self.bucket.url(key)) is not None:
            return url
        signed = f"?{self.signer.query(key)}" if self.signer is not None else ""
        return f"{base}/files/{url_path(key)}{signed}"


def _warn_without_public_url(settings: Settings) -> None:
    if settings.storage_provider == "local" or settings.public_base_url or settings.signed_url_seconds:
        return
    _log.warning(
        "the bucket has no PUBLIC_BASE_URL, and SIGNED_URL_SECONDS is 0",
        urls=open_bucket(settings).url("KEY") or "of this server, which reads the bucket: /files/KEY",
    )


def _bucket_of(settings: Settings, metrics: Metrics) -> Bucket:
    """Return the configured bucket. A remote bucket gets metrics, write-behind spool and existence cache."""
    bucket = open_bucket(settings)
    if isinstance(bucket, LocalBucket):
        return bucket
    spool = UploadSpool(settings.data_dir / "spool", settings.spool_bytes)
    write_behind = WriteBehindBucket(
        InstrumentedBucket(bucket, metrics.record_storage_call), spool, settings.storage_timeout
    )
    return CachedBucket(write_behind, settings.existence_cache_size, settings.existence_cache_ttl)


def _history_of(settings: Settings) -> HistoryWriter:
    if not settings.history_entries:
        return HistoryWriter(None)
    return HistoryWriter(
        HistoryIndex(settings.data_dir / "history.db", settings.history_entries, settings.history_days * 86_400)
    )


def _signer_of(settings: Settings) -> UrlSigner | None:
    """Return the signer of this server's own URLs, `None` if they are not signed."""
    if not settings.signed_url_seconds:
        return None
    return UrlSigner(*_secret_of(settings), settings.signed_url_seconds)


def _secret_of(settings: Settings) -> tuple[str, Path]:
    """Return the configured secret, empty if there is none, and the file of the generated secret."""
    return settings.url_secret.get_secret_value(), settings.data_dir / "url-secret"
