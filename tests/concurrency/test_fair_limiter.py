"""Fair shares of a limited capacity.

How much each caller gets, who is next, and that no unit is lost on cancellation.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from stable_diffusion_server.concurrency.deadlines import ProgressMonitor
from stable_diffusion_server.concurrency.fair_limiter import FairLimiter


async def take_all(limiter: FairLimiter, caller: str, amount: int = 1) -> int:
    """Take units for one caller until there are none; return the number."""
    count = 0
    while limiter.try_take(caller, amount):
        count += amount
    return count


@pytest.mark.fault(111)
@pytest.mark.parametrize(("capacity", "parts"), [(16, [8, 4, 2, 1, 1, 0]), (3, [2, 1, 0]), (2, [1, 1]), (1, [1, 0])])
async def test_one_caller_gets_half_and_the_next_half_of_the_rest(capacity: int, parts: list[int]) -> None:
    """A newcomer gets units, unless as many callers came before as the capacity can be halved."""
    limiter = FairLimiter(capacity)
    got = [await take_all(limiter, f"caller {number}") for number in range(len(parts))]
    assert got == parts
    assert limiter.held == sum(parts) <= capacity


async def test_no_caller_has_more_than_its_most() -> None:
    """A maximum per caller applies in addition to the share; only a caller that holds nothing may exceed it."""
    limiter = FairLimiter(100, max_per_caller=10)
    assert await take_all(limiter, "a") == 10
    assert limiter.try_take("b", 60)
    assert not limiter.try_take("b", 1)


async def test_callers_who_wait_take_turns() -> None:
    """Behind forty requests of one caller, the first of a second and of a third caller come next."""
    limiter, order = FairLimiter(1), list[str]()

    async def work(caller: str) -> None:
        async with limiter.hold(caller):
            order.append(caller)
            await asyncio.sleep(0)

    first = [asyncio.create_task(work("a")) for _ in range(40)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(work(caller)) for caller in ("b", "c", "b")]
    await asyncio.gather(*first, *others)
    assert {"b", "c"} <= set(order[:6])
    assert len(order) == 43
    assert (limiter.held, limiter.waiting) == (0, 0)


async def test_a_large_request_does_not_keep_a_smaller_one_of_its_caller_when_it_leaves() -> None:
    """Requests behind a cancelled one are served at once."""
    limiter = FairLimiter(10)
    await limiter.take("a", 6)
    large = asyncio.create_task(limiter.take("b", 8))
    small = asyncio.create_task(limiter.take("b", 2))
    await asyncio.sleep(0)
    assert not small.done()
    large.cancel()
    await asyncio.wait_for(small, 5)
    assert limiter.held_by("b") == 2


@pytest.mark.fault(110)
async def test_nothing_is_lost_whoever_leaves_when() -> None:
    """A thousand requests of five callers, of any size, half of them cancelled at random points."""
    chance = random.Random(21)  # noqa: S311  # reproducible timing
    limiter = FairLimiter(32)
    most = 0

    async def work(caller: str, amount: int) -> None:
        nonlocal most
        async with limiter.hold(caller, amount):
            most = max(most, limiter.held)
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(chance.choice("abcde"), chance.choice((1, 1, 2, 9, 30)))) for _ in range(1000)]
    while any(not task.done() for task in tasks):
        await asyncio.sleep(0)
        for task in chance.sample(tasks, 5):
            if chance.random() < 0.5:
                task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert 0 < most <= 32
    assert (limiter.held, limiter.waiting) == (0, 0)
    assert limiter.try_take("anyone", 32)


async def test_all_who_wait_may_leave_in_the_same_moment_as_the_one_who_holds() -> None:
    """A unit released while its waiters are being cancelled goes to none of them."""
    limiter = FairLimiter(1)

    async def work() -> None:
        async with limiter.hold("a"):
            await asyncio.sleep(60)

    tasks = [asyncio.create_task(work()) for _ in range(50)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (limiter.held, limiter.waiting) == (0, 0)


@pytest.mark.fault(112)
async def test_work_of_which_nothing_ends_is_a_stall() -> None:
    """No work is no stall, and any completion restarts the time."""
    monitor = ProgressMonitor(0.2)
    await asyncio.sleep(0.3)
    assert not monitor.stalled_seconds()
    with monitor.track():
        with monitor.track():
            assert not monitor.stalled_seconds()
            await asyncio.sleep(0.3)
            assert monitor.stalled_seconds()
        assert not monitor.stalled_seconds()
        assert monitor.pending == 1
    assert not monitor.pending
