"""Object storage: backends, write-behind, existence cache, signed URLs, history index."""

from __future__ import annotations

from stable_diffusion_server.storage.base import Bucket, check_if_blob_exists, read_image
from stable_diffusion_server.storage.check import check_bucket
from stable_diffusion_server.storage.dead_letters import DeadLetters
from stable_diffusion_server.storage.existence_cache import CachedBucket
from stable_diffusion_server.storage.factory import StorageOptions, open_bucket
from stable_diffusion_server.storage.history.entries import HistoryEntry, HistoryQuery
from stable_diffusion_server.storage.history.index import HistoryIndex
from stable_diffusion_server.storage.history.writer import HistoryWriter
from stable_diffusion_server.storage.instrumented import InstrumentedBucket
from stable_diffusion_server.storage.keys import object_key, url_path
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.storage.object_headers import IMMUTABLE, cache_control, content_disposition
from stable_diffusion_server.storage.signed_urls import ServerSecret, UrlSigner
from stable_diffusion_server.storage.spool import UploadSpool
from stable_diffusion_server.storage.write_behind import WriteBehindBucket

__all__ = [
    "IMMUTABLE",
    "Bucket",
    "CachedBucket",
    "DeadLetters",
    "HistoryEntry",
    "HistoryIndex",
    "HistoryQuery",
    "HistoryWriter",
    "InstrumentedBucket",
    "LocalBucket",
    "ServerSecret",
    "StorageOptions",
    "UploadSpool",
    "UrlSigner",
    "WriteBehindBucket",
    "cache_control",
    "check_bucket",
    "check_if_blob_exists",
    "content_disposition",
    "object_key",
    "open_bucket",
    "read_image",
    "url_path",
]
