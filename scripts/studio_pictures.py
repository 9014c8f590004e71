"""Uses the studio of a running server with the embedded models, and takes the pictures of docs/ of every tab.

python -m scripts.studio_pictures --server http://127.0.0.1:8000 --out docs

Light and dark on a desk, and light on a phone. Start the server in an empty folder.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from scripts.visiting import DESK, PHONE, TABS, chromium, draw, open_tab, paint, studio

LOOKS = {
    "light": {**DESK, "color_scheme": "light"},
    "dark": {**DESK, "color_scheme": "dark"},
    "phone": {**PHONE, "color_scheme": "light"},
}
PROMPTS = (
    "a red circle on a blue background",
    "a large yellow star on a purple background",
    "a pink heart above a blue square on a black background",
    "a white cross on a brown background",
)


def main() -> None:
    """Draw something for the history, then use each tab in each look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    for number, prompt in enumerate(PROMPTS):
        order = {"prompt": prompt, "width": 256, "height": 256, "seed": number, "model": ("sdxl", "flux")[number % 2]}
        httpx.post(f"{given.server}/create_and_upload_image", json=order, timeout=120).raise_for_status()
    with chromium() as browser:
        for look, options in LOOKS.items():
            page = studio(browser, given.server, **options)
            for tab in TABS:
                open_tab(page, tab)
                USES[tab](page)
                page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
                page.wait_for_timeout(800)
                save(page, given.out / f"studio-{tab.lower()}-{look}.webp")
            page.context.close()


def save(page: Any, path: Path) -> None:
    """What is seen of a page, in as few bytes as its texts can be read in."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=page.viewport_size["width"] < 500)))
    picture.convert("RGB").save(path, quality=55, method=6)


def create(page: Any) -> None:
    """Four pictures, and the seed kept."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.get_by_label("number input for How many").fill("4")
    inside.get_by_label("number input for How many").press("Tab")
    draw(inside, PROMPTS[0])


def restyle(page: Any) -> None:
    """The picture taken along from Create, drawn anew by its edges."""
    open_tab(page, "Create").get_by_role("button", name="Restyle this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-restyle-image_file"))
    inside.locator("#sds-restyle-image_file img").first.wait_for()
    inside.get_by_label("Keep the edges").check()
    draw(inside, "a green circle on a yellow background")
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def inpaint(page: Any) -> None:
    """The picture taken along from Create, painted over and drawn anew there."""
    open_tab(page, "Create").get_by_role("button", name="Inpaint this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-inpaint-image_file"))
    inside.wait_for()
    paint(page)
    draw(inside, "a green square on a blue background")
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def history(page: Any) -> None:
    """The newest picture chosen."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.locator("button.thumbnail-item").first.click()
    inside.locator(".sds-picture img").wait_for()


def status(page: Any) -> None:
    """As it is."""
    page.locator(".sds-standing").wait_for()


USES: dict[str, Callable[[Any], None]] = {
    "Create": create,
    "Restyle": restyle,
    "Inpaint": inpaint,
    "History": history,
    "Status": status,
}

if __name__ == "__main__":
    main()
