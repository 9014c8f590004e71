"""The Create tab with the embedded models, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from browsers import Tab
from conftest import Server
from fakes import until
from playwright.sync_api import expect

from scripts.browser import ask, draw, settle

pytestmark = pytest.mark.slow

RED = "a red circle on a blue background"


def fill_more(inside: Any, steps: str) -> None:
    """Set the number of steps, which is in the advanced section."""
    field = inside.get_by_label("Steps", exact=True)
    if field.is_hidden():
        inside.get_by_role("button", name="More").click()
    field.fill(steps)


def fill_count(inside: Any, count: int) -> None:
    box = inside.get_by_label("number input for How many")
    box.fill(str(count))
    box.press("Tab")


def jobs_of(server: Server) -> list[dict[str, Any]]:
    """The latest jobs, newest first."""
    jobs: list[dict[str, Any]] = httpx.get(f"{server.url}/jobs").json()["jobs"]
    return jobs


def figure(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " "))


def test_enter_draws_and_nobody_else_is_asked(tab_of: Callable[..., Tab]) -> None:
    """An example becomes the prompt; progress appears, then the image: red inside, blue around."""
    tab = tab_of()
    tab.inside.get_by_role("button", name=RED, exact=True).click()
    expect(tab.inside.get_by_label("Prompt", exact=True)).to_have_value(RED)
    fill_more(tab.inside, "60")
    ask(tab.inside, RED)
    tab.reported("of 60")
    tab.reported("Done in")
    tab.inside.get_by_text(re.compile(r"\d+ × \d+, sdxl, 60 steps")).wait_for()
    picture = tab.picture
    (middle, around) = picture[len(picture) // 2, len(picture) // 2], picture[4, 4]
    assert middle[0] > 150 > middle[2]
    assert around[2] > 150 > around[0]
    tab.was_quiet()


def test_several_pictures_have_a_seed_each(tab_of: Callable[..., Tab]) -> None:
    """Three images in one click with a fixed seed: seeds n, n+1 and n+2 are shown below them."""
    tab = tab_of()
    fill_count(tab.inside, 3)
    tab.inside.get_by_label("Seed", exact=True).fill("7")
    tab.inside.get_by_label("Keep this seed").check()
    draw(tab.inside, "a yellow star on a purple background")
    expect(tab.inside.locator(".sds-gallery .caption-label")).to_have_text(["seed 7", "seed 8", "seed 9"])
    tab.was_quiet()


def test_cancel_frees_the_device(tab_of: Callable[..., Tab], studio_server: Server) -> None:
    """During generation: the page says so, every job ends early, the device is idle, and the next request works."""
    tab = tab_of()
    fill_more(tab.inside, "100")
    fill_count(tab.inside, 4)
    ask(tab.inside, RED)
    tab.reported("of 100")
    tab.inside.get_by_role("button", name="Cancel").click()
    tab.reported("4 cancelled")
    ended = jobs_of(studio_server)[:4]
    assert [job["state"] for job in ended] == ["cancelled"] * 4
    assert max(job["step"] or 0 for job in ended) < 100
    until(lambda: figure(studio_server, "sds_queue_running") + figure(studio_server, "sds_queue_waiting") == 0)
    fill_more(tab.inside, "4")
    fill_count(tab.inside, 1)
    draw(tab.inside, RED)
    tab.was_quiet()


def test_what_is_wrong_is_shown_beside_its_field(tab_of: Callable[..., Tab]) -> None:
    """Two errors, one in a collapsed section.

    Each message is at its field and reaches screen readers, then disappears.
    """
    tab = tab_of()
    fill_more(tab.inside, "9000")
    tab.inside.get_by_role("button", name="More").click()
    tab.inside.get_by_label("Width").fill("9000")
    ask(tab.inside, RED)
    for name, label, words in (("width", "Width", "2048"), ("num_inference_steps", "Steps", "150")):
        fault = tab.page.locator(f"#sds-fault-create-{name}")
        fault.wait_for()
        assert fault.inner_text().startswith(label)
        assert words in fault.inner_text()
        box = tab.page.locator(f"#sds-create-{name} input, #sds-create-{name} textarea").first
        expect(box).to_have_attribute("aria-describedby", f"sds-fault-create-{name}")
        expect(box).to_have_attribute("aria-invalid", "true")
        below = fault.bounding_box()["y"] - box.bounding_box()["y"]
        assert 0 < below < 150
    tab.reported("Not drawn. Have a look at Width and Steps.")
    tab.inside.get_by_label("Width").fill("256")
    fill_more(tab.inside, "4")
    draw(tab.inside, RED)
    expect(tab.page.locator(".sds-fault p")).to_have_count(0)
    expect(tab.page.locator("[aria-invalid=true]")).to_have_count(0)
    tab.was_quiet()


def test_a_page_that_is_loaded_again_goes_on(tab_of: Callable[..., Tab], studio_server: Server) -> None:
    """The page follows its running jobs to their ends, and submits them only once."""
    tab = tab_of()
    fill_more(tab.inside, "100")
    fill_count(tab.inside, 4)
    ask(tab.inside, "a green circle on a white background")
    tab.reported("of 100")
    before = [job["id"] for job in jobs_of(studio_server)]
    tab.was_quiet()
    tab.page.reload()
    settle(tab.page)
    tab.complaints.clear()  # the unloaded page reported its aborted connections
    tab.reported("of 4 pictures")
    tab.reported("All 4 pictures are done")
    expect(tab.inside.locator(".sds-gallery img")).to_have_count(4)
    assert [job["id"] for job in jobs_of(studio_server)] == before
    tab.was_quiet()
