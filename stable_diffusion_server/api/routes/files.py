"""Routes of stored images: the file with its caching headers, the record of how it was made, deletion."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.staticfiles import NotModifiedResponse

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import IMAGE_FILE
from stable_diffusion_server.api.schemas.responses import ImageRecordBody, described
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound
from stable_diffusion_server.generation import ImageLibrary
from stable_diffusion_server.storage import (
    Bucket,
    LocalBucket,
    UrlSigner,
    cache_control,
    content_disposition,
    read_image,
)
from stable_diffusion_server.types import StoredObject

_RANGE = re.compile(r"bytes=\s*([0-9]+-[0-9]*|-[0-9]+)(\s*,\s*([0-9]+-[0-9]*|-[0-9]+))*")
_ONE_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*")
_LONGEST_RANGE = 200
_FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": described(ImageRecordBody), "content": IMAGE_FILE},
    206: {"description": "A range of the file", "content": IMAGE_FILE},
    304: {"description": "Not modified"},
    307: {"description": "The file is in the bucket, at this URL"},
}
# Maximum concurrent requests to the bucket (a remote one takes eight calls in total); maximum running and waiting
# requests per caller.
CONCURRENCY, MAX_PER_CALLER = 6, 128
_INLINE_TYPES = ("image/webp", "image/png", "image/jpeg")


def files_router(bucket: Bucket, library: ImageLibrary, signer: UrlSigner | None, folder: str = "") -> APIRouter:
    """Return the routes of images that have no bucket URL: images of a local bucket, and pending uploads.

    With a `signer`, URLs must be signed. Serves only keys that start with `folder` from a remote bucket.
    """
    routes = APIRouter(tags=["operate"])
    server = _FileServer(bucket, signer, folder)
    queue = bucket_queue()

    async def files(request: Request, key: str) -> Response:
        caller = caller_of(request)
        if isinstance(bucket, LocalBucket) and "record" not in request.query_params:
            return await run_in_threadpool(server.serve, request, key)
        async with queue.hold(caller.share):
            if "record" not in request.query_params:
                return await run_in_threadpool(server.serve, request, key)
            # The access policy requires a key here, because the record holds the prompt.
            source, record = await run_in_threadpool(library.read_record, key, caller)
        return JSONResponse({"key": key, "source": source, "record": dict(record)})

    async def delete(request: Request, key: str) -> Response:
        caller = caller_of(request)
        async with queue.hold(caller.share):
            await run_in_threadpool(library.delete, key, caller)
        return Response(status_code=204)

    for method in ("GET", "HEAD"):
        routes.add_api_route(
            "/files/{key:path}",
            files,
            methods=[method],
            summary="A stored image; with `record=1` how it was made",
            operation_id=f"file_{method.lower()}",
            response_model=None,
            response_class=Response,
            responses=_FILE_RESPONSES if method == "GET" else {},
        )
    routes.add_api_route(
        "/files/{key:path}",
        delete,
        methods=["DELETE"],
        summary="Delete an image",
        operation_id="file_delete",
        status_code=204,
        response_model=None,
        response_description="Deleted",
    )
    return routes


def bucket_queue() -> FairRequestQueue:
    """Return the queue of reads and deletions; its limit leaves bucket calls and threads for generations."""
    return FairRequestQueue(
        CONCURRENCY, MAX_PER_CALLER, f"{MAX_PER_CALLER} requests of yours for stored pictures are under way."
    )


@dataclass(frozen=True, slots=True)
class _FileServer:
    """Serves files from a bucket."""

    bucket: Bucket
    signer: UrlSigner | None
    folder: str

    def serve(self, request: Request, key: str) -> Response:
        """Return the image of a key. Raises `NotFound`, and `Forbidden` for a URL without a valid signature."""
        until = self._signed_until(request, key)
        stored = self._stored(key)
        headers = {
            "ETag": f'"{stored.etag}"',
            "Cache-Control": cache_control(stored.record),
            "Content-Disposition": content_disposition(key, inline=stored.content_type in _INLINE_TYPES),
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        if until is not None:
            headers["Cache-Control"] = f"private, max-age={max(0, until - int(time.time()))}"
        if isinstance(self.bucket, LocalBucket):
            return _of_disk(request, self.bucket, stored, headers)
        if (url := self.bucket.url(key)) is not None:
            # The upload was pending when the server issued this URL, and is complete now.
            return RedirectResponse(url, headers={"Cache-Control": "no-store"})
        if stored.waiting:
            headers["Cache-Control"] = "no-store"
        return _of_bucket(request, self.bucket, stored, headers)

    def _signed_until(self, request: Request, key: str) -> int | None:
        if self.signer is None:
            return None
        given = request.query_params
        until = self.signer.verify(key, given.get("expires", ""), given.get("signature", ""))
        if until is None:
            raise Forbidden("Addresses of pictures are signed here, and this one is not, or its time is over.")
        return until

    def _stored(self, key: str) -> StoredObject:
        stored = None
        inside = isinstance(self.bucket, LocalBucket) or key.startswith(self.folder)
        if inside and "\0" not in key and not {"", ".", ".."} & set(key.split("/")):
            try:
                stored = self.bucket.stat(key)
            except InvalidInput:
                stored = None  # the bucket cannot contain such a key
        if stored is None:
            raise NotFound("There is no picture under this name.")
        return stored


def _of_disk(request: Request, bucket: LocalBucket, stored: StoredObject, headers: dict[str, str]) -> Response:
    """Return the file or a range of it, or 304 if the client has this version."""
    wanted_range = request.headers.get("range", "bytes=0-")
    if len(wanted_range) > _LONGEST_RANGE or not _RANGE.fullmatch(wanted_range):
        # RFC 9110, 14.2: a server must ignore a header that is no byte range, and may ignore many small ranges.
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    response = FileResponse(bucket.path(stored.key), headers=headers, media_type=stored.content_type)
    return NotModifiedResponse(response.headers) if _is_known(request, headers["ETag"]) else response


def _of_bucket(request: Request, bucket: Bucket, stored: StoredObject, headers: dict[str, str]) -> Response:
    """Return the object or one range of it, read from the bucket, or 304 if the client has this version.

    Raises `NotFound` and `StorageUnavailable`.
    """
    headers["Accept-Ranges"] = "bytes"
    if _is_known(request, headers["ETag"]):
        return NotModifiedResponse(Headers(headers))
    if request.method == "HEAD":
        headers["Content-Length"] = str(stored.size)
        return Response(headers=headers, media_type=stored.content_type)
    wanted = _range_of(request, headers["ETag"], stored.size)
    if wanted is None:
        is_picture = stored.content_type in _INLINE_TYPES
        data = read_image(bucket, stored.key) if is_picture else bucket.read(stored.key)
        return Response(data, headers=headers, media_type=stored.content_type)
    start, end = wanted
    if start >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{stored.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
    return Response(bucket.read(stored.key, start, end), 206, headers, stored.content_type)


def _is_known(request: Request, etag: str) -> bool:
    """Return whether the client has this version already (`If-None-Match`)."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    return bool(known & {etag, "*"})


def _range_of(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """Return start and end of the requested range, within `size`; `None` for the whole object or several ranges."""
    match = _ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        return (size - min(int(last), size), size) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1 if last else size, size)
