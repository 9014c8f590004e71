"""Runs every task with every model of a server and puts inputs and outputs into one image.

python -m scripts.task_sheet --out docs/tasks.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from PIL import Image, ImageDraw

from training.synthetic_shapes import Picture, Scene, Thing, edges, render

SIDE, CAPTION, GAP = 160, 26, 4
STYLE, INPAINT = "style_transfer_bytes_and_upload_image", "inpaint_and_upload_image"


def main() -> None:
    """Generate the images and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for model in httpx.get(f"{given.server}/readyz").json()["models"]:
        rows += [row for row in cases(model["follows_edges"], given.server, model["name"]) if row]
    width = max(sum(SIDE + GAP for _ in row) for row in rows)
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + CAPTION)), "white")
    for number, row in enumerate(rows):
        for place, (caption, picture) in enumerate(row):
            left, top = place * (SIDE + GAP), number * (SIDE + CAPTION)
            sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE)), (left, top))
            ImageDraw.Draw(sheet).multiline_text((left, top + SIDE), caption, fill="black", font_size=9, spacing=1)
    sheet.quantize(128).save(given.out, optimize=True)


def cases(edges_followed: bool, server: str, model: str) -> list[list[tuple[str, Picture]]]:
    """The rows of one model: captions and images, inputs first."""
    rng = np.random.default_rng(7)
    star = render(Scene("free", "white", (Thing("star", "red"),)), 256, 256, rng)
    upright = render(Scene("one", "white", (Thing("star", "red"),)), 256, 256, rng)
    yellow_square = render(Scene("one", "blue", (Thing("square", "yellow"),)), 256, 256, rng)
    mask = np.zeros_like(yellow_square)
    cv2.circle(mask, (128, 128), 112, (255, 255, 255), -1)

    def generate(endpoint: str, prompt: str, **more: Any) -> Picture:
        files = {name: (f"{name}.png", png(part), "image/png") for name, part in more.items() if name.endswith("_file")}
        asked = {"prompt": prompt, "model": model, "format": "png", "overwrite": "true", "seed": 5}
        asked |= {name: value for name, value in more.items() if not name.endswith("_file")}
        answer = httpx.post(f"{server}/{endpoint}", data=asked, files=files or None, timeout=300).raise_for_status()
        return np.asarray(Image.open(io.BytesIO(httpx.get(answer.json()["path"]).content)).convert("RGB"))

    words, other = "a red circle above\na blue square on white", "a blue star somewhere\non a white background"
    plain = generate("create_and_upload_image", words.replace("\n", " ") + " background", width=256, height=256)
    refined = generate(
        "create_and_upload_image", words.replace("\n", " ") + " background", width=256, height=256, refine=True
    )
    styled = generate(STYLE, "a blue star on a white background", image_file=upright, canny="false", strength=0.6)
    repainted = generate(INPAINT, "a red heart on a blue background", image_file=yellow_square, mask_file=mask)
    finer = generate(INPAINT, "a red heart on a blue background", image_file=yellow_square, mask_file=mask, refine=True)
    rows = [
        [(f"{model}: {words}", plain), ("the same, refined", refined)],
        [(f"{model}: input", upright), ("a blue star\non a white background", styled)],
        [
            (f"{model}: input", yellow_square),
            ("mask", mask),
            ("a red heart\non a blue background", repainted),
            ("refined", finer),
        ],
    ]
    if edges_followed:
        prompt = "a purple star somewhere\non a yellow background"
        drawn = generate(
            STYLE,
            prompt.replace("\n", " "),
            image_file=star,
            canny="true",
            strength=1,
            control_scale=1,
            num_inference_steps=8,
        )
        both = generate(STYLE, other.replace("\n", " "), image_file=star, canny="true", strength=0.6)
        row = [
            (f"{model}: input", star),
            ("its edges", edges(star)),
            (prompt, drawn),
            ("a blue star, strength 0.6\nand edges", both),
        ]
        rows.append(row)
    return rows


def png(picture: Picture) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
