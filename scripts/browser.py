"""Drives the web UI of a running server in Chromium, for scripts and tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.loopback import free_port, wait_for

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TABS = ("Create", "Restyle", "Inpaint", "Edit", "Upscale", "History", "Status")
DESK = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
# Milliseconds; generous, it only ends hangs.
PATIENCE = 120_000
_STROKES, _SEEN_AFTER = 8, 6_000


@contextmanager
def starting(**settings: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Start a server process in an empty folder; yield it with an HTTP client, and end it afterwards."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(  # our own server
            [sys.executable, "-m", "stable_diffusion_server", "serve"],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PORT": str(port), "PATH": os.environ["PATH"], **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                yield process, client
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def server_at(url: str) -> Iterator[str]:
    """Yield the URL of a ready server: the given one, or one started here with the embedded models."""
    if url:
        yield url.rstrip("/")
        return
    with starting(MODELS="embedded") as (_, client):
        wait_for(client)
        yield str(client.base_url).rstrip("/")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a headless browser."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield browser
        browser.close()


def studio(browser: Any, server: str, **look: Any) -> Any:
    """Open the UI in a new browser context and wait until its fields are filled."""
    page = browser.new_context(**look).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{server}/ui/")
    settle(page)
    return page


def settle(page: Any) -> None:
    """Wait until the model field has its options; they are requested last."""
    from playwright.sync_api import expect

    expect(page.locator("#sds-create-model input")).to_have_value(re.compile(r"\(.+\)"))


def open_tab(page: Any, name: str) -> Any:
    """Open a tab and return its panel."""
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()
    inside = page.locator("[role=tabpanel]:visible")
    inside.wait_for()
    return inside


def draw(inside: Any, prompt: str) -> None:
    """Enter a prompt, press Enter, and wait for the images."""
    ask(inside, prompt)
    inside.locator(".sds-message", has_text=re.compile(r"^(Done in|All \d pictures are done)")).wait_for()
    inside.locator(".sds-gallery img").first.wait_for()


def ask(inside: Any, prompt: str) -> None:
    """Enter a prompt and press Enter."""
    box = inside.get_by_label("Prompt", exact=True)
    box.fill(prompt)
    box.press("Enter")


def paint(page: Any) -> None:
    """Draw a stroke across the image in the Inpaint tab, and repeat it until the mask preview appears.

    The editor lays its image out without an event, and strokes before that are lost.
    """
    from playwright.sync_api import TimeoutError as Late

    canvas = page.locator("#sds-inpaint-image_file canvas").first
    canvas.wait_for()
    seen = page.get_by_text("Mask: the striped part is replaced")
    for _ in range(_STROKES):
        _stroke(page, canvas)
        try:
            seen.wait_for(timeout=_SEEN_AFTER)
        except Late:
            continue
        return
    raise AssertionError("no stroke became a mask")


def _stroke(page: Any, canvas: Any) -> None:
    page.wait_for_timeout(1000)
    page.locator('#sds-inpaint-image_file button[aria-label="Brush"]').click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=8)
    page.mouse.up()
