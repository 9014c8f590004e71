"""Takes the journal's calls off the event loop, onto the one thread it lives on, in the order they were made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore

P = ParamSpec("P")
T = TypeVar("T")


class AsyncJobStore:
    """A journal for the event loop: `await clerk(Journal.find, id)`."""

    def __init__(self, journal: SqliteJobStore) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def __call__(
        self, call: Callable[Concatenate[SqliteJobStore, P], T], /, *given: P.args, **named: P.kwargs
    ) -> T:
        """What the call gives. What is being written is written, although its caller be cancelled meanwhile."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(call, self._journal, *given, **named))

    def bytes_on_disk(self) -> int:
        """How large the journal is; any thread may ask."""
        return self._journal.bytes_on_disk()

    async def close(self) -> None:
        """Write what was asked for, and close the journal."""
        await self(SqliteJobStore.close)
        self._thread.shutdown(wait=False)
