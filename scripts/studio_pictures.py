"""Uses the studio of a running server with the embedded models, and takes the pictures of docs/ of every tab.

python -m scripts.studio_pictures

Light and dark on a desk, and light on a phone. It starts a server in an empty folder, unless one is named by --server.
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

from scripts.visiting import DESK, PHONE, TABS, chromium, draw, open_tab, paint, server_at, studio


@dataclass(frozen=True, slots=True)
class Look:
    """How the studio is looked at, and what is drawn, restyled and repainted there."""

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
    """Draw something for the history, then use each tab in each look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="its address; without it one is started")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    with server_at(given.server) as server, chromium() as browser:
        for number, prompt in enumerate(PROMPTS):
            order = {
                "prompt": prompt,
                "width": 256,
                "height": 256,
                "seed": number,
                "model": ("sdxl", "flux")[number % 2],
            }
            httpx.post(f"{server}/create_and_upload_image", json=order, timeout=120).raise_for_status()
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
    """What is seen of a page, in as few bytes as its texts can be read in."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=page.viewport_size["width"] < 500)))
    picture.convert("RGB").save(path, quality=55, method=6)


def create(page: Any, look: Look) -> None:
    """Four pictures, and the seed kept."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.get_by_label("number input for How many").fill("4")
    inside.get_by_label("number input for How many").press("Tab")
    draw(inside, look.drawn)


def restyle(page: Any, look: Look) -> None:
    """The picture taken along from Create, drawn anew by its edges."""
    open_tab(page, "Create").get_by_role("button", name="Restyle this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-restyle-image_file"))
    inside.locator("#sds-restyle-image_file img").first.wait_for()
    inside.get_by_label("Keep the edges").check()
    draw(inside, look.restyled)
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def inpaint(page: Any, look: Look) -> None:
    """The picture taken along from Create, painted over and drawn anew there."""
    open_tab(page, "Create").get_by_role("button", name="Inpaint this one").click()
    inside = page.locator("[role=tabpanel]:visible", has=page.locator("#sds-inpaint-image_file"))
    inside.wait_for()
    paint(page)
    draw(inside, look.repainted)
    inside.get_by_text("Before and after").locator("xpath=..").locator("img").first.wait_for()


def history(page: Any, look: Look) -> None:
    """The newest picture chosen."""
    inside = page.locator("[role=tabpanel]:visible")
    inside.locator("button.thumbnail-item").first.click()
    inside.locator(".sds-picture img").wait_for()


def status(page: Any, look: Look) -> None:
    """As it is."""
    page.locator(".sds-standing").wait_for()


USES: dict[str, Callable[[Any, Look], None]] = {
    "Create": create,
    "Restyle": restyle,
    "Inpaint": inpaint,
    "History": history,
    "Status": status,
}

if __name__ == "__main__":
    main()
