"""Generates sixteen prompts with one model of a server and puts them into one image.

python scripts/contact_sheet.py --model sdxl --out docs/contact-sheet-sdxl.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import httpx
from PIL import Image, ImageDraw

PROMPTS = [
    "a red circle on a blue background",
    "a green star on a yellow background",
    "a purple heart on a white background",
    "an orange hexagon on a black background",
    "a white square on a green background",
    "a pink diamond on a gray background",
    "a cyan cross on a brown background",
    "a yellow triangle on a purple background",
    "a small blue circle in the top left corner on a white background",
    "a large red heart on a pink background",
    "two green squares on a black background",
    "three yellow stars on a blue background",
    "a red circle above a blue square on a white background",
    "a green triangle left of an orange circle on a black background",
    "a brown cross on a cyan background",
    "A BLACK HEART ON A RED BACKGROUND!",
]
SIDE, CAPTION, COLUMNS = 192, 30, 4


def main() -> None:
    """Generate each prompt and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = -(-len(PROMPTS) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    for place, prompt in enumerate(PROMPTS):
        asked = {"prompt": prompt, "model": given.model, "width": 256, "height": 256, "format": "png"}
        answer = httpx.get(f"{given.server}/make_image", params=asked, timeout=120).raise_for_status()
        picture = Image.open(io.BytesIO(answer.content)).resize((SIDE - 4, SIDE - 4))
        left, top = place % COLUMNS * SIDE, place // COLUMNS * (SIDE + CAPTION)
        sheet.paste(picture, (left + 2, top + 2))
        half = prompt.rfind(" ", 0, 32) if len(prompt) > 32 else len(prompt)
        text = f"{prompt[:half]}\n{prompt[half:].strip()}"
        ImageDraw.Draw(sheet).multiline_text((left + 4, top + SIDE), text, fill="black", font_size=10, spacing=1)
    sheet.quantize(128).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
