"""Builds what stores: the bucket with what stands before it, and how a key becomes a URL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from stable_diffusion_server.bucket_api import Bucket, StorageOptions, open_bucket
from stable_diffusion_server.buckets.local import LocalBucket
from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.orders import Stored
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.spool.files import Spool
from stable_diffusion_server.spool.remembering import Remembering
from stable_diffusion_server.spool.spooling import Spooling

_log = structlog.get_logger(__name__)


def build_bucket(settings: Settings) -> Bucket:
    """The bucket of the settings; one that is elsewhere has a spool before it, and a memory of what it holds."""
    bucket = open_bucket(StorageOptions.of(settings))
    if isinstance(bucket, LocalBucket):
        return bucket
    spool = Spool(settings.data_dir / "spool", settings.spool_bytes)
    return Remembering(Spooling(bucket, spool, settings.storage_timeout), settings.known_keys, settings.known_seconds)


def known_to(bucket: Bucket) -> Callable[[str], Stored | None]:
    """What the bucket knows of a key without asking anyone."""
    return bucket.known if isinstance(bucket, Remembering) else lambda key: None


def open_folders(settings: Settings, bucket: Any, faults: dict[str, str]) -> None:
    """Make the folders ready; what cannot be is kept in `faults` for `/readyz`, and the rest is served."""
    faults.clear()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        faults["data"] = f"DATA_DIR cannot be used ({error.strerror})."
    try:
        bucket.open()
    except ServerError as error:
        faults["bucket"] = error.detail
    for fault in faults.values():
        _log.error("not able to draw", reason=fault)
