"""Single flight: sharing, leaving, waiting."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from stable_diffusion_server.generation.single_flight import CallbackListener, ProgressBroadcaster, SingleFlight
from stable_diffusion_server.types import EngineEventKind, GenerationProgress


class Effort:
    """A slow task that counts its starts and cancellations."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def run(self, audience: ProgressBroadcaster) -> str:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"result {self.begun}"


async def test_callers_of_one_key_share_one_effort() -> None:
    """Ten callers, one run, and nine results are marked as shared."""
    shared: SingleFlight[str] = SingleFlight()
    effort = Effort()
    callers = [asyncio.create_task(shared.join("k", "t", effort.run)) for _ in range(10)]
    await asyncio.sleep(0)
    effort.go.set()
    results = await asyncio.gather(*callers)
    assert effort.begun == 1
    assert [result for result, _ in results] == ["result 1"] * 10
    assert sum(shared for _, shared in results) == 9
    assert len(shared) == 0


async def test_one_caller_leaving_does_not_end_the_effort_of_the_others() -> None:
    """Cancelling one of two callers leaves the other its result."""
    shared: SingleFlight[str] = SingleFlight()
    effort = Effort()
    leaving, staying = (asyncio.create_task(shared.join("k", "t", effort.run)) for _ in range(2))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.sleep(0.01)
    effort.go.set()
    assert await staying == ("result 1", True)
    assert effort.cancelled == 0


async def test_the_last_caller_to_leave_ends_the_effort() -> None:
    """Without waiters the task is cancelled; a new caller starts it again."""
    shared: SingleFlight[str] = SingleFlight()
    effort = Effort()
    callers = [asyncio.create_task(shared.join("k", "t", effort.run)) for _ in range(2)]
    await asyncio.sleep(0.01)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert (effort.begun, effort.cancelled, len(shared)) == (1, 1, 0)
    effort.go.set()
    assert await shared.join("k", "t", effort.run) == ("result 2", False)


async def test_an_effort_that_was_given_up_ends_before_the_next_begins() -> None:
    """A new caller of the key waits until the cancelled task has ended, and does not get its outcome."""
    shared: SingleFlight[str] = SingleFlight()
    order: list[str] = []

    async def stubborn(audience: ProgressBroadcaster) -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            await asyncio.sleep(0.02)
            order.append("old ended")
            raise
        return "old"

    async def fresh(audience: ProgressBroadcaster) -> str:
        order.append("new began")
        return "new"

    leaver = asyncio.create_task(shared.join("k", "t", stubborn))
    await asyncio.sleep(0.01)
    leaver.cancel()
    await asyncio.sleep(0)
    assert await shared.join("k", "t", fresh) == ("new", False)
    assert order == ["old ended", "new began"]


async def test_a_failure_reaches_every_caller_and_is_not_kept() -> None:
    """All callers get the error; the next one starts a new attempt."""
    shared: SingleFlight[str] = SingleFlight()

    async def fail(audience: ProgressBroadcaster) -> str:
        await asyncio.sleep(0)
        raise ConnectionError("no")

    async def succeed(audience: ProgressBroadcaster) -> str:
        return "yes"

    results = await asyncio.gather(*(shared.join("k", "t", fail) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, ConnectionError) for result in results)
    assert await shared.join("k", "t", succeed) == ("yes", False)


async def test_another_tag_waits_for_the_effort_under_way() -> None:
    """Tasks of one key never overlap, whatever their tags."""
    shared: SingleFlight[str] = SingleFlight()
    running = 0

    async def alone(audience: ProgressBroadcaster) -> str:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0.005)
        running -= 1
        return "done"

    results = await asyncio.gather(*(shared.join("k", f"tag {n % 4}", alone) for n in range(16)))
    assert [result for result, _ in results] == ["done"] * 16


async def test_another_tag_gets_its_turn_when_the_effort_before_it_fails() -> None:
    """The new caller does not get its predecessor's error."""
    shared: SingleFlight[str] = SingleFlight()

    async def fail(audience: ProgressBroadcaster) -> str:
        await asyncio.sleep(0.005)
        raise ConnectionError("no")

    async def succeed(audience: ProgressBroadcaster) -> str:
        return "yes"

    first = asyncio.create_task(shared.join("k", "a", fail))
    await asyncio.sleep(0)
    assert await shared.join("k", "b", succeed) == ("yes", False)
    with pytest.raises(ConnectionError):
        await first


async def test_all_waiters_get_progress_and_a_latecomer_gets_the_latest_at_once() -> None:
    """All waiters get events; a caller that left gets none; previews are requested while at least one wants them."""
    shared: SingleFlight[str] = SingleFlight()
    aboard: list[ProgressBroadcaster] = []
    go = asyncio.Event()

    async def effort(audience: ProgressBroadcaster) -> str:
        aboard.append(audience)
        await go.wait()
        return "done"

    def passenger(heard: list[int], previews: bool = False) -> asyncio.Task[tuple[str, bool]]:
        listener = CallbackListener(lambda news: heard.append(news.step), previews)
        return asyncio.create_task(shared.join("k", "t", effort, listener))

    first: list[int] = []
    second: list[int] = []
    late: list[int] = []
    staying, leaving = passenger(first), passenger(second, previews=True)
    await asyncio.sleep(0.01)
    assert aboard[0].wants_previews
    aboard[0].on_progress(GenerationProgress(EngineEventKind.STEP, 1, 4))
    leaving.cancel()
    await asyncio.sleep(0.01)
    assert not aboard[0].wants_previews
    aboard[0].on_progress(GenerationProgress(EngineEventKind.STEP, 2, 4))
    latecomer = passenger(late)
    await asyncio.sleep(0.01)
    go.set()
    assert await staying == ("done", False)
    assert await latecomer == ("done", True)
    assert (first, second, late) == ([1, 2], [1], [2])


async def test_an_effort_may_follow_another_one() -> None:
    """A broadcaster is itself a listener: events of an inner task reach the waiters of the outer one."""
    inner: SingleFlight[str] = SingleFlight()
    outer: SingleFlight[str] = SingleFlight()
    heard: list[int] = []

    async def draw(audience: ProgressBroadcaster) -> str:
        assert audience.wants_previews
        audience.on_progress(GenerationProgress(EngineEventKind.STEP, 3, 4))
        return "drawn"

    async def store(audience: ProgressBroadcaster) -> str:
        return (await inner.join("picture", "", draw, audience))[0] + " and stored"

    watcher = CallbackListener(lambda news: heard.append(news.step), previews=True)
    assert await outer.join("name", "", store, watcher) == ("drawn and stored", False)
    assert heard == [3]


@pytest.mark.parametrize("nested", [False, True])
async def test_an_unfinished_picture_goes_only_to_who_wants_it(nested: bool) -> None:
    """Of three waiters one asks for it; who comes later does not get it either."""
    inner, outer = ProgressBroadcaster(), ProgressBroadcaster()
    source = outer
    if nested:
        inner.add(outer)
        source = inner
    heard: dict[str, list[bool]] = {name: [] for name in ("asks", "does not ask", "asked before", "came later")}

    def listen(name: str, picture: Callable[[], bool]) -> None:
        outer.add(CallbackListener(lambda news: heard[name].append(news.picture is not None), picture=picture))

    wishes = iter([True, True, False])
    listen("asks", lambda: True)
    listen("does not ask", lambda: False)
    listen("asked before", lambda: next(wishes, False))
    assert source.wants_picture
    for step in (1, 2, 3):
        source.on_progress(
            GenerationProgress(EngineEventKind.STEP, step, 4, picture=lambda: np.zeros((1, 1, 3), np.uint8))
        )
    listen("came later", lambda: True)
    assert heard["asks"] == [True, True, True]
    assert heard["does not ask"] == [False, False, False]
    assert heard["asked before"][-1] is False
    assert heard["came later"] == [False]
