"""The Create tab, in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from browsers import Tab
from conftest import Server

RED = "a red circle on a blue background"


def draw(tab: Tab, prompt: str, steps: int = 4) -> None:
    if tab.page.get_by_label("Steps").first.is_hidden():
        tab.page.get_by_role("button", name="More").first.click()
    tab.page.get_by_label("Steps", exact=True).first.fill(str(steps))
    tab.page.get_by_label("Prompt", exact=True).first.fill(prompt)
    tab.page.get_by_label("Prompt", exact=True).first.press("Enter")


def job_of(painted: Server) -> dict[str, object]:
    """The latest job."""
    job: dict[str, object] = httpx.get(f"{painted.url}/jobs").json()["jobs"][0]
    return job


def test_enter_draws_and_nobody_else_is_asked(tab_of: Callable[..., Tab]) -> None:
    """Steps are told, then a picture is there with how it was made; no console error, and no request elsewhere."""
    tab = tab_of()
    tab.page.get_by_role("button", name=RED, exact=True).click()
    from playwright.sync_api import expect

    expect(tab.page.get_by_label("Prompt", exact=True).first).to_have_value(RED)
    draw(tab, RED, steps=60)
    tab.told("of 60")
    tab.told("Done in")
    picture = tab.page.locator(".sds-gallery img").first
    picture.wait_for()
    assert "/files/" in picture.get_attribute("src")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    seed = tab.page.get_by_label("Seed", exact=True).first.input_value()
    tab.page.get_by_text(f"512 × 512, sdxl, seed {seed}, 60 steps").wait_for()
    assert (tab.complaints, tab.asked - {""}) == ([], {"127.0.0.1"})


def test_cancel_frees_the_device(tab_of: Callable[..., Tab], painted: Server) -> None:
    """In mid-draw: the page says so, the job has ended, and the next picture does not wait for it."""
    tab = tab_of()
    draw(tab, RED, steps=100)
    tab.told("of 100")
    tab.page.get_by_role("button", name="Cancel").first.click()
    tab.told("Cancelled")
    assert (job_of(painted)["state"], int(str(job_of(painted)["step"])) < 100) == ("cancelled", True)
    draw(tab, RED, steps=4)
    tab.told("Done in")


def test_what_is_wrong_is_told_by_the_fields_name(tab_of: Callable[..., Tab]) -> None:
    """A side beyond the limit: a sentence that names it, in an alert; the button can be pressed again."""
    tab = tab_of()
    tab.page.get_by_label("Width").fill("9000")
    draw(tab, RED)
    told = tab.page.get_by_role("alert").filter(has_text="2048")
    told.wait_for()
    assert told.inner_text().startswith("Width")
    assert tab.page.get_by_role("button", name="Draw", exact=True).is_enabled()


def test_a_page_that_is_loaded_again_goes_on(tab_of: Callable[..., Tab], painted: Server) -> None:
    """The job under way is followed to its end, and was asked for once."""
    tab = tab_of()
    draw(tab, "a green circle", steps=100)
    tab.told("of 100")
    before = job_of(painted)["id"]
    tab.page.reload()
    tab.told("of 100")
    tab.told("Done in")
    assert job_of(painted)["id"] == before
