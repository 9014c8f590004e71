"""Puts what a server does after "text to image" into one image: second passes, upscaling, extension, control, repair.

python -m scripts.feature_sheet --models /path/to/a/folder/of/MODELS_DIR --out docs/features.png

The folder of MODELS_DIR gets a detector of yellow things, which the last row uses.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from training.synthetic_shapes import Picture, Scene, Thing, render

SIDE, CAPTION, GAP = 192, 26, 4
CREATE, INPAINT, UPSCALE = (f"{name}_and_upload_image" for name in ("create", "inpaint", "upscale"))
DETECTOR = "yellow"


def main() -> None:
    """Generate the images and save the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    write_detector(given.models / "detectors" / f"{DETECTOR}.onnx")
    rows = cases(given.server)
    width = max(len(row) for row in rows) * (SIDE + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (SIDE + CAPTION)), "white")
    for number, row in enumerate(rows):
        for place, (caption, picture) in enumerate(row):
            left, top = place * (SIDE + GAP), number * (SIDE + CAPTION)
            cell = Image.fromarray(picture)
            cell.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left, top))
            ImageDraw.Draw(sheet).multiline_text((left, top + SIDE), caption, fill="black", font_size=9, spacing=1)
    sheet.quantize(200).save(given.out, optimize=True)


def cases(server: str) -> list[list[tuple[str, Picture]]]:
    """The rows: captions and images, inputs first."""
    rng = np.random.default_rng(7)
    star = render(Scene("one", "white", (Thing("star", "red"),)), 256, 256, rng)
    free = render(Scene("free", "white", (Thing("star", "red"),)), 256, 256, rng)
    square = render(Scene("one", "blue", (Thing("square", "yellow"),)), 256, 256, rng)
    ramp = np.broadcast_to(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], square.shape).copy()

    def generate(endpoint: str, **asked: Any) -> Picture:
        files = {n: (f"{n}.png", png(part), "image/png") for n, part in asked.items() if n.endswith("_file")}
        data = {"format": "png", "overwrite": "true", "seed": 5, "model": "sdxl"} if endpoint != UPSCALE else {}
        data |= {name: value for name, value in asked.items() if not name.endswith("_file")}
        answer = httpx.post(f"{server}/{endpoint}", data=data, files=files or None, timeout=300)
        if answer.is_error:
            raise SystemExit(answer.text)
        return np.asarray(Image.open(io.BytesIO(httpx.get(answer.json()["path"]).content)).convert("RGB"))

    words = "a red circle above a blue square on a white background"
    small = {"prompt": words, "width": 192, "height": 192}
    plain = generate(CREATE, **small)
    second = {**small, "hires_width": 320, "hires_height": 320, "hires_strength": 0.3}
    passes = [
        (f"second pass at 320 x 320:\n{name}", generate(CREATE, **second, hires_upscaler=name))
        for name in ("Lanczos", "embedded-2x", "Latent")
    ]
    tile = generate(CREATE, prompt="a yellow star on a purple background", width=256, height=256, tiling="both")
    unit = {"kind": "canny", "image": f"data:image/png;base64,{base64.b64encode(png(free)).decode()}"}

    def guided(**more: object) -> Picture:
        units = json.dumps([{**unit, **more}])
        return generate(CREATE, prompt="a blue star on a yellow background", width=256, height=256, controls=units)

    sun = {"prompt": "a yellow circle on a blue background", "width": 256, "height": 256}
    repair = [
        {
            "detector": DETECTOR,
            "prompt": "a red star on a blue background",
            "strength": 1.0,
            "padding": 64,
            "dilation": 12,
        }
    ]
    soft = {"image_file": square, "mask_file": ramp, "prompt": "a red circle on a blue background"}
    return [
        [("text to image, 192 x 192", plain), *passes],
        [
            ("input, 256 x 256", star),
            ("upscaled 2x: Lanczos", generate(UPSCALE, image_file=star, upscaler="Lanczos", scale=2)),
            ("upscaled 2x:\nembedded-2x", generate(UPSCALE, image_file=star, upscaler="embedded-2x", scale=2)),
        ],
        [
            ("input", square),
            (
                "extended to the left and right",
                generate(
                    INPAINT,
                    image_file=square,
                    prompt="a yellow square on a blue background",
                    extend_left=64,
                    extend_right=64,
                    extend_overlap=8,
                ),
            ),
            ("mask with levels", ramp),
            ("soft: how much is changed", generate(INPAINT, **soft, mask_mode="soft")),
        ],
        [("seamless", tile), ("four times", np.tile(tile, (2, 2, 1)))],
        [
            ("control picture", free),
            ("canny unit", guided()),
            ("in the first half\nof the steps", guided(end=0.5)),
            ("with weight 0.4", guided(weight=0.4)),
        ],
        [
            ("text to image", generate(CREATE, **sun)),
            ("yellow things drawn again\nas a red star", generate(CREATE, **sun, repairs=json.dumps(repair))),
        ],
    ]


def write_detector(path: Path) -> None:
    """Write a detector whose one box is around what is yellow: rows × columns of more red and green than blue."""
    side = 64
    nodes = [
        helper.make_node("Conv", ["x", "weights", "bias"], ["yellow"]),
        helper.make_node("Greater", ["yellow", "zero"], ["is_yellow"]),
        helper.make_node("Cast", ["is_yellow"], ["map"], to=TensorProto.FLOAT),
    ]
    ends = []
    for name, axes in (("columns", "over_rows"), ("rows", "over_columns")):
        nodes += [
            helper.make_node("ReduceMax", ["map"], [f"{name}_any"], axes=[2 if axes == "over_rows" else 3], keepdims=0),
            helper.make_node("Reshape", [f"{name}_any", "flat"], [f"{name}_flat"]),
            helper.make_node("ArgMax", [f"{name}_flat"], [f"{name}_first"], axis=1),
            helper.make_node("ArgMax", [f"{name}_flat"], [f"{name}_last"], axis=1, select_last_index=1),
        ]
        for end in ("first", "last"):
            nodes.append(helper.make_node("Cast", [f"{name}_{end}"], [f"{name}_{end}_number"], to=TensorProto.FLOAT))
        ends += [f"{name}_first_number", f"{name}_last_number"]
    left, right, top, bottom = ends
    nodes += [
        helper.make_node("ReduceMax", ["map"], ["any"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["any", "flat"], ["score"]),
        helper.make_node("Mul", ["score", "zero_class"], ["class"]),
        helper.make_node("Concat", [left, top, right, bottom, "score", "class"], ["row"], axis=1),
        helper.make_node("Reshape", ["row", "rows_of_six"], ["boxes"]),
    ]
    weights = {
        "weights": np.array([1, 1, -2], np.float32).reshape(1, 3, 1, 1),
        "bias": np.array([-0.8], np.float32),
        "zero": np.zeros(1, np.float32),
        "zero_class": np.zeros(1, np.float32),
        "flat": np.array([1, -1], np.int64),
        "rows_of_six": np.array([1, 1, 6], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "yellow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 1, 6])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def png(pixels: Picture) -> bytes:
    """An image file of pixels."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


if __name__ == "__main__":
    main()
