"""Memory budget for incoming bodies.

Holds only what has arrived, never deadlocks, never all given to anonymous callers.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest

from stable_diffusion_server.api.middleware.body_intake import MOST_AHEAD, STEP, ByteBudget

MEGABYTE = 1_000_000


@pytest.mark.fault(190)
@pytest.mark.parametrize("arrived", [0, 1, STEP - 1, STEP, STEP + 1, MEGABYTE, 20 * MEGABYTE])
async def test_a_body_holds_what_it_has_brought_and_a_little_more(arrived: int) -> None:
    """Independent of the announced length; a body without bytes holds one step."""
    budget = ByteBudget(256 * MEGABYTE, 128 * MEGABYTE)
    reservation = budget.reserve("a", 32 * MEGABYTE)
    for brought in [*range(0, arrived, STEP // 3), arrived]:
        await budget.make_room(reservation, brought)
        assert brought <= reservation.held <= brought + MOST_AHEAD
    assert budget.held == reservation.held
    assert arrived or reservation.held == STEP
    budget.release(reservation)
    budget.release(reservation)
    assert budget.held == 0


async def sent(budget: ByteBudget, owner: str, claim: int, part: int, *, anonymous: bool = False) -> None:
    """One body sent in parts, its memory released at the end."""
    reservation = budget.reserve(owner, claim, anonymous=anonymous)
    try:
        for arrived in range(0, claim, part):
            await budget.make_room(reservation, arrived)
            await asyncio.sleep(0)
    finally:
        budget.release(reservation)


@pytest.mark.fault(190)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("owners", [1, 3, 60], ids=["one caller", "three callers", "each its own"])
async def test_half_arrived_bodies_are_all_completed(owners: int, seed: int) -> None:
    """Sixty bodies, five times the memory budget, in parts of every size: no deadlock."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    budget = ByteBudget(8 * MEGABYTE, 4 * MEGABYTE)
    bodies = [
        sent(
            budget,
            f"caller {number % owners}",
            chance.choice([1, STEP, 300_000, MEGABYTE, 4 * MEGABYTE, 8 * MEGABYTE]),
            chance.randint(20_000, 300_000),
            anonymous=chance.random() < 0.5,
        )
        for number in range(60)
    ]
    await asyncio.wait_for(asyncio.gather(*bodies), 20)
    assert budget.held == 0


@pytest.mark.fault(190)
@pytest.mark.parametrize("brought", [0, STEP, MEGABYTE, 4 * MEGABYTE])
async def test_anonymous_callers_together_leave_memory_to_those_with_keys(brought: int) -> None:
    """From however many addresses, and however much they send."""
    budget = ByteBudget(16 * MEGABYTE, 8 * MEGABYTE)
    strangers = [asyncio.create_task(held_on(budget, f"address {number % 40}", brought)) for number in range(400)]
    await asyncio.sleep(0.05)
    assert budget.held <= 8 * MEGABYTE
    await asyncio.wait_for(sent(budget, "a key", 8 * MEGABYTE, STEP), 10)
    for stranger in strangers:
        stranger.cancel()
    await asyncio.gather(*strangers, return_exceptions=True)
    assert budget.held == 0


async def held_on(budget: ByteBudget, owner: str, brought: int) -> None:
    """A body that stalls after so many bytes."""
    reservation = budget.reserve(owner, 4 * MEGABYTE, anonymous=True)
    try:
        for arrived in range(0, brought + 1, STEP):
            await budget.make_room(reservation, arrived)
        await asyncio.Event().wait()
    finally:
        budget.release(reservation)


@pytest.mark.fault(190)
async def test_hang_ups_at_random_moments_leave_nothing_held() -> None:
    """A thousand bodies, each cancelled before, during or after its wait for memory."""
    chance = random.Random(7)  # noqa: S311  # no secret
    budget = ByteBudget(2 * MEGABYTE, MEGABYTE)

    async def hung_up(number: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(chance.random() / 20):
                await sent(budget, f"caller {number % 30}", MEGABYTE, 50_000, anonymous=number % 2 == 0)

    await asyncio.wait_for(asyncio.gather(*map(hung_up, range(1000))), 60)
    assert budget.held == 0
    await asyncio.wait_for(sent(budget, "another", 2 * MEGABYTE, 100_000), 10)


async def test_who_holds_least_is_next() -> None:
    """A caller that holds much memory does not block one that holds none."""
    budget = ByteBudget(MEGABYTE, MEGABYTE)
    large = [budget.reserve("a", 400_000) for _ in range(2)]
    for reservation in large:
        for arrived in range(0, 400_000, STEP):
            with suppress(TimeoutError):
                await asyncio.wait_for(budget.make_room(reservation, arrived), 0.01)
    order: list[str] = []

    async def waited(owner: str) -> None:
        await sent(budget, owner, 600_000, 600_000)
        order.append(owner)

    rest = budget.reserve("b", 500_000)
    waiting = [asyncio.create_task(waited(owner)) for owner in ("a", "c")]
    await asyncio.sleep(0.01)
    for reservation in (*large, rest):
        budget.release(reservation)
    await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert "c" in order
    assert budget.held == 0
