"""The server's HTTP API as one visitor of the studio asks it: orders, jobs, their events, what is stored. No pages."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import RateLimited
from stable_diffusion_server.ui.work_queue import visitor_queue

Job = dict[str, Any]
Files = Mapping[str, bytes]

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SHORT, _LONG = httpx.Timeout(30), httpx.Timeout(30, read=60)
# What is drawn while it is waited for has the server's own timeout, ten minutes unless it is set otherwise.
_DRAWN = httpx.Timeout(30, read=660)


class RefusedError(Exception):
    """The server said no: `detail` is its sentence, `faults` pairs of a field and what is wrong with it."""

    def __init__(self, status: int, detail: str, faults: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.faults = faults


@dataclass(frozen=True, slots=True)
class UiRequest:
    """One picture to ask for: the door, its fields in words, files by field, and its name, if it is not its seed."""

    door: str
    fields: Mapping[str, str]
    files: Files = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The connection a visitor came by: its address, and whether through a proxy that nobody answers for."""

    address: str = "127.0.0.1"
    forwarded: bool = False


@dataclass(frozen=True, slots=True)
class ApiClient:
    """The server at `base`, asked with `key` where it wants one, on behalf of `client`.

    A server in this process is told whose request it is: it holds for the visitor, not for this machine.
    """

    http: httpx.AsyncClient
    base: str
    key: str = field(default="", repr=False)
    client: ServerAddress = ServerAddress()
    turns: FairRequestQueue = field(default_factory=visitor_queue, repr=False)

    async def start(self, wish: UiRequest) -> Job:
        """Have a picture drawn, as a job; visitors take turns at sending files. Raises `RefusedError`."""
        if not wish.files:
            return await self._start(wish)
        try:
            async with self.turns.hold(f"{self.key} {self.client.address}"):
                return await self._start(wish)
        except RateLimited as error:
            raise RefusedError(error.status, error.detail) from error

    async def _start(self, wish: UiRequest) -> Job:
        files = {name: (f"{name}.png", content) for name, content in wish.files.items()}
        body = {"data": dict(wish.fields), "files": files or None}
        return await self._json("POST", wish.door, headers={"Prefer": "respond-async"}, **body)

    async def events(self, job_id: str) -> AsyncIterator[tuple[str, Job]]:
        """What happens to a job, until it has ended. Raises `RefusedError`."""
        url, headers = f"{self.base}/jobs/{_known(job_id)}/events", self._headers({})
        async with self.http.stream("GET", url, headers=headers, timeout=_LONG, extensions=self._told()) as answer:
            if answer.status_code != HTTPStatus.OK:
                await answer.aread()
                raise _refused(answer)
            kind = ""
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    async def job(self, job_id: str) -> Job:
        """How a job stands. Raises `RefusedError`."""
        return await self._json("GET", f"/jobs/{_known(job_id)}")

    async def cancel(self, job_id: str) -> Job:
        """End a job. Raises `RefusedError`."""
        return await self._json("DELETE", f"/jobs/{_known(job_id)}")

    async def jobs(self) -> list[Job]:
        """The visitor's latest jobs, newest first. Raises `RefusedError`."""
        jobs: list[Job] = (await self._json("GET", "/jobs"))["jobs"]
        return jobs

    async def history(self, words: str = "", model: str = "", before: int | None = None, limit: int = 24) -> Job:
        """Pictures drawn here, newest first: `pictures`, and `next` to go on behind. Raises `RefusedError`."""
        params = {"q": words, "model": model, "before": before, "limit": limit}
        return await self._json("GET", "/history", params={name: value for name, value in params.items() if value})

    async def record(self, key: str) -> Job:
        """How a picture was made. Raises `RefusedError`."""
        return await self._json("GET", f"/files/{_path(key)}", params={"record": "1"})

    async def remove(self, key: str) -> None:
        """Delete a picture. Raises `RefusedError`."""
        await self._ask("DELETE", f"/files/{_path(key)}")

    async def replay(self, picture: bytes) -> Job:
        """Draw a picture made here again. Raises `RefusedError`."""
        return await self._json("POST", "/v1/replay", files={"picture_file": ("picture", picture)}, timeout=_DRAWN)

    async def readiness(self) -> Job:
        """Whether the server can draw, what it misses, and its models. Raises `RefusedError`."""
        return await self._json("GET", "/readyz", answers=(HTTPStatus.SERVICE_UNAVAILABLE,))

    async def figures(self) -> str:
        """The server's figures in Prometheus's format. Raises `RefusedError`."""
        return (await self._ask("GET", "/metrics")).text

    async def picture(self, url: str) -> bytes:
        """The file at the address of a picture. Raises `RefusedError`."""
        if url.startswith(f"{self.base}/"):
            return (await self._ask("GET", url.removeprefix(self.base))).content
        async with httpx.AsyncClient(timeout=_SHORT) as elsewhere:  # the bucket, which the server itself named
            answer = await elsewhere.get(url)
        if answer.status_code != HTTPStatus.OK:
            raise _refused(answer)
        return answer.content

    async def _json(self, method: str, path: str, **more: Any) -> Job:
        told: Job = (await self._ask(method, path, **more)).json()
        return told

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers, timeout = self._headers(more.pop("headers", {})), more.pop("timeout", _SHORT)
        answers = more.pop("answers", ())
        try:
            answer = await self.http.request(
                method, self.base + path, headers=headers, timeout=timeout, extensions=self._told(), **more
            )
        except httpx.HTTPError as error:
            raise RefusedError(0, f"The server cannot be reached ({type(error).__name__}).") from error
        if answer.status_code >= HTTPStatus.BAD_REQUEST and answer.status_code not in answers:
            raise _refused(answer)
        return answer

    def _told(self) -> dict[str, ServerAddress]:
        return {"client": self.client}

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**more, "Authorization": f"Bearer {self.key}"} if self.key else dict(more)


def _known(job_id: str) -> str:
    """A job's id as a part of a path; pages send ids back, which may be anything. Raises `RefusedError`."""
    if not _JOB_ID.fullmatch(job_id):
        raise RefusedError(HTTPStatus.NOT_FOUND, "There is no job of this id.")
    return job_id


def _path(key: str) -> str:
    return "/".join(str(httpx.URL("", path="/" + part).raw_path[1:], "ascii") for part in key.split("/"))


def _refused(answer: httpx.Response) -> RefusedError:
    try:
        problem = answer.json()
        faults = tuple((str(fault["field"]), str(fault["detail"])) for fault in problem.get("errors", ()))
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError, AttributeError):
        faults, detail = (), f"The server answered {answer.status_code}."
    wait = answer.headers.get("retry-after")
    return RefusedError(answer.status_code, f"{detail} Try again in {wait} s." if wait else detail, faults)
