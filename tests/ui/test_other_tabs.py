"""Restyle, Inpaint, History and Status with the embedded models, in a real browser, and the UI on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from browsers import Tab
from conftest import Server
from fakes import disc, file_of
from playwright.sync_api import expect

from scripts.browser import PHONE, TABS, draw, paint

pytestmark = pytest.mark.slow

RED = "a red circle on a blue background"


def test_a_result_is_handed_over_and_repainted(tab_of: Callable[..., Tab]) -> None:
    """Create, hand over, paint with the mouse, generate: green in the stroke, blue around as before.

    Before and after.
    """
    tab = tab_of()
    tab.open("Inpaint")  # its editor was open and empty before
    draw(tab.open("Create"), RED)
    before = tab.picture
    tab.inside.get_by_role("button", name="Inpaint this one").click()
    tab.page.locator("#sds-inpaint-image_file").wait_for()
    tab.inside.get_by_role("button", name="Draw", exact=True).click()
    tab.page.locator("#sds-fault-inpaint-mask_file").wait_for()
    paint(tab.page)
    draw(tab.inside, "a green square on a blue background")
    after = tab.picture
    assert after.shape == before.shape
    greens = (after[..., 1] > after[..., 0] + 40) & (after[..., 1] > after[..., 2] + 40)
    middle = greens[greens.shape[0] * 2 // 5 : greens.shape[0] * 3 // 5]
    assert middle.sum() > 0.5 * greens.sum() > 200
    # The file is a lossy WebP, so equal pixels come back only nearly equal.
    assert abs(after[: len(after) // 4] - before[: len(before) // 4]).mean() < 4
    expect(tab.page.locator("#sds-fault-inpaint-mask_file")).to_have_count(0)
    tab.inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()
    tab.was_quiet()


def test_a_file_is_restyled_by_its_edges(tab_of: Callable[..., Tab], tmp_path: Path) -> None:
    """Without an image a message at its field; with one its edges are shown, and yellow replaces blue."""
    (tmp_path / "disc.png").write_bytes(file_of(disc(256, 256)))
    tab = tab_of()
    inside = tab.open("Restyle")
    inside.get_by_role("button", name="Draw", exact=True).click()
    fault = tab.page.locator("#sds-fault-restyle-image_file")
    fault.wait_for()
    assert "Choose a picture" in fault.inner_text()
    inside.locator("input[type=file]").first.set_input_files(tmp_path / "disc.png")
    inside.get_by_label("Keep the edges").check()
    inside.get_by_role("img", name="Edges").wait_for()
    draw(inside, "a green circle on a yellow background")
    inside.get_by_text("256 × 256, sdxl").wait_for()
    inside.get_by_text("Before and after").wait_for()
    around = tab.picture[8, 8]
    assert min(around[0], around[1]) > around[2] + 60
    tab.was_quiet()


@pytest.fixture
def two_drawn(studio_server: Server) -> Server:
    """One image per model, with a common word in the prompts."""
    for model in ("sdxl", "flux"):
        order = {"prompt": f"a blue unmistakable circle, {model}", "width": 128, "height": 128, "model": model}
        httpx.post(f"{studio_server.url}/create_and_upload_image", json=order, timeout=120).raise_for_status()
    return studio_server


def test_the_history_is_searched_filtered_shown_replayed_and_deleted(
    tab_of: Callable[..., Tab], two_drawn: Server
) -> None:
    """The word finds two, the model filter one.

    It is shown as code, reproduced, handed to Create, deleted on request.
    """
    tab = tab_of()
    inside = tab.open("History")
    found = inside.locator("button.thumbnail-item")
    inside.get_by_label("Search").fill("unmistakable")
    expect(found).to_have_count(2)
    inside.get_by_label("Model", exact=True).click()
    tab.page.get_by_role("option", name="flux").click()
    expect(found).to_have_count(1)
    found.first.click()
    address = inside.locator("#sds-address textarea, #sds-address input")
    expect(address).to_have_value(f"{two_drawn.url}/files/{keys_of(two_drawn)[0]}")
    inside.get_by_text("a blue unmistakable circle, flux").first.wait_for()
    inside.get_by_role("button", name="As a call, to copy").click()
    expect(inside.locator("#sds-curl")).to_contain_text("a blue unmistakable circle, flux")
    inside.get_by_role("button", name="Draw again").click()
    tab.reported("Drawn again: equal bit for bit.")
    inside.get_by_role("button", name="Use its settings").click()
    prompt = tab.page.locator("#sds-create-prompt textarea, #sds-create-prompt input").first
    expect(prompt).to_have_value("a blue unmistakable circle, flux")
    inside = tab.open("History")
    expect(found).to_have_count(2)  # the reproduction is stored in addition
    again, first = keys_of(two_drawn)
    found.first.click()
    expect(address).to_have_value(f"{two_drawn.url}/files/{again}")
    inside.get_by_role("button", name="Delete …").click()
    inside.get_by_role("button", name="Really delete it").click()
    tab.reported("Deleted.")
    expect(found).to_have_count(1)
    assert keys_of(two_drawn) == [first]
    tab.was_quiet()


def keys_of(server: Server) -> list[str]:
    """Keys of Flux images with these tests' prompts."""
    asked = {"q": "unmistakable", "model": "flux"}
    pictures = httpx.get(f"{server.url}/history", params=asked).json()["pictures"]
    return [picture["key"] for picture in pictures]


def test_status_tells_what_draws_and_what_waits(tab_of: Callable[..., Tab]) -> None:
    """Readiness, both models with their placement, the queue, and the server's memory."""
    tab = tab_of()
    inside = tab.open("Status")
    tab.reported("It can draw")
    for text in ("sdxl (draws where none is named)", "flux", "On the device", "Waiting", "Memory of the server"):
        inside.get_by_text(text, exact=True).first.wait_for()
    assert inside.get_by_text("resident", exact=True).count() == 2
    tab.was_quiet()


def test_a_phone_shows_all_of_it_in_one_column(tab_of: Callable[..., Tab]) -> None:
    """At 390 pixels no tab is wider than the screen, also in dark mode, and an image is generated and shown."""
    tab = tab_of(**PHONE, color_scheme="dark")
    dark = tab.page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert sum(int(part) for part in dark.strip("rgba()").split(",")[:3]) < 200
    draw(tab.inside, RED)
    assert tab.inside.locator(".sds-gallery img").first.bounding_box()["width"] > 120
    for name in TABS:
        tab.open(name)
        assert (name, tab.page.evaluate("document.documentElement.scrollWidth <= 390")) == (name, True)
    tab.reported("It can draw")
    tab.was_quiet()


def test_a_control_image_is_previewed_and_guides_the_picture(tab_of: Callable[..., Tab], tmp_path: Path) -> None:
    """Without a picture a message; with one its edges are shown, and the request has the unit."""
    (tmp_path / "disc.png").write_bytes(file_of(disc(256, 256)))
    tab = tab_of()
    inside = tab.open("Create")
    inside.get_by_role("button", name="Control images").click()
    preview = inside.get_by_role("button", name="Preview").first
    preview.click()
    inside.get_by_text("Choose a picture first.").wait_for()
    inside.locator("#sds-create-controls-0-image input[type=file]").set_input_files(tmp_path / "disc.png")
    inside.get_by_label("It shows").first.click()
    tab.page.get_by_role("option", name="Edges (canny)").click()
    preview.click()
    inside.get_by_role("img", name="Control image 1").wait_for()
    draw(inside, "a green circle on a yellow background")
    tab.was_quiet()
