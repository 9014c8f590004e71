"""Pictures that visitors of the UI sent, in memory under unguessable tokens: bounded by visitor and altogether."""

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
    """What is kept: `pictures` and `bytes` of one visitor, `total_bytes` of all, each for `seconds` after its use."""

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
    """Keeps encoded pictures by token. Lives on one event loop, and writes nothing to disk.

    A token opens nothing to anyone but its owner. A visitor's own longest unused picture goes first when that visitor
    has too many; when all have too many bytes together, it is that of the visitor who holds the most.
    """

    def __init__(self, limits: UploadLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or UploadLimits()
        self._clock = clock
        self._uploads: OrderedDict[str, _Upload] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, owner: str, data: bytes) -> str:
        """The token of a picture of `owner`, new and unguessable. Raises `TooLarge` where it can never be kept."""
        if len(data) > min(self._limits.bytes, self._limits.total_bytes):
            most = min(self._limits.bytes, self._limits.total_bytes)
            raise TooLarge(f"The picture takes {len(data)} bytes here; {most} are kept of one visitor.")
        self._expire()
        self._make_room(owner, len(data))
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._uploads[token] = _Upload(owner, data, self._clock())
        self._expire_later()
        return token

    def get(self, owner: str, token: str) -> bytes:
        """The picture under a token. Raises `NotFound` for one that is not kept, or is another visitor's."""
        self._expire()
        upload = self._uploads.get(token)
        if upload is None or upload.owner != owner:
            raise NotFound("This picture is not kept any more; choose it again.")
        upload.used = self._clock()
        self._uploads.move_to_end(token)
        return upload.data

    def remove(self, owner: str, token: str) -> None:
        """Forget a picture, if it is there and the owner's."""
        upload = self._uploads.get(token)
        if upload is not None and upload.owner == owner:
            del self._uploads[token]

    @property
    def total_bytes(self) -> int:
        """How many bytes are kept."""
        return sum(len(upload.data) for upload in self._uploads.values())

    def _make_room(self, owner: str, wanted: int) -> None:
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
        """The token an owner has not used for the longest; empty where nothing is kept of that owner."""
        return next((token for token, upload in self._uploads.items() if upload.owner == owner), "")

    def _expire(self) -> None:
        """Forget what was not used for too long; the longest unused are first."""
        before = self._clock() - self._limits.seconds
        while self._uploads and next(iter(self._uploads.values())).used <= before:
            self._uploads.popitem(last=False)

    def _expire_later(self) -> None:
        """Have old pictures forgotten although nobody asks for any."""
        if self._timer is None and self._uploads:
            self._timer = asyncio.get_running_loop().call_later(self._limits.seconds, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        self._expire()
        self._expire_later()
