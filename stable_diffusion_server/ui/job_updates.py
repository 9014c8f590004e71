"""Follows the jobs of one click, and yields updates for the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import httpx

from stable_diffusion_server.ui.client import ApiClient, Job, RefusedError, UiRequest
from stable_diffusion_server.ui.html import progress as progress_html

# Minimum seconds between updates; faster updates are not visible.
_PAUSE = 0.12
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
_ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class GalleryUpdate:
    """One update of the page. `message` and `made` are HTML; `jobs` are ids; `fresh` means that `pictures` changed.

    `refused` is the sentence of a refused request, `faults` are pairs of a parameter and its error; `names` are the
    captions of the finished images, empty for images without a caption.
    """

    message: str = ""
    jobs: tuple[str, ...] = ()
    receipts: tuple[Job, ...] = ()
    over: bool = False
    fresh: bool = False
    refused: str = ""
    faults: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """URL and caption of each finished image."""
        names = self.names or ("",) * len(self.receipts)
        return [
            (receipt["path"], name or f"seed {receipt['seed']}")
            for receipt, name in zip(self.receipts, names, strict=True)
        ]

    @property
    def made(self) -> str:
        """Parameters and warnings of the finished images, as HTML."""
        return progress_html.made(self.receipts)


async def draw(client: ApiClient, requests: Sequence[UiRequest]) -> AsyncIterator[GalleryUpdate]:
    """Request images and follow their jobs until they have ended."""
    names, refusal = await _start(client, requests)
    del requests  # they hold whole image files, and the jobs may take long
    if refusal is not None and not names:
        yield GalleryUpdate(refused=refusal.detail, faults=refusal.faults, over=True)
        return
    async for shown in follow(client, list(names), names):
        yield shown if refusal is None else replace(shown, refused=refusal.detail, faults=refusal.faults)


async def _start(client: ApiClient, requests: Sequence[UiRequest]) -> tuple[dict[str, str], RefusedError | None]:
    """Start the jobs. Returns their captions by job id, and the refusal that stopped the rest, `None` without one."""
    names: dict[str, str] = {}
    try:
        for request in requests:
            names[(await client.start(request))["id"]] = request.name
    except RefusedError as error:
        return names, error
    return names, None


async def resume(client: ApiClient, ids: Sequence[str]) -> AsyncIterator[GalleryUpdate]:
    """Follow jobs that were started earlier; skips unknown jobs."""
    known = []
    for job_id in ids:
        try:
            known.append((await client.job(job_id))["id"])
        except RefusedError:
            continue
    if known:
        async for shown in follow(client, known):
            yield shown


async def follow(
    client: ApiClient, ids: Sequence[str], names: Mapping[str, str] = _NO_NAMES
) -> AsyncIterator[GalleryUpdate]:
    """Yield the state of jobs until all have ended; `names` are captions by job id."""
    jobs_by_id: dict[str, Job] = {job_id: {"id": job_id, "state": "queued"} for job_id in ids}
    previews: dict[str, str] = {}
    updates: asyncio.Queue[tuple[str, str, Job]] = asyncio.Queue()
    yield GalleryUpdate(progress_html.progress(list(jobs_by_id.values()), previews), tuple(ids), fresh=True)
    # No task group: it would wrap the GeneratorExit that closes this generator when the visitor leaves the page.
    readers = [asyncio.create_task(_read(client, job_id, updates)) for job_id in ids]
    try:
        over = not ids
        while not over:
            fresh = _apply(await updates.get(), jobs_by_id, previews)
            while not updates.empty():
                fresh |= _apply(updates.get_nowait(), jobs_by_id, previews)
            over = all(job["state"] in _ENDED for job in jobs_by_id.values())
            done = [(job["receipt"], names.get(job["id"], "")) for job in jobs_by_id.values() if job["state"] == "done"]
            message = progress_html.progress(list(jobs_by_id.values()), previews)
            faults = tuple(fault for job in jobs_by_id.values() for fault in _faults_of(job))
            yield GalleryUpdate(
                message,
                tuple(ids),
                tuple(receipt for receipt, _ in done),
                over=over,
                fresh=fresh or over,
                faults=faults,
                names=tuple(name for _, name in done),
            )
            await asyncio.sleep(0 if over else _PAUSE)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _faults_of(job: Job) -> list[tuple[str, str]]:
    """Return the parameters that a job failed for."""
    errors = (job.get("problem") or {}).get("errors", ()) if job["state"] == "failed" else ()
    return [(str(error["field"]), str(error["detail"])) for error in errors]


def _apply(update: tuple[str, str, Job], jobs_by_id: dict[str, Job], previews: dict[str, str]) -> bool:
    """Apply one update. Returns whether it finished an image."""
    job_id, kind, job = update
    jobs_by_id[job_id] = {name: value for name, value in job.items() if name != "image"}
    if kind == "preview":
        previews[job_id] = job["image"]
    return kind == "done"


async def _read(client: ApiClient, job_id: str, updates: asyncio.Queue[tuple[str, str, Job]]) -> None:
    try:
        async for kind, job in client.events(job_id):
            await updates.put((job_id, kind, job))
            if job["state"] in _ENDED:
                return
        job = await client.job(job_id)
        await updates.put((job_id, job["state"], job if job["state"] in _ENDED else _lost(job_id)))
    except RefusedError as error:
        await updates.put((job_id, "failed", _lost(job_id, error.detail)))
    except httpx.HTTPError:
        await updates.put((job_id, "failed", _lost(job_id, "The server cannot be reached any more.")))


def _lost(job_id: str, why: str = "The server was stopped; it will go on with this picture.") -> dict[str, Any]:
    return {"id": job_id, "state": "failed", "problem": {"detail": why}}
