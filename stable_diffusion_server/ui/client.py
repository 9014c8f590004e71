"""Client of the server's own HTTP API on behalf of a visitor of the UI, and the clients of all visitors."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx
from starlette.requests import Request

from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import RateLimited
from stable_diffusion_server.ui.sessions import SessionStore

COOKIE = "studio"

Job = dict[str, Any]
Files = Mapping[str, bytes]
# A parameter that is a list is sent several times.
Fields = Mapping[str, str | list[str]]

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHORT, _LONG = httpx.Timeout(30), httpx.Timeout(30, read=60)
# A synchronous generation has the server's own timeout, MAX_TIMEOUT, which is ten minutes by default.
_GENERATION = httpx.Timeout(30, read=660)


class RefusedError(Exception):
    """The server refused a request: `detail` is its sentence, `faults` pairs of a field and its error."""

    def __init__(self, status: int, detail: str, faults: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.faults = faults


@dataclass(frozen=True, slots=True)
class UiRequest:
    """One image to request: path, form fields, files by field, and a caption if it is not the seed.

    `references` are files of the field `image_file`, which an edit takes several times, in order; `controls` those of
    `control_file`.
    """

    path: str
    fields: Fields
    files: Files = field(default_factory=dict)
    name: str = ""
    references: tuple[bytes, ...] = ()
    controls: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Address of a visitor, and whether the request passed an untrusted proxy."""

    address: str = "127.0.0.1"
    forwarded: bool = False


def visitor_queue() -> FairRequestQueue:
    """Return a queue for image work: at most two tasks run at a time; at most eight per visitor run or wait."""
    return FairRequestQueue(2, 8, "Other pictures of yours are being worked on; try again in a second.")


@dataclass(frozen=True, slots=True)
class ApiClient:
    """Client of the server at `base`, with the API key `key`, on behalf of the visitor at `client`.

    A server in this process reads `client` from the transport, so that its limits apply to the visitor.
    """

    http: httpx.AsyncClient
    base: str
    key: str = field(default="", repr=False)
    client: ServerAddress = ServerAddress()
    turns: FairRequestQueue = field(default_factory=visitor_queue, repr=False)

    async def start(self, request: UiRequest) -> Job:
        """Start a job. Requests with files wait in a fair queue of all visitors. Raises `RefusedError`."""
        if not request.files and not request.references and not request.controls:
            return await self._start(request)
        try:
            async with self.turns.hold(f"{self.key} {self.client.address}"):
                return await self._start(request)
        except RateLimited as error:
            raise RefusedError(error.status, error.detail) from error

    async def _start(self, request: UiRequest) -> Job:
        named = [*request.files.items(), *(("image_file", content) for content in request.references)]
        named += [("control_file", content) for content in request.controls]
        files = [(name, (f"{name}.png", content)) for name, content in named]
        body = {"data": dict(request.fields), "files": files or None}
        return await self._json("POST", request.path, headers={"Prefer": "respond-async"}, **body)

    async def events(self, job_id: str) -> AsyncIterator[tuple[str, Job]]:
        """Yield the events of a job, with their names, until it has ended. Raises `RefusedError`."""
        # Imported here, because httpx-sse is installed only with the packages of the UI.
        from httpx_sse import EventSource

        url, headers = f"{self.base}/jobs/{_checked_id(job_id)}/events", self._headers({})
        extensions = self._extensions()
        async with self.http.stream("GET", url, headers=headers, timeout=_LONG, extensions=extensions) as response:
            if response.status_code != HTTPStatus.OK:
                await response.aread()
                raise _refused(response)
            async for event in EventSource(response).aiter_sse():
                if event.data:  # after an event with an id, httpx-sse yields an empty event for a keep-alive comment
                    yield event.event, event.json()

    async def job(self, job_id: str) -> Job:
        """Return a job. Raises `RefusedError`."""
        return await self._json("GET", f"/jobs/{_checked_id(job_id)}")

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job. Raises `RefusedError`."""
        return await self._json("DELETE", f"/jobs/{_checked_id(job_id)}")

    async def jobs(self) -> list[Job]:
        """Return the visitor's latest jobs, newest first. Raises `RefusedError`."""
        jobs: list[Job] = (await self._json("GET", "/jobs"))["jobs"]
        return jobs

    async def history(self, words: str = "", model: str = "", before: int | None = None, limit: int = 24) -> Job:
        """Return a page of the history, newest first: `pictures`, and `next` for `before`. Raises `RefusedError`."""
        params = {"q": words, "model": model, "before": before, "limit": limit}
        return await self._json("GET", "/history", params={name: value for name, value in params.items() if value})

    async def record(self, key: str) -> Job:
        """Return the record of how an image was made. Raises `RefusedError`."""
        return await self._json("GET", f"/files/{_path(key)}", params={"record": "1"})

    async def remove(self, key: str) -> None:
        """Delete an image. Raises `RefusedError`."""
        await self._send("DELETE", f"/files/{_path(key)}")

    async def replay(self, picture: bytes) -> Job:
        """Generate an image again from its embedded metadata. Raises `RefusedError`."""
        return await self._json("POST", "/v1/replay", files={"picture_file": ("picture", picture)}, timeout=_GENERATION)

    async def control_image(self, module: str, picture: bytes) -> str:
        """Return what a preprocessor makes of an image, as a data URL. Raises `RefusedError`."""
        body = {"controlnet_module": module, "controlnet_input_images": [base64.b64encode(picture).decode()]}
        answer = await self._json("POST", "/controlnet/detect", json=body, timeout=_LONG)
        return f"data:image/png;base64,{answer['images'][0]}"

    async def control_lists(self) -> tuple[list[str], list[str]]:
        """Return the names of the ControlNets and of the preprocessors. Raises `RefusedError`."""
        models = await self._json("GET", "/controlnet/model_list")
        return models["model_list"], (await self._json("GET", "/controlnet/module_list"))["module_list"]

    async def readiness(self) -> Job:
        """Return whether the server is ready, the reasons if it is not, and its models. Raises `RefusedError`."""
        return await self._json("GET", "/readyz", accepted=(HTTPStatus.SERVICE_UNAVAILABLE,))

    async def figures(self) -> str:
        """Return the server's metrics in Prometheus's format. Raises `RefusedError`."""
        return (await self._send("GET", "/metrics")).text

    async def picture(self, url: str) -> bytes:
        """Return the file at the URL of an image. Raises `RefusedError`."""
        if url.startswith(f"{self.base}/"):
            return (await self._send("GET", url.removeprefix(self.base))).content
        async with httpx.AsyncClient(timeout=_SHORT) as bucket:  # the server itself returned this URL
            response = await bucket.get(url)
        if response.status_code != HTTPStatus.OK:
            raise _refused(response)
        return response.content

    async def _json(self, method: str, path: str, **more: Any) -> Job:
        body: Job = (await self._send(method, path, **more)).json()
        return body

    async def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers, timeout = self._headers(more.pop("headers", {})), more.pop("timeout", _SHORT)
        accepted = more.pop("accepted", ())
        try:
            response = await self.http.request(
                method, self.base + path, headers=headers, timeout=timeout, extensions=self._extensions(), **more
            )
        except httpx.HTTPError as error:
            raise RefusedError(0, f"The server cannot be reached ({type(error).__name__}).") from error
        if response.status_code >= HTTPStatus.BAD_REQUEST and response.status_code not in accepted:
            raise _refused(response)
        return response

    def _extensions(self) -> dict[str, ServerAddress]:
        return {"client": self.client}

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**more, "Authorization": f"Bearer {self.key}"} if self.key else dict(more)


@dataclass(frozen=True, slots=True)
class ApiClients:
    """Creates the API clients of visitors. With `base`, all use that server and that `key`."""

    http: httpx.AsyncClient
    sessions: SessionStore = field(default_factory=SessionStore)
    base: str = ""
    key: str = field(default="", repr=False)
    turns: FairRequestQueue = field(default_factory=visitor_queue)

    def at(self, base: str, key: str, client: ServerAddress) -> ApiClient:
        """Return a client for a key."""
        return ApiClient(self.http, self.base or base.rstrip("/"), self.key or key, client, self.turns)

    def of(self, request: Request) -> ApiClient:
        """Return the client of the visitor who sent a request."""
        key = self.sessions.key_of(request.cookies.get(COOKIE, "")) or ""
        return self.at(f"{request.url.scheme}://{request.headers.get('host', '')}", key, address_of(request))

    def owner_of(self, request: Request) -> str:
        """Return the name of a visitor, the key of its uploads, sessions and limits."""
        caller = request.scope.get("state", {}).get("caller")
        if caller is not None and (caller.name or caller.address):
            return str(caller.share)
        key = self.sessions.key_of(request.cookies.get(COOKIE, ""))
        return f"key {hashlib.sha256(key.encode()).hexdigest()}" if key else f"address {address_of(request).address}"


def address_of(request: Request) -> ServerAddress:
    """Return the address of the visitor who sent a request."""
    address = request.client.host if request.client else ""
    return ServerAddress(address, bool(request.scope.get("state", {}).get("forwarded")))


def _checked_id(job_id: str) -> str:
    """Return a job id that is safe in a path, since a page may send any text as an id. Raises `RefusedError`."""
    if not _JOB_ID.fullmatch(job_id):
        raise RefusedError(HTTPStatus.NOT_FOUND, "There is no job of this id.")
    return job_id


def _path(key: str) -> str:
    return "/".join(str(httpx.URL("", path="/" + part).raw_path[1:], "ascii") for part in key.split("/"))


def _refused(response: httpx.Response) -> RefusedError:
    try:
        problem = response.json()
        faults = tuple((str(fault["field"]), str(fault["detail"])) for fault in problem.get("errors", ()))
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        faults, detail = (), f"The server answered {response.status_code}."
    wait = response.headers.get("retry-after")
    return RefusedError(response.status_code, f"{detail} Try again in {wait} s." if wait else detail, faults)
