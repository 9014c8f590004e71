"""Builds what stores: the bucket with what stands before it, the history beside it, and how a key becomes a URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog
from fastapi import Request

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
    """The bucket with what stands before it, the history beside it, and how a key becomes a URL. Opens nothing yet.

    `metrics` are told of the calls to a bucket elsewhere.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self.bucket = _bucket_of(settings, metrics)
        self.folder = f"{settings.bucket_path.strip('/')}/".lstrip("/")
        self.signer = _signer_of(settings)
        self.history = _history_of(settings)
        # Without keys pictures are everyone's, and names are what they always were.
        self.secret = ServerSecret(*_secret_of(settings)) if settings.read_keys() else None
        keyed = self.secret.hmac_hex if self.secret is not None else None
        self.ownership = Ownership(keyed, self.folder, private=settings.signed_url_seconds > 0)
        self.shelf = ImageLibrary(self.bucket, self.history, self.folder, self.ownership)

    def open(self, faults: dict[str, str]) -> None:
        """Make everything ready; what cannot be is kept in `faults` for `/readyz`, and the rest is served."""
        faults.clear()
        try:
            # Prompts, pictures that wait and the key that signs: nobody else on this machine reads them.
            self._settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            faults["data"] = f"DATA_DIR cannot be used ({error.strerror})."
        for name, part in (("bucket", self.bucket), ("signer", self.signer), ("secret", self.secret)):
            try:
                if part is not None and (name == "bucket" or "data" not in faults):
                    part.open()
            except ServerError as error:
                faults[name] = error.detail
        self.history.start()
        _warn_of_addresses(self._settings)
        for fault in faults.values():
            _log.error("not able to draw", reason=fault)

    def close(self) -> None:
        """Bring to an end what is under way, and let go."""
        self.history.close()
        self.bucket.close()

    def known(self, key: str) -> StoredObject | None:
        """What is known of a key without asking anyone."""
        return self.bucket.cached(key)

    def waiting(self) -> Mapping[str, float]:
        """What waits for the storage, see `WriteBehindBucket.spool_stats`; nothing ever does before a folder."""
        return self.bucket.spool_stats()

    def base_of(self, request: Request) -> str:
        """The base URL of this server as the client wrote it: PUBLIC_BASE_URL, where that is not the bucket's.

        Else scheme and Host header, port included, which the gate has checked against the names this server has;
        behind a trusted proxy both are those the proxy was reached at.
        """
        settings = self._settings
        if settings.storage_provider == "local" and settings.public_base_url:
            return settings.public_base_url
        # A forwarded scheme may be a websocket's.
        scheme = "https" if request.scope["scheme"] in ("https", "wss") else "http"
        return f"{scheme}://{request.headers['host'].strip()}"

    def url_of(self, request: Request, key: str) -> str:
        """The URL of a key for the client at hand."""
        return self.url_at(self.base_of(request), key)

    def url_at(self, base: str, key: str) -> str:
        """The URL of a key for who reached this server at `base`: the bucket's own, else this server's."""
        if (url := self.bucket.url(key)) is not None:
            return url
        signed = f"?{self.signer.query(key)}" if self.signer is not None else ""
        return f"{base}/files/{url_path(key)}{signed}"


def _warn_of_addresses(settings: Settings) -> None:
    if settings.storage_provider == "local" or settings.public_base_url or settings.signed_url_seconds:
        return
    _log.warning(
        "the bucket has no PUBLIC_BASE_URL, and SIGNED_URL_SECONDS is 0",
        urls=open_bucket(settings).url("KEY") or "of this server, which reads the bucket: /files/KEY",
    )


def _bucket_of(settings: Settings, metrics: Metrics) -> Bucket:
    """The bucket of the settings; one that is elsewhere has a spool before it, and a memory of what it holds."""
    bucket = open_bucket(settings)
    if isinstance(bucket, LocalBucket):
        return bucket
    spool = UploadSpool(settings.data_dir / "spool", settings.spool_bytes)
    spooling = WriteBehindBucket(
        InstrumentedBucket(bucket, metrics.record_storage_call), spool, settings.storage_timeout
    )
    return CachedBucket(spooling, settings.existence_cache_size, settings.existence_cache_ttl)


def _history_of(settings: Settings) -> HistoryWriter:
    if not settings.history_entries:
        return HistoryWriter(None)
    return HistoryWriter(
        HistoryIndex(settings.data_dir / "history.db", settings.history_entries, settings.history_days * 86_400)
    )


def _signer_of(settings: Settings) -> UrlSigner | None:
    """What signs this server's own addresses, where they are to be signed."""
    if not settings.signed_url_seconds:
        return None
    return UrlSigner(*_secret_of(settings), settings.signed_url_seconds)


def _secret_of(settings: Settings) -> tuple[str, Path]:
    """The secret of the settings, if there is one, and the file of the one that is made else."""
    return settings.url_secret.get_secret_value(), settings.data_dir / "url-secret"
