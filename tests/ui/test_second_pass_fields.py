"""Second passes, the sampler's fields, outpainting and the Upscale tab with the embedded models, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsers import Tab
from conftest import Server
from fakes import disc, file_of
from playwright.sync_api import expect

from scripts.browser import draw

pytestmark = pytest.mark.slow

RED = "a red circle on a blue background"


def last_record(server: Server) -> dict[str, Any]:
    """How the newest picture of the history was made."""
    picture = httpx.get(f"{server.url}/history").json()["pictures"][0]
    record: dict[str, Any] = httpx.get(f"{server.url}/files/{picture['key']}?record=1").json()
    return record.get("record", record)


def set_number(tab: Tab, label: str, value: str) -> None:
    box = tab.inside.get_by_label(f"number input for {label}", exact=True)
    box.fill(value)
    box.press("Tab")


def test_a_picture_is_drawn_twice_by_the_fields_of_create(tab_of: Callable[..., Tab], studio_server: Server) -> None:
    """Enlarged by 2 through latents, with a sampler and a spacing; a wrong upscaler is named at its field."""
    tab = tab_of()
    tab.inside.get_by_label("Width").fill("128")
    tab.inside.get_by_label("Height").fill("128")
    tab.inside.get_by_role("button", name="Sampler, styles, tiling").click()
    for label, choice in (("Sampler", "dpm_2m"), ("Spacing of the steps", "karras")):
        tab.inside.get_by_label(label, exact=True).click()
        tab.page.get_by_role("option", name=choice, exact=True).click()
    tab.inside.get_by_role("button", name="Second pass (hires fix)").click()
    set_number(tab, "Enlarge by", "2")
    upscaler = tab.inside.get_by_label("Second pass upscaler", exact=True)
    upscaler.fill("none such")
    upscaler.press("Enter")
    tab.inside.get_by_label("Prompt", exact=True).fill(RED)
    tab.inside.get_by_role("button", name="Draw", exact=True).click()
    tab.page.locator("#sds-fault-create-hires_upscaler").wait_for()
    upscaler.fill("latent")
    upscaler.press("Enter")
    draw(tab.inside, RED)
    assert tab.picture.shape == (256, 256, 3)
    record = last_record(studio_server)
    assert (record["scheduler"], record["sampling"]) == ("dpm_2m", [["schedule", "karras"]])
    assert (record["hires"]["upscaler"], record["hires"]["to"]) == ("latent", [256, 256])


def test_a_picture_is_extended_without_a_mask(tab_of: Callable[..., Tab], tmp_path: Path) -> None:
    """64 pixels on the right, the rest as it was; without sides and mask the field of the mask is named."""
    (tmp_path / "disc.png").write_bytes(file_of(disc(192, 128)))
    tab = tab_of()
    inside = tab.open("Inpaint")
    inside.locator("input[type=file]").first.set_input_files(tmp_path / "disc.png")
    inside.locator(".sds-stage img").wait_for()
    inside.get_by_role("button", name="Draw", exact=True).click()
    tab.page.locator("#sds-fault-inpaint-mask_file").wait_for()
    inside.get_by_role("button", name="Extend the picture, soft mask").click()
    set_number(tab, "Right", "64")
    draw(inside, "a red circle on a blue background")
    assert tab.picture.shape == (128, 256, 3)


def test_a_picture_is_enlarged_with_a_link_to_its_file(tab_of: Callable[..., Tab], tmp_path: Path) -> None:
    """By the embedded upscaler and 3; an unknown upscaler is told in a sentence."""
    (tmp_path / "disc.png").write_bytes(file_of(disc(60, 40)))
    tab = tab_of()
    inside = tab.open("Upscale")
    inside.get_by_role("button", name="Enlarge", exact=True).click()
    inside.get_by_text("Choose a picture first.").wait_for()
    inside.locator("input[type=file]").first.set_input_files(tmp_path / "disc.png")
    inside.locator(".sds-stage img").wait_for()
    set_number(tab, "Scale", "3")
    inside.get_by_role("button", name="Enlarge", exact=True).click()
    inside.get_by_text("180 × 120 pixels, embedded-2x").wait_for()
    link = inside.locator(".sds-enlarged a").get_attribute("href") or ""
    assert httpx.get(link).headers["content-type"].startswith("image/")
    upscaler = inside.get_by_label("Upscaler", exact=True)
    upscaler.fill("none such")
    upscaler.press("Enter")
    inside.get_by_role("button", name="Enlarge", exact=True).click()
    inside.get_by_text(re.compile("is not an upscaler here")).wait_for()
    expect(inside.locator(".sds-enlarged")).to_have_count(0)
