"""Buckets, under the path that the first version of this server had: re-exports `storage`."""

from __future__ import annotations

from stable_diffusion_server.storage import Bucket, StorageOptions, check_if_blob_exists, object_key, open_bucket

__all__ = ["Bucket", "StorageOptions", "check_if_blob_exists", "object_key", "open_bucket"]
