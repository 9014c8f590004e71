"""Runs every preprocessor that needs no model over one picture of the embedded models' world, into one image.

python -m scripts.control_sheet --out docs/control-images.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from stable_diffusion_server.imaging import PREPROCESSORS, draw_control
from training.captions import draw_landscape
from training.synthetic_landscapes import render

WIDTH, HEIGHT, CAPTION, GAP, COLUMNS = 224, 168, 14, 4, 5
# The seed of a picture with thin, straight and round shapes, bright and dark ones.
SEED = 21
# Where the default changes nothing.
OPTIONS = {"tile_resample": {"down_sampling_rate": 8.0}, "recolor_luminance": {"gamma": 1.0}}


def main() -> None:
    """Draw the control images and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    picture = render(draw_landscape(rng), 2 * WIDTH, 2 * HEIGHT, rng)
    cells = [("the picture", picture)]
    for row in PREPROCESSORS.values():
        if row.draw is not None:
            values = row.values(OPTIONS.get(row.name, {}), row.name)
            cells.append((row.name, draw_control(row, picture, values, row.name)))
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + GAP) - GAP, rows * (HEIGHT + CAPTION)), "white")
    for number, (name, pixels) in enumerate(cells):
        left, top = number % COLUMNS * (WIDTH + GAP), number // COLUMNS * (HEIGHT + CAPTION)
        sheet.paste(Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS), (left, top))
        ImageDraw.Draw(sheet).text((left, top + HEIGHT), name, fill="black", font_size=11)
    sheet.quantize(256).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
