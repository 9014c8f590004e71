"""Follows the jobs of one click and tells, again and again, how they all stand. Knows no page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from stable_diffusion_server.ui import telling
from stable_diffusion_server.ui.desk import Desk, Job, RefusedError, Wish

# A browser that is told more often than this shows no more.
_PAUSE = 0.12
_ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Shown:
    """What is to be seen now. `told` and `made` are HTML; `jobs` are ids; `fresh` tells that `pictures` changed."""

    told: str
    jobs: tuple[str, ...] = ()
    receipts: tuple[Job, ...] = ()
    over: bool = False
    fresh: bool = False

    @property
    def pictures(self) -> list[tuple[str, str]]:
        """Address and caption of each finished picture."""
        return [(receipt["path"], f"seed {receipt['seed']}") for receipt in self.receipts]

    @property
    def made(self) -> str:
        """How the finished pictures were made."""
        return telling.made(self.receipts)


async def draw(desk: Desk, wishes: Sequence[Wish]) -> AsyncIterator[Shown]:
    """Ask for pictures and follow them to their ends."""
    jobs: list[Job] = []
    note = ""
    try:
        for wish in wishes:
            jobs.append(await desk.start(wish))  # noqa: PERF401  # those started before one is refused must be known
    except RefusedError as error:
        note = telling.alert(error.detail, error.faults)
        if not jobs:
            yield Shown(note, over=True)
            return
    async for shown in follow(desk, [job["id"] for job in jobs]):
        yield replace(shown, told=note + shown.told)


async def resume(desk: Desk, ids: Sequence[str]) -> AsyncIterator[Shown]:
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


async def follow(desk: Desk, ids: Sequence[str]) -> AsyncIterator[Shown]:
    """How jobs stand, until all have ended."""
    board: dict[str, Job] = {job_id: {"id": job_id, "state": "queued"} for job_id in ids}
    previews: dict[str, str] = {}
    news: asyncio.Queue[tuple[str, str, Job]] = asyncio.Queue()
    yield Shown(telling.progress(list(board.values()), previews), tuple(ids), fresh=True)
    # No task group: it would wrap what closes this generator when a page goes away.
    readers = [asyncio.create_task(_read(desk, job_id, news)) for job_id in ids]
    try:
        over = not ids
        while not over:
            fresh = _take(await news.get(), board, previews)
            while not news.empty():
                fresh |= _take(news.get_nowait(), board, previews)
            over = all(job["state"] in _ENDED for job in board.values())
            receipts = tuple(job["receipt"] for job in board.values() if job["state"] == "done")
            told = telling.progress(list(board.values()), previews)
            yield Shown(told, tuple(ids), receipts, over=over, fresh=fresh or over)
            await asyncio.sleep(0 if over else _PAUSE)
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _take(news: tuple[str, str, Job], board: dict[str, Job], previews: dict[str, str]) -> bool:
    """Put one piece of news on the board; whether a picture was finished by it."""
    job_id, kind, job = news
    board[job_id] = {name: value for name, value in job.items() if name != "image"}
    if kind == "preview":
        previews[job_id] = job["image"]
    return kind == "done"


async def _read(desk: Desk, job_id: str, news: asyncio.Queue[tuple[str, str, Job]]) -> None:
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
