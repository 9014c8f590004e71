"""Opens the studio of a running server in Debian's Chromium and goes from tab to tab, for scripts and tests alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TABS = ("Create", "Restyle", "Inpaint", "History", "Status")
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
_PATIENCE = 60_000


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield browser
        browser.close()


def studio(browser: Any, server: str, **look: Any) -> Any:
    """A page of its own with the studio, laid out."""
    page = browser.new_context(**look).new_page()
    page.set_default_timeout(_PATIENCE)
    page.goto(f"{server}/ui/")
    page.get_by_label("Prompt", exact=True).first.wait_for()
    page.wait_for_timeout(1500)  # it asks what the server has to offer, and listens for ever
    return page


def open_tab(page: Any, name: str) -> Any:
    """Go to a tab; what is in it."""
    page.get_by_role("tab", name=name, exact=True).click()
    inside = page.locator("[role=tabpanel]:visible")
    inside.wait_for()
    return inside


def draw(inside: Any, prompt: str) -> None:
    """Write a prompt into a tab, press Enter, and wait for what comes of it."""
    box = inside.get_by_label("Prompt", exact=True)
    box.fill(prompt)
    box.press("Enter")
    inside.page.locator(".sds-told:visible", has_text="one").first.wait_for()
    inside.locator(".sds-gallery img").first.wait_for()


def paint(page: Any) -> None:
    """Draw a stroke across the middle of Inpaint's picture with the mouse."""
    canvas = page.locator("#sds-inpaint-image_file canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)  # the editor lays the picture out by itself, and says nothing of it
    page.locator('#sds-inpaint-image_file button[aria-label="Brush"]').click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=8)
    page.mouse.up()
