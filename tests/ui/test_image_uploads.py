"""Images uploaded by UI visitors: bounded, accessible to their owner only, decoded in the sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import disc, file_of
from hostile_images import foreign, png_claiming
from numpy.typing import NDArray

from stable_diffusion_server.errors import NotFound, RateLimited, TooLarge
from stable_diffusion_server.ui.image_intake import ALTOGETHER, PER_VISITOR, ImageIntake
from stable_diffusion_server.ui.upload_store import UploadLimits, UploadStore

pytestmark = pytest.mark.slow

LIMITS = UploadLimits(pictures=3, bytes=100, total_bytes=150, seconds=60)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept(store: UploadStore, owner: str, tokens: list[str]) -> list[bool]:
    """Which of these still exist."""
    found = []
    for token in tokens:
        try:
            store.get(owner, token)
        except NotFound:
            found.append(False)
        else:
            found.append(True)
    return found


async def test_a_visitor_keeps_so_many_pictures_and_no_more() -> None:
    """At the limit all exist; one more evicts the least recently used."""
    store = UploadStore(LIMITS)
    tokens = [store.add("a", b"x") for _ in range(3)]
    assert kept(store, "a", tokens) == [True] * 3
    store.get("a", tokens[0])
    tokens.append(store.add("a", b"x"))
    assert kept(store, "a", tokens) == [True, False, True, True]


async def test_a_visitor_keeps_so_many_bytes_and_no_more() -> None:
    """At the limit both exist, one byte above only the second; a file above the limit is refused."""
    store = UploadStore(LIMITS)
    tokens = [store.add("a", b"x" * 50), store.add("a", b"x" * 50)]
    assert kept(store, "a", tokens) == [True, True]
    tokens.append(store.add("a", b"x"))
    assert kept(store, "a", tokens) == [False, True, True]
    store.add("a", b"x" * 100)
    with pytest.raises(TooLarge):
        store.add("a", b"x" * 101)


async def test_who_keeps_the_most_is_evicted_for_others() -> None:
    """All visitors together stay within the byte limit, and the largest holder loses its images first."""
    store = UploadStore(LIMITS)
    greedy = [store.add("greedy", b"x" * 50), store.add("greedy", b"x" * 50)]
    modest = [store.add("modest", b"x" * 40)]
    others = [store.add("third", b"x" * 40)]
    assert store.total_bytes <= 150
    assert (kept(store, "greedy", greedy), kept(store, "modest", modest), kept(store, "third", others)) == (
        [False, True],
        [True],
        [True],
    )
    for visitor in range(1000):
        store.add(f"stranger {visitor}", b"x" * 7)
    assert store.total_bytes <= 150


async def test_a_picture_is_kept_for_so_long_after_its_last_use() -> None:
    """Just before expiry it exists, and a use restarts the time; at expiry it does not."""
    clock = Clock()
    store = UploadStore(LIMITS, clock)
    token = store.add("a", b"x")
    for _ in range(2):
        clock.now += 59.9
        assert store.get("a", token) == b"x"
    clock.now += 60
    assert kept(store, "a", [token]) == [False]
    assert store.total_bytes == 0


async def test_what_nobody_asks_for_any_more_is_forgotten_by_itself() -> None:
    """Without any other call, no byte remains after expiry."""
    store = UploadStore(UploadLimits(seconds=0.05))
    store.add("a", b"x" * 1000)
    for _ in range(500):
        if store.total_bytes == 0:
            break
        await asyncio.sleep(0.01)
    assert store.total_bytes == 0


async def test_a_token_is_of_its_owner_alone() -> None:
    """Another visitor, an invented token, a removed one: not found."""
    store = UploadStore(LIMITS)
    token = store.add("a", b"x")
    assert kept(store, "b", [token]) == [False]
    assert kept(store, "a", ["", "x" * 43, token.swapcase(), token]) == [False, False, False, True]
    store.remove("b", token)
    assert kept(store, "a", [token]) == [True]
    store.remove("a", token)
    assert kept(store, "a", [token]) == [False]


async def test_uploads_under_way_are_bounded_by_visitor_and_altogether() -> None:
    """One above the limit is refused at once; completed and aborted uploads free their slots."""
    waits = asyncio.Event()

    async def decode(data: bytes, field: str, *, share: str) -> NDArray[np.uint8]:
        await waits.wait()
        return disc(8, 8)

    intake = ImageIntake(decode, UploadStore(), 1024)

    async def take(owner: str) -> None:
        with intake.place(owner):
            await intake.take(owner, b"x")

    tasks = [asyncio.create_task(take(f"{number // PER_VISITOR}")) for number in range(ALTOGETHER)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited), intake.place("0"):
        pass
    with pytest.raises(RateLimited), intake.place("another"):
        pass
    tasks[0].cancel()
    waits.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _ in range(ALTOGETHER * 2):
        with intake.place("0"):
            pass


def send(running_app: RunningApp, body: bytes, **headers: str) -> httpx.Response:
    return running_app.client.post("/ui/pictures", content=body, headers=headers)


@pytest.mark.fault(101)
def test_a_picture_comes_in_as_its_pixels_alone(running_app: RunningApp) -> None:
    """PNG, JPEG and WebP are accepted, answered with token and size, and served as PNG without appended data."""
    for kind in ("PNG", "JPEG", "WEBP"):
        answer = send(running_app, file_of(disc(64, 48), kind) + b"tail-of-the-file")
        assert (answer.status_code, answer.json()["width"], answer.json()["height"]) == (201, 64, 48)
        shown = running_app.client.get(f"/ui/pictures/{answer.json()['token']}")
        assert (shown.status_code, shown.headers["content-type"]) == (200, "image/png")
        assert shown.headers["x-content-type-options"] == "nosniff"
        assert b"tail-of-the-file" not in shown.content


@pytest.mark.fault(101)
@pytest.mark.parametrize("kind", foreign())
def test_other_kinds_of_files_are_refused_by_our_decoder(run_app: Callable[..., RunningApp], kind: str) -> None:
    """Twenty kinds, most of which Pillow would open: 415 that names the field."""
    answer = send(run_app(), foreign()[kind])
    assert (answer.status_code, answer.json()["field"]) == (415, "image_file")


@pytest.mark.fault(101)
def test_bombs_and_too_large_files_are_refused(run_app: Callable[..., RunningApp]) -> None:
    """13,000² pixels in a header: 422. A file of MAX_IMAGE_BYTES is read, with one byte more 413; no bytes: 415."""
    picture = file_of(disc())
    running_app = run_app(max_image_bytes=len(picture) + 1024)
    assert send(running_app, png_claiming(13_000, 13_000)).status_code == 422
    assert send(running_app, png_claiming(1, 16_384)).status_code == 422
    assert send(running_app, picture + bytes(1024)).status_code == 201
    assert send(running_app, picture + bytes(1025)).status_code == 413
    assert send(running_app, b"").status_code == 415
    assert send(running_app, picture[: len(picture) // 2]).status_code == 422


@pytest.mark.fault(102)
def test_uploads_count_against_the_rate(run_app: Callable[..., RunningApp]) -> None:
    """Above the rate an upload is 429 with Retry-After; so is a generation; reading does not count."""
    running_app = run_app(rate_limit="3/minute")
    tokens = [send(running_app, file_of(disc())).json()["token"] for _ in range(3)]
    refused = send(running_app, file_of(disc()))
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)
    assert running_app.draw(prompt="a red square").status_code == 429
    assert running_app.client.get(f"/ui/pictures/{tokens[0]}").status_code == 200


@pytest.mark.fault(102)
def test_settings_bound_what_is_kept_of_a_visitor(run_app: Callable[..., RunningApp]) -> None:
    """UI_UPLOADS images and no more; a new one may evict the visitor's own; nothing is written to disk."""
    running_app = run_app(ui_uploads=2)

    def sent(instead: str = "") -> str:
        answer = running_app.client.post("/ui/pictures", params={"instead": instead}, content=file_of(disc()))
        return str(answer.json()["token"])

    def statuses(*tokens: str) -> list[int]:
        return [running_app.client.get(f"/ui/pictures/{token}").status_code for token in tokens]

    first, second = sent(), sent()
    assert statuses(first, second) == [200, 200]
    third = sent(instead=first)
    assert statuses(first, second, third) == [404, 200, 200]
    sent()
    assert statuses(second, third) == [404, 200]
    assert not (running_app.folder / "data" / "studio").exists()


@pytest.mark.fault(102)
def test_a_picture_sent_with_a_key_is_of_that_key_alone(run_app: Callable[..., RunningApp]) -> None:
    """Without a key nothing is accepted; another key's visitor cannot read it; the key's own rate counts."""
    running_app = run_app(api_keys=("ann:secret-of-ann", "bob:secret-of-bob;rate=1/minute"))
    assert send(running_app, file_of(disc())).status_code == 401
    cookies = []
    for secret in ("secret-of-ann", "secret-of-bob"):
        running_app.client.cookies.clear()
        answer = running_app.client.post("/ui/key", data={"key": secret}, follow_redirects=False)
        cookies.append(answer.headers["set-cookie"].partition(";")[0])
    running_app.client.cookies.clear()
    ann, bob = cookies
    token = send(running_app, file_of(disc()), cookie=ann).json()["token"]
    shown = [running_app.client.get(f"/ui/pictures/{token}", headers={"cookie": who}).status_code for who in (ann, bob)]
    assert shown == [200, 404]
    assert [send(running_app, file_of(disc()), cookie=bob).status_code for _ in range(2)] == [201, 429]
    assert send(running_app, file_of(disc()), cookie=ann).status_code == 201
