"""Stores uploaded images in memory under random tokens, with limits per visitor and in total."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion_server.errors import NotFound, TooLarge

_TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Limits: `pictures` and `bytes` per visitor, `total_bytes` of all visitors, `seconds` from last use to expiry."""

    pictures: int = 16
    bytes: int = 100_663_296
    total_bytes: int = 268_435_456
    seconds: float = 3600.0


@dataclass(slots=True)
class _Upload:
    owner: str
    data: bytes
    used: float


class UploadStore:
    """Encoded images by token. For one event loop; in memory only.

    A token is valid for its owner only. Over a visitor's limits, the store drops that visitor's least recently used
    image; over the total limit, that of the visitor with the most bytes.
    """

    def __init__(self, limits: UploadLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or UploadLimits()
        self._clock = clock
        self._uploads: OrderedDict[str, _Upload] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, owner: str, data: bytes) -> str:
        """Store an image, and return a new random token. Raises `TooLarge` if this image alone exceeds the limits."""
        if len(data) > min(self._limits.bytes, self._limits.total_bytes):
            most = min(self._limits.bytes, self._limits.total_bytes)
            raise TooLarge(f"The picture takes {len(data)} bytes here; {most} are kept of one visitor.")
        self._expire()
        self._evict(owner, len(data))
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._uploads[token] = _Upload(owner, data, self._clock())
        self._expire_later()
        return token

    def get(self, owner: str, token: str) -> bytes:
        """Return the image of a token. Raises `NotFound` if it is expired, unknown or another visitor's."""
        self._expire()
        upload = self._uploads.get(token)
        if upload is None or upload.owner != owner:
            raise NotFound("This picture is not kept any more; choose it again.")
        upload.used = self._clock()
        self._uploads.move_to_end(token)
        return upload.data

    def remove(self, owner: str, token: str) -> None:
        """Delete an image if it exists and belongs to the owner."""
        upload = self._uploads.get(token)
        if upload is not None and upload.owner == owner:
            del self._uploads[token]

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all stored images."""
        return sum(len(upload.data) for upload in self._uploads.values())

    def _evict(self, owner: str, wanted: int) -> None:
        own = [token for token, upload in self._uploads.items() if upload.owner == owner]
        held = sum(len(self._uploads[token].data) for token in own)
        while own and (len(own) >= self._limits.pictures or held + wanted > self._limits.bytes):
            held -= len(self._uploads.pop(own.pop(0)).data)
        while self.total_bytes + wanted > self._limits.total_bytes:
            holdings: Counter[str] = Counter()
            for upload in self._uploads.values():
                holdings[upload.owner] += len(upload.data)
            holdings[owner] += wanted
            largest = max((holder for holder in holdings if self._oldest(holder)), key=holdings.__getitem__)
            del self._uploads[self._oldest(largest)]

    def _oldest(self, owner: str) -> str:
        """Return the owner's least recently used token, or an empty text."""
        return next((token for token, upload in self._uploads.items() if upload.owner == owner), "")

    def _expire(self) -> None:
        """Delete expired images; the dictionary is ordered by last use."""
        before = self._clock() - self._limits.seconds
        while self._uploads and next(iter(self._uploads.values())).used <= before:
            self._uploads.popitem(last=False)

    def _expire_later(self) -> None:
        """Start a timer, so that images also expire without requests."""
        if self._timer is None and self._uploads:
            self._timer = asyncio.get_running_loop().call_later(self._limits.seconds, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        self._expire()
        self._expire_later()
