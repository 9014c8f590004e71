"""The operator's doors: alive, able to draw, figures, and the files of the local bucket. Draws nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import NotModifiedResponse

from stable_diffusion_server.bucket_api import Bucket
from stable_diffusion_server.buckets.local import LocalBucket
from stable_diffusion_server.errors import InvalidInput, NotFound

# A name is an identity: what is stored under it is not drawn anew unless someone asks to overwrite it.
_CACHING = "public, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes=\s*(\d+-\d*|-\d+)(\s*,\s*(\d+-\d*|-\d+))*")
_SHOWN_INLINE = ("image/webp", "image/png", "image/jpeg")


def router(
    missing: Callable[[], list[str]],
    exposition: Callable[[], bytes],
    loaded: Callable[[], Sequence[Mapping[str, object]]] = tuple,
) -> APIRouter:
    """The operator's doors. `missing` lists, in sentences, what keeps the server from drawing; `loaded`, its models."""
    routes = APIRouter(tags=["operate"])

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    @routes.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", summary="Can it draw? 503 says what is missing.")
    async def readyz() -> Response:
        reasons = await run_in_threadpool(missing)
        body = {"status": "not ready" if reasons else "ready", "missing": reasons, "models": list(loaded())}
        return JSONResponse(body, 503 if reasons else 200, {"Retry-After": "2"} if reasons else None)

    @routes.get("/metrics", summary="Figures in Prometheus's text format")
    async def metrics() -> Response:
        return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def files_router(bucket: Bucket, folder: str = "", *, private: bool = False) -> APIRouter:
    """The door to the pictures that have no address of their own: those of a local bucket, and those that wait."""
    routes = APIRouter(tags=["operate"])

    async def files(request: Request, key: str) -> Response:
        return await run_in_threadpool(_file, request, key, bucket, folder, private)

    for method in ("GET", "HEAD"):
        routes.add_api_route(
            "/files/{key:path}",
            files,
            methods=[method],
            summary="A stored picture",
            operation_id=f"file_{method.lower()}",
            response_model=None,
        )
    return routes


def _file(request: Request, key: str, bucket: Bucket, folder: str, private: bool) -> Response:
    stored = None
    inside = isinstance(bucket, LocalBucket) or key.startswith(folder)
    if inside and "\0" not in key and not {"", ".", ".."} & set(key.split("/")):
        try:
            stored = bucket.stat(key)
        except InvalidInput:
            stored = None  # a name no folder can hold names nothing in it
    if stored is None:
        raise NotFound("There is no picture under this name.")
    headers = {
        "ETag": f'"{stored.etag}"',
        "Cache-Control": _CACHING,
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if stored.content_type not in _SHOWN_INLINE:
        headers["Content-Disposition"] = "attachment"
    if not isinstance(bucket, LocalBucket):
        if (url := bucket.url(key)) is not None:
            if private:
                # This door asks for no key, and an address that opens a private bucket is one.
                raise NotFound("There is no picture under this name.")
            return RedirectResponse(url)  # it waited here once, and is in the bucket now
        headers["Cache-Control"] = "no-store"
        return Response(bucket.read(key), headers=headers, media_type=stored.content_type)
    if not _RANGE.fullmatch(request.headers.get("range", "bytes=0-")):
        # What is no range of bytes is to be ignored (RFC 9110, 14.2).
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    wanted = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    response = FileResponse(bucket.path(key), headers=headers, media_type=stored.content_type)
    if wanted & {headers["ETag"], "*"}:
        return NotModifiedResponse(response.headers)
    return response
