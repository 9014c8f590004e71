"""Rate limits use the monotonic clock: setting the system time neither opens nor closes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import limits
import pytest
from conftest import RunningApp

from stable_diffusion_server.api.middleware.rate_limiter import RateLimiter, RateLimitStatus
from stable_diffusion_server.concurrency import moving_windows
from stable_diffusion_server.concurrency.moving_windows import MovingWindows
from stable_diffusion_server.errors import RateLimited

pytestmark = pytest.mark.slow

STEPS = (-3_600.0, -7_200.0, 90_000.0, -4e8, 4e8)


class Clock:
    """System time and monotonic clock, as the module under test sees them."""

    def __init__(self) -> None:
        self.seconds = 1_000.0
        self.stepped = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def time(self) -> float:
        return 1.8e9 + self.seconds + self.stepped


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test sets."""
    clock, module = Clock(), ModuleType("time")
    module.__dict__.update(monotonic=clock.monotonic, time=clock.time)
    monkeypatch.setattr(moving_windows, "time", module)
    return clock


@pytest.mark.fault(155)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_changes_no_rate(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """At the limit the system time jumps: still refused, with Retry-After within the same minute."""
    running_app = run_app(rate_limit="2/minute")
    ask = {"prompt": "a red square", "num_inference_steps": 1}
    answers = [running_app.client.get("/create_and_upload_image", params=ask) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + step)
    refused = running_app.client.get("/create_and_upload_image", params=ask)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert 1 <= int(refused.headers["ratelimit-reset"]) <= 60


@pytest.mark.fault(155)
@pytest.mark.parametrize("step", STEPS)
async def test_a_caller_is_let_in_again_when_its_window_is_over(clock: Clock, step: float) -> None:
    """Whatever the system time does: not a second before, and not one after."""
    allowed, counted = RateLimitStatus("ann", limits.parse("2/minute")), RateLimiter()
    await counted.enter(allowed)
    clock.seconds += 30
    await counted.enter(allowed)
    clock.stepped = step
    clock.seconds += 29.5
    with pytest.raises(RateLimited) as refused:
        await counted.enter(allowed)
    assert refused.value.retry_after == 1
    clock.seconds += 0.5
    await counted.enter(allowed)
    with pytest.raises(RateLimited) as refused:
        await counted.enter(allowed)
    assert refused.value.retry_after == 30


def test_windows_that_are_past_are_forgotten(clock: Clock) -> None:
    """A crowd of one-time callers leaves no state; a caller within its window stays counted."""
    windows, once = MovingWindows(), limits.parse("1/minute")
    for number in range(20_000):
        windows.hit(f"passer-by {number}", once)
    clock.seconds += 61
    windows.hit("ann", once)
    for number in range(30_000):
        windows.hit(f"another {number}", once)
    assert len(windows._hits) < 45_000
    assert not windows.hit("ann", once)


async def test_many_at_once_are_no_more_than_the_rate() -> None:
    """Of fifty concurrent calls ten are accepted."""
    allowed, counted = RateLimitStatus("ann", limits.parse("10/minute")), RateLimiter()
    let_in = 0
    for _ in range(50):
        try:
            await counted.enter(allowed)
            let_in += 1
        except RateLimited:
            pass
    assert let_in == 10


def test_two_rates_of_one_caller_are_counted_apart() -> None:
    """Windows of different lengths do not shorten one another."""
    windows = MovingWindows()
    assert windows.hit("ann", limits.parse("1/second"))
    assert windows.hit("ann", limits.parse("1/hour"))
    assert not windows.hit("ann", limits.parse("1/hour"))
