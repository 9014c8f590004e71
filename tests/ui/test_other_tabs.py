"""Restyle, Inpaint, History and Status, in a real browser, and how the studio looks on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from browsers import Tab
from conftest import Server
from fakes import disc, file_of


def draw(tab: Tab, prompt: str) -> None:
    box = tab.page.get_by_label("Prompt", exact=True).locator("visible=true")
    box.fill(prompt)
    box.press("Enter")
    tab.told("Done in")


def chosen(tab: Tab, name: str) -> Any:
    tab.page.get_by_role("tab", name=name).click()
    return tab.page.locator("[role=tabpanel]:visible")


def test_a_result_is_handed_over_and_repainted(tab_of: Callable[..., Tab]) -> None:
    """Create, hand over, paint with the mouse, draw: green in the stroke, red elsewhere; the console is silent."""
    tab = tab_of()
    draw(tab, "a red picture")
    tab.page.get_by_role("button", name="Inpaint this one").locator("visible=true").click()
    canvas = tab.page.locator("#sds-editor canvas").first
    canvas.wait_for()
    tab.page.wait_for_timeout(1500)  # the editor lays the picture out by itself
    tab.page.locator('#sds-editor button[aria-label="Brush"]').click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.page.mouse.move(x - 30, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x + 30, y, steps=6)
    tab.page.mouse.up()
    draw(tab, "a green picture")
    pixels = (
        tab.page.locator(".sds-gallery img")
        .locator("visible=true")
        .first.evaluate(
            """async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const at = (x, y) => Array.from(context.getImageData(x, y, 1, 1).data);
            let greens = 0;
            for (let x = 0; x < canvas.width; x += 8) for (let y = 0; y < canvas.height; y += 8) {
                const [r, g] = at(x, y);
                greens += g > r;
            }
            return [at(4, 4), greens];
        }"""
        )
    )
    (red, green, *_), greens = pixels
    assert red > 150 > green
    assert greens > 0
    assert (tab.complaints, tab.asked - {""}) == ([], {"127.0.0.1"})


def test_a_file_is_restyled_by_its_edges(tab_of: Callable[..., Tab], tmp_path: Path) -> None:
    """Without a picture a sentence; with one its edges are shown, and before and after."""
    (tmp_path / "disc.png").write_bytes(file_of(disc(256, 256)))
    tab = tab_of()
    inside = chosen(tab, "Restyle")
    inside.get_by_role("button", name="Draw", exact=True).click()
    tab.told("Choose a picture")
    inside.locator("input[type=file]").first.set_input_files(tmp_path / "disc.png")
    inside.get_by_label("Keep the edges").check()
    inside.locator("img[src*='/gradio_api/file=']").nth(1).wait_for()
    draw(tab, "a yellow picture")
    tab.page.get_by_text("256 × 256, sdxl").locator("visible=true").wait_for()
    assert tab.complaints == []


def test_the_history_is_searched_told_replayed_and_deleted(tab_of: Callable[..., Tab], painted: Server) -> None:
    """Found by a word of its prompt; told as a call; drawn again alike; deleted after a second question."""
    tab = tab_of()
    draw(tab, "a blue unmistakable picture")
    inside = chosen(tab, "History")
    inside.get_by_label("Search").fill("unmistakable")
    inside.get_by_label("Search").press("Enter")
    inside.locator("button.thumbnail-item").nth(1).wait_for(state="detached")
    inside.locator("button.thumbnail-item").first.click()
    inside.get_by_text('"a blue unmistakable picture"').first.wait_for()
    assert inside.locator("#sds-address textarea, #sds-address input").input_value().startswith(f"{painted.url}/files/")
    inside.get_by_role("button", name="Draw again").click()
    tab.told("Drawn again")
    inside.get_by_role("button", name="Delete …").click()
    inside.get_by_role("button", name="Really delete it").click()
    inside.get_by_role("button", name="Really delete it").wait_for(state="hidden")
    assert tab.complaints == []


def test_a_phone_shows_all_of_it_in_one_column(tab_of: Callable[..., Tab]) -> None:
    """At 390 pixels nothing is wider than the screen, in the dark as well, and Status tells that it can draw."""
    tab = tab_of(viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True, has_touch=True)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = tab.page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert sum(int(part) for part in dark.strip("rgba()").split(",")[:3]) < 200
    draw(tab, "a red picture")
    more = tab.page.get_by_role("tab", name="Status")
    if more.count() == 0 or more.is_hidden():
        tab.page.locator(".overflow-menu button").first.click()
        tab.page.get_by_text("Status", exact=True).last.click()
    else:
        more.click()
    tab.told("It can draw")
