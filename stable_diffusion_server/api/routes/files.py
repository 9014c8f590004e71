"""The door to stored pictures: given with their caching rules, told how they were made, deleted. Draws nothing."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.staticfiles import NotModifiedResponse

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.json_responses import JSONResponse
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

_RANGE = re.compile(r"bytes=\s*(\d+-\d*|-\d+)(\s*,\s*(\d+-\d*|-\d+))*")
_ONE_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*")
_LONGEST_RANGE = 200
# Requests that ask the bucket at a time, of the eight calls that there may be to one elsewhere; those of one caller,
# under way and waiting.
AT_ONCE, MOST_ASKED = 6, 128
_SHOWN_INLINE = ("image/webp", "image/png", "image/jpeg")


def files_router(bucket: Bucket, shelf: ImageLibrary, signer: UrlSigner | None, folder: str = "") -> APIRouter:
    """The door to the pictures that have no address of their own: those of a local bucket, and those that wait.

    With a `signer` every address has to be signed. Of a bucket that is elsewhere only what is in `folder` is given.
    """
    routes = APIRouter(tags=["operate"])
    giving = _Giving(bucket, signer, folder)
    turns = bucket_queue()

    async def files(request: Request, key: str) -> Response:
        caller = caller_of(request)
        if isinstance(bucket, LocalBucket) and "record" not in request.query_params:
            return await run_in_threadpool(giving.give, request, key)
        async with turns.hold(caller.share):
            if "record" not in request.query_params:
                return await run_in_threadpool(giving.give, request, key)
            # The gate has asked for a key, as for drawing: prompts are not for everyone.
            source, record = await run_in_threadpool(shelf.read_record, key, caller)
        return JSONResponse({"key": key, "source": source, "record": dict(record)})

    async def delete(request: Request, key: str) -> Response:
        caller = caller_of(request)
        async with turns.hold(caller.share):
            await run_in_threadpool(shelf.delete, key, caller)
        return Response(status_code=204)

    for method in ("GET", "HEAD"):
        routes.add_api_route(
            "/files/{key:path}",
            files,
            methods=[method],
            summary="A stored picture; with `record=1` how it was made",
            operation_id=f"file_{method.lower()}",
            response_model=None,
        )
    routes.add_api_route(
        "/files/{key:path}",
        delete,
        methods=["DELETE"],
        summary="Delete a picture",
        operation_id="file_delete",
        status_code=204,
        response_model=None,
    )
    return routes


def bucket_queue() -> FairRequestQueue:
    """Who reads or deletes in the bucket: many may, and drawing needs the same few calls to it and threads."""
    return FairRequestQueue(AT_ONCE, MOST_ASKED, f"{MOST_ASKED} requests of yours for stored pictures are under way.")


@dataclass(frozen=True, slots=True)
class _Giving:
    """Gives files out of a bucket."""

    bucket: Bucket
    signer: UrlSigner | None
    folder: str

    def give(self, request: Request, key: str) -> Response:
        """The picture under a key. Raises `NotFound`, and `Forbidden` for an address that is not signed."""
        until = self._signed_until(request, key)
        stored = self._stored(key)
        headers = {
            "ETag": f'"{stored.etag}"',
            "Cache-Control": cache_control(stored.record),
            "Content-Disposition": content_disposition(key, inline=stored.content_type in _SHOWN_INLINE),
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        if until is not None:
            headers["Cache-Control"] = f"private, max-age={max(0, until - int(time.time()))}"
        if isinstance(self.bucket, LocalBucket):
            return _of_disk(request, self.bucket, stored, headers)
        if (url := self.bucket.url(key)) is not None:
            # It waited here once, and is in the bucket now.
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
                stored = None  # a name no folder can hold names nothing in it
        if stored is None:
            raise NotFound("There is no picture under this name.")
        return stored


def _of_disk(request: Request, bucket: LocalBucket, stored: StoredObject, headers: dict[str, str]) -> Response:
    """The file itself, in ranges too, or nothing for who has it already."""
    wanted_range = request.headers.get("range", "bytes=0-")
    if len(wanted_range) > _LONGEST_RANGE or not _RANGE.fullmatch(wanted_range):
        # What is no range of bytes is to be ignored, and many small ones may be (RFC 9110, 14.2).
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    response = FileResponse(bucket.path(stored.key), headers=headers, media_type=stored.content_type)
    return NotModifiedResponse(response.headers) if _is_known(request, headers["ETag"]) else response


def _of_bucket(request: Request, bucket: Bucket, stored: StoredObject, headers: dict[str, str]) -> Response:
    """The object's bytes as this server reads them, one range of them too, or nothing for who has it already.

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
        is_picture = stored.content_type in _SHOWN_INLINE
        data = read_image(bucket, stored.key) if is_picture else bucket.read(stored.key)
        return Response(data, headers=headers, media_type=stored.content_type)
    start, end = wanted
    if start >= end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{stored.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{stored.size}"
    return Response(bucket.read(stored.key, start, end), 206, headers, stored.content_type)


def _is_known(request: Request, etag: str) -> bool:
    """Whether the client has this version already (`If-None-Match`)."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    return bool(known & {etag, "*"})


def _range_of(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """Start and end of the one range asked for, within `size`; `None` for the whole object, also for several ranges."""
    match = _ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        return (size - min(int(last), size), size) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1 if last else size, size)
