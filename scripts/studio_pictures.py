"""Takes the screenshots of the web UI for docs/, using every tab with the embedded models.

python -m scripts.studio_pictures

Desktop light and dark, phone light. Without --server the script starts a server in an empty folder.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from scripts.browser import DESK, PHONE, TABS, chromium, draw, open_tab, paint, server_at, studio


@dataclass(frozen=True, slots=True)
class Look:
    """Browser options and the prompts for Create, Restyle and Inpaint."""

    options: Mapping[str, Any]
    drawn: str
    restyled: str
    repainted: str


LOOKS = {
    "light": Look(
        {**DESK, "color_scheme": "light"},
        "a red circle on a blue background",
        "a green circle on a yellow background",
        "a green square on a blue background",
    ),
    "dark": Look(
        {**DESK, "color_scheme": "dark"},
        "a yellow star on a purple background",
        "a pink star on a black background",
        "a blue circle on a purple background",
    ),
    "phone": Look(
        {**PHONE, "color_scheme": "light"},
        "an orange square on a cyan background",
        "a purple square on a white background",
        "a red circle on a cyan background",
    ),
}
PROMPTS = (
    "a large yellow star on a purple background",
    "a pink heart above a blue square on a black background",
    "a white cross on a brown background",
)


def main() -> None:
    """Generate images for the history, then use each tab in each look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="its address; without it one is started")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    with server_at(given.server) as server, chromium() as browser:
        for number, prompt in enumerate(PROMPTS):
            request = {
                "prompt": prompt,
                "width": 256,
                "height": 256,
                "seed": number,
                "model": ("sdxl", "flux")[number % 2],
            }
            httpx.post(f"{server}/create_and_upload_image", json=request, timeout=120).raise_for_status()
        for name, look in LOOKS.items():
            page = studio(browser, server, **look.options)
            for tab in TABS:
                open_tab(page, tab)
                USES[tab](page, look)
                page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
                page.wait_for_timeout(800)
                save(page, given.out / f"studio-{tab.lower()}-{name}.webp")
            page.context.close()


def save(page: Any, path: Path) -> None:
    """Save a screenshot as a small WebP file with readable text."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=page.viewport_size["width"] < 500)))
    picture.convert("RGB").save(path, quality=55, method=6)


def create(page: Any, look: Look) -> None:
    """Generate four images."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.get_by_label("number input for How many").fill("4")
    inside.get_by_label("number input for How many").press("Tab")
    draw(inside, look.drawn)


def restyle(page: Any, look: Look) -> None:
    """Restyle the image from Create, following its edges."""
    open_tab(page, "Create").get_by_role("button", name="Restyle this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-restyle-image_file"))
    inside.locator("#sds-restyle-image_file img").first.wait_for()
    inside.get_by_label("Keep the edges").check()
    draw(inside, look.restyled)
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def inpaint(page: Any, look: Look) -> None:
    """Inpaint a stroke in the image from Create."""
    open_tab(page, "Create").get_by_role("button", name="Inpaint this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-inpaint-image_file"))
    inside.wait_for()
    paint(page)
    draw(inside, look.repainted)
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def edit(page: Any, look: Look) -> None:
    """Take the image from Create and the repainted one along; the embedded models do not edit, which the page says."""
    for number, source in enumerate(("Create", "Inpaint"), 1):
        open_tab(page, source).get_by_role("button", name="Edit this one").click()
        page.locator("#sds-edit-image_file li").nth(number - 1).wait_for()
    page.locator("[role=tabpanel]:visible").get_by_label("Prompt", exact=True).fill(
        "put the shape of 2 beside that of 1"
    )


def history(page: Any, look: Look) -> None:
    """Select the newest image."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.locator("button.thumbnail-item").first.click()
    inside.locator(".sds-picture img").wait_for()


def status(page: Any, look: Look) -> None:
    """Wait for the status."""
    page.locator(".sds-standing").wait_for()


USES: dict[str, Callable[[Any, Look], None]] = {
    "Create": create,
    "Restyle": restyle,
    "Inpaint": inpaint,
    "Edit": edit,
    "History": history,
    "Status": status,
}

if __name__ == "__main__":
    main()
