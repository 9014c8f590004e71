"""Follows the jobs of one click and tells, again and again, how they all stand. Knows no page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import httpx

from stable_diffusion_server.ui.client import ApiClient, Job, RefusedError, UiRequest
from stable_diffusion_server.ui.html import progress as telling

# A browser that is told more often than this shows no more.
_PAUSE = 0.12
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
_ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class GalleryUpdate:
    """What is to be seen now. `told` and `made` are HTML; `jobs` are ids; `fresh` tells that `pictures` changed.

    `refused` is the sentence of what was not even begun, `faults` are pairs of a parameter and what is wrong with it;
    `names` are those of the finished pictures that have one.
    """

    told: str = ""
    jobs: tuple[str, ...] = ()
    receipts: tuple[Job, ...] = ()
    over: bool = False
    fresh: bool = False
    refused: str = ""
    faults: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Address and caption of each finished picture."""
        names = self.names or ("",) * len(self.receipts)
        return [
            (receipt["path"], name or f"seed {receipt['seed']}")
            for receipt, name in zip(self.receipts, names, strict=True)
        ]

    @property
    def made(self) -> str:
        """How the finished pictures were made."""
        return telling.made(self.receipts)


async def draw(desk: ApiClient, wishes: Sequence[UiRequest]) -> AsyncIterator[GalleryUpdate]:
    """Ask for pictures and follow them to their ends."""
    names, refusal = await _started(desk, wishes)
    del wishes  # they hold whole pictures, and the jobs may take long
    if refusal is not None and not names:
        yield GalleryUpdate(refused=refusal.detail, faults=refusal.faults, over=True)
        return
    async for shown in follow(desk, list(names), names):
        yield shown if refusal is None else replace(shown, refused=refusal.detail, faults=refusal.faults)


async def _started(desk: ApiClient, wishes: Sequence[UiRequest]) -> tuple[dict[str, str], RefusedError | None]:
    """The names of the jobs that were begun, by their ids, and why no more were."""
    names: dict[str, str] = {}
    try:
        for wish in wishes:
            names[(await desk.start(wish))["id"]] = wish.name
    except RefusedError as error:
        return names, error
    return names, None


async def resume(desk: ApiClient, ids: Sequence[str]) -> AsyncIterator[GalleryUpdate]:
    """The same for jobs asked for before; those that are not known any more are left out."""
    known = []
    for job_id in ids:
        try:
            known.append((await desk.job(job_id))["id"])
        except RefusedError:
            continue
    if known:
        async for shown in follow(desk, known):
            yield shown


async def follow(
    desk: ApiClient, ids: Sequence[str], names: Mapping[str, str] = _NO_NAMES
) -> AsyncIterator[GalleryUpdate]:
    """How jobs stand, until all have ended; `names` are what to call their pictures."""
    board: dict[str, Job] = {job_id: {"id": job_id, "state": "queued"} for job_id in ids}
    previews: dict[str, str] = {}
    news: asyncio.Queue[tuple[str, str, Job]] = asyncio.Queue()
    yield GalleryUpdate(telling.progress(list(board.values()), previews), tuple(ids), fresh=True)
    # No task group: it would wrap what closes this generator when a page goes away.
    readers = [asyncio.create_task(_read(desk, job_id, news)) for job_id in ids]
    try:
        over = not ids
        while not over:
            fresh = _take(await news.get(), board, previews)
            while not news.empty():
                fresh |= _take(news.get_nowait(), board, previews)
            over = all(job["state"] in _ENDED for job in board.values())
            done = [(job["receipt"], names.get(job["id"], "")) for job in board.values() if job["state"] == "done"]
            told = telling.progress(list(board.values()), previews)
            faults = tuple(fault for job in board.values() for fault in _faults_of(job))
            yield GalleryUpdate(
                told,
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
    """The parameters a job failed for."""
    errors = (job.get("problem") or {}).get("errors", ()) if job["state"] == "failed" else ()
    return [(str(error["field"]), str(error["detail"])) for error in errors]


def _take(news: tuple[str, str, Job], board: dict[str, Job], previews: dict[str, str]) -> bool:
    """Put one piece of news on the board; whether a picture was finished by it."""
    job_id, kind, job = news
    board[job_id] = {name: value for name, value in job.items() if name != "image"}
    if kind == "preview":
        previews[job_id] = job["image"]
    return kind == "done"


async def _read(desk: ApiClient, job_id: str, news: asyncio.Queue[tuple[str, str, Job]]) -> None:
    try:
        async for kind, job in desk.events(job_id):
            await news.put((job_id, kind, job))
            if job["state"] in _ENDED:
                return
        job = await desk.job(job_id)
        await news.put((job_id, job["state"], job if job["state"] in _ENDED else _lost(job_id)))
    except RefusedError as error:
        await news.put((job_id, "failed", _lost(job_id, error.detail)))
    except httpx.HTTPError:
        await news.put((job_id, "failed", _lost(job_id, "The server cannot be reached any more.")))


def _lost(job_id: str, why: str = "The server was stopped; it will go on with this picture.") -> dict[str, Any]:
    return {"id": job_id, "state": "failed", "problem": {"detail": why}}
