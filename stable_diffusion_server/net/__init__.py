"""Outbound HTTP to URLs that others name, safe against server-side request forgery (SSRF)."""

from __future__ import annotations

from stable_diffusion_server.net.answer_headers import safe_name
from stable_diffusion_server.net.file_downloader import DownloadFailed, FileBeginning, FileDownloader, RemoteFile
from stable_diffusion_server.net.image_fetcher import FetchLimits, ImageFetcher
from stable_diffusion_server.net.partial_file import discard, finish, git_blob_id
from stable_diffusion_server.net.url_policy import AllowedTarget
from stable_diffusion_server.net.webhook_client import WebhookClient

__all__ = [
    "AllowedTarget",
    "DownloadFailed",
    "FetchLimits",
    "FileBeginning",
    "FileDownloader",
    "ImageFetcher",
    "RemoteFile",
    "WebhookClient",
    "discard",
    "finish",
    "git_blob_id",
    "safe_name",
]
