"""Accepts uploaded images, decodes them in the sandbox, stores them by token, and renders masks and previews."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_diffusion_server.errors import NotFound, RateLimited, ServerError
from stable_diffusion_server.imaging import canny, feather_mask, media_type_of
from stable_diffusion_server.ui.asgi_transport import problem_response, read_body
from stable_diffusion_server.ui.client import visitor_queue
from stable_diffusion_server.ui.upload_store import UploadStore

T = TypeVar("T")
Pixels = NDArray[np.uint8]
# Maximum concurrent uploads: each may hold a whole file and its pixels in memory.
PER_VISITOR, ALTOGETHER = 2, 8
_JPEG_QUALITY = 95
_PREVIEW_SIDE = 768
PATH = "/ui/pictures"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class DecodeUpload(Protocol):
    """The sandboxed decoder."""

    async def __call__(self, data: bytes, field: str, *, share: str) -> Pixels:
        """Return the pixels of an image file; `share` names the caller, for fair limits on the decoder processes."""
        ...


@dataclass(frozen=True, slots=True)
class TakenImage:
    """A stored upload: its token, and its size in pixels."""

    token: str
    width: int
    height: int


class ImageIntake:
    """Accepts images of at most `max_bytes` bytes. For one event loop.

    `decode` is the sandboxed decoder: this process never opens visitors' files.
    """

    def __init__(self, decode: DecodeUpload, store: UploadStore, max_bytes: int) -> None:
        self._decode = decode
        self._store = store
        self.max_bytes = max_bytes
        self._uploads: Counter[str] = Counter()
        self._turns = visitor_queue()

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """Count one upload while it runs. Raises `RateLimited` if too many uploads run."""
        if self._uploads[owner] >= PER_VISITOR or self._uploads.total() >= ALTOGETHER:
            raise RateLimited("Other pictures are being taken in; try again in a second.", retry_after=1)
        self._uploads[owner] += 1
        try:
            yield
        finally:
            self._uploads[owner] -= 1
            if not self._uploads[owner]:
                del self._uploads[owner]

    async def take(self, owner: str, data: bytes) -> TakenImage:
        """Store an image for `owner`. Call it inside `place`.

        Raises `TooLarge`, `UnsupportedMedia` or `InvalidInput` for the field `image_file`.
        """
        pixels = await self._decode(data, "image_file", share=owner)
        height, width = pixels.shape[:2]
        encoded = await asyncio.to_thread(self._encoded, pixels)
        return TakenImage(self._store.add(owner, encoded), width, height)

    def file(self, owner: str, token: str) -> bytes:
        """Return the re-encoded file of a token. Raises `NotFound`."""
        return self._store.get(owner, token)

    async def work(self, owner: str, tokens: Sequence[str], make: Callable[..., T]) -> T:
        """Call `make` on a thread with the pixels of tokens, each uint8, height × width × 3, and return its result.

        Raises `NotFound`, `RateLimited`.
        """
        async with self._turns.hold(owner):
            pictures = [
                await self._decode(self._store.get(owner, token), "image_file", share=owner) for token in tokens
            ]
            return await asyncio.to_thread(make, *pictures)

    def forget(self, owner: str, token: str) -> None:
        """Delete an image."""
        self._store.remove(owner, token)

    def _encoded(self, pixels: Pixels) -> bytes:
        """Encode as PNG, or as JPEG if the PNG exceeds the server's own limit."""
        file = encoded(pixels, "PNG", compress_level=1)
        return file if len(file) <= self.max_bytes else encoded(pixels, "JPEG", quality=_JPEG_QUALITY, subsampling=0)


def encoded(pixels: Pixels, kind: str, **options: int) -> bytes:
    """Encode pixels as an image file."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()


def edges(pixels: Pixels, low: int, high: int) -> str:
    """Return the Canny edges of an image, reduced to preview size, as a data URL."""
    return _url(canny(_reduced(pixels), low, high), "PNG", compress_level=6)


def painted(mask: Pixels) -> bytes:
    """Return a mask's PNG file, white where `mask` (height × width × 3) is not black.

    Empty if nothing was painted.
    """
    flat = _flat(mask)
    return encoded(flat, "PNG", compress_level=1) if flat.any() else b""


def previewed(picture: Pixels, mask: Pixels, feather: int) -> str:
    """Return the image with black and white stripes over its masked part, as a data URL.

    The mask fades in over `feather` pixels. Empty if nothing was painted.
    """
    height, width = picture.shape[:2]
    flat = _flat(mask)
    if not flat.any():
        return ""
    if flat.shape != (height, width):
        flat = np.asarray(cv2.resize(flat, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    return _url(striped(_reduced(picture), _reduced(feather_mask(flat, feather))), "JPEG", quality=85)


def striped(picture: Pixels, mask: Pixels) -> Pixels:
    """Return an image (height × width × 3) with stripes where its mask (height × width) is white."""
    down, across = np.indices(mask.shape)
    width = max(4, max(mask.shape) // 48)
    stripes = np.where((down + across) // width % 2, 0, 255).astype(np.float32)[..., None]
    weight = (mask.astype(np.float32) / 255 * 0.6)[..., None]
    return np.rint(picture * (1 - weight) + stripes * weight).astype(np.uint8)


def _flat(mask: Pixels) -> Pixels:
    return np.where(mask.max(axis=2) > 0, 255, 0).astype(np.uint8)


def _reduced(pixels: Pixels) -> Pixels:
    """Reduce pixels to at most the preview size."""
    height, width = pixels.shape[:2]
    scale = _PREVIEW_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _url(pixels: Pixels, kind: str, **options: int) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(pixels, kind, **options)).decode()}"


class UploadRoutes:
    """Answers `POST /ui/pictures`, whose body is an image file, and `GET /ui/pictures/{token}`.

    With `?instead=TOKEN` the image replaces another one of the same visitor.
    """

    def __init__(self, intake: ImageIntake) -> None:
        self._intake = intake

    def answers(self, path: str) -> bool:
        """Return whether a path belongs to these routes."""
        return path == PATH or path.startswith(f"{PATH}/")

    async def answer(self, request: Request, owner: str) -> Response:
        """Handle a request of a visitor."""
        try:
            if request.url.path == PATH and request.method == "POST":
                return await self._take(request, owner)
            if request.method in ("GET", "HEAD"):
                return self._show(request.url.path.removeprefix(f"{PATH}/"), owner)
            raise NotFound("There is nothing here.")
        except ServerError as error:
            return problem_response(error)

    async def _take(self, request: Request, owner: str) -> Response:
        with self._intake.place(owner):
            taken = await self._intake.take(owner, await read_body(request.receive, self._intake.max_bytes))
        if _TOKEN.fullmatch(instead := request.query_params.get("instead", "")):
            self._intake.forget(owner, instead)
        body = {"token": taken.token, "width": taken.width, "height": taken.height}
        return JSONResponse(body, 201, {"Cache-Control": "no-store"})

    def _show(self, token: str, owner: str) -> Response:
        if not _TOKEN.fullmatch(token):
            raise NotFound("There is nothing here.")
        file = self._intake.file(owner, token)
        headers = {"Cache-Control": "private, no-store", "Content-Security-Policy": "default-src 'none'"}
        return Response(file, media_type=media_type_of(file), headers=headers)
