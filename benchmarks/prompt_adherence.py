"""Measures by pixel statistics whether a running server's images follow input image, edges and mask.

    python -m benchmarks.prompt_adherence --server http://127.0.0.1:8000 --count 48

Source images are rendered here (training/synthetic_shapes.py) with their own seeds, and checked with the training's
image checker. Every image takes the whole path: HTTP, decoding, resizing, denoising, pasting back, PNG.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from typing import Any

import cv2
import httpx
import numpy as np
from PIL import Image

from training.captions import pick, with_article
from training.image_checker import background_of, look, to_lab
from training.synthetic_shapes import COLOURS, SHAPES, Picture, Scene, Thing, edges, far, render

SIDE = 256
NEAR = 3
"""Pixels by which an edge may lie beside the one it answers to."""


def main() -> None:
    """Measure every task of every model of the server, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--count", type=int, default=48)
    given = parser.parse_args()
    rows = ["| measure | model | figure |", "| --- | --- | --- |"]
    loaded = httpx.get(f"{given.server}/readyz").json()["models"]
    for model in loaded:
        ask = asker(given.server, model["name"])
        rows += [f"| {what} | {model['name']} | {figure} |" for what, figure in restyling(ask, given.count)]
        if model["follows_edges"]:
            rows += [f"| {what} | {model['name']} | {figure} |" for what, figure in following(ask, given.count)]
        rows += [f"| {what} | {model['name']} | {figure} |" for what, figure in repainting(ask, given.count)]
    revisions = ", ".join(model["revision"] for model in loaded)
    print(f"{given.count} pictures of {SIDE}² a line, {revisions}\n\n" + "\n".join(rows))  # noqa: T201  # its output


Ask = Callable[..., Picture]


def asker(server: str, model: str) -> Ask:
    """A function that sends images and parameters to a route and returns the image, height × width × 3."""

    def ask(route: str, files: dict[str, Picture], **parameters: Any) -> Picture:
        sent = {name: (f"{name}.png", png(picture), "image/png") for name, picture in files.items()}
        asked = {"model": model, "format": "png", "overwrite": "true", **parameters}
        answer = httpx.post(f"{server}/{route}", data=asked, files=sent, timeout=300).raise_for_status().json()
        return np.asarray(Image.open(io.BytesIO(httpx.get(answer["path"]).content)).convert("RGB"))

    return ask


def png(picture: Picture) -> bytes:
    """The PNG file of an image."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def single(rng: np.random.Generator, kind: str = "one") -> Scene:
    """One object on a background that contrasts with it."""
    background = pick(rng, tuple(COLOURS))
    colour = pick(rng, [name for name in COLOURS if far(name, background)])
    return Scene(kind, background, (Thing(pick(rng, SHAPES), colour),))


def another(rng: np.random.Generator, *unlike: str) -> str:
    """A colour that is distinguishable from all of these."""
    return pick(rng, [name for name in COLOURS if all(far(name, other) for other in unlike)])


def silhouette(picture: Picture) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where an image differs from the colour of its border."""
    ground = to_lab(np.round(background_of(picture)).astype(np.uint8)[None])[0]
    distance: np.ndarray[Any, np.dtype[np.bool_]] = np.sqrt(((to_lab(picture) - ground) ** 2).sum(2)) > 28
    return distance


def restyling(ask: Ask, count: int) -> list[tuple[str, str]]:
    """Request the same object in another colour at strength 0.6: whether the shape stays and the colour changes."""
    rng = np.random.default_rng(71_001)
    overlaps, right = [], []
    for _ in range(count):
        scene = single(rng)
        source = render(scene, SIDE, SIDE, rng)
        colour = another(rng, scene.background, scene.things[0].colour)
        prompt = f"{with_article(colour)} {scene.things[0].shape} on {with_article(scene.background)} background"
        drawn = ask("style_transfer_bytes_and_upload_image", {"image_file": source}, prompt=prompt, canny="false")
        before, after = silhouette(source), silhouette(drawn)
        overlaps.append((before & after).sum() / max(1, (before | after).sum()))
        background, found = look(drawn)
        right.append(background == scene.background and bool(found) and found[0].colour == colour)
    return [
        ("style, strength 0.6: shape kept (IoU)", f"{np.mean(overlaps):.2f}"),
        ("style, strength 0.6: new colour right", f"{np.mean(right):.2f}"),
    ]


def agreement(drawn: Picture, wanted: Picture) -> tuple[float, float, float]:
    """Precision, recall and F-score of an image's edges against the wanted ones, each within `NEAR` pixels.

    The wanted edges are those that the server detects, with thresholds of 100 and 200. Generated edges may be
    softer: 40 and 80.
    """
    mine, theirs = cv2.Canny(drawn, 40, 80) > 0, edges(wanted)[..., 0] > 0
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * NEAR + 1, 2 * NEAR + 1))
    near_theirs, near_mine = (cv2.dilate(part.astype(np.uint8), disc) > 0 for part in (theirs, mine))
    precision = (mine & near_theirs).sum() / max(1, mine.sum())
    recall = (theirs & near_mine).sum() / max(1, theirs.sum())
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def following(ask: Ask, count: int) -> list[tuple[str, str]]:
    """Request an object on another background, guided by edges alone, and without them."""
    rng = np.random.default_rng(71_002)
    scores: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    right = []
    for _ in range(count):
        scene = single(rng, "free")
        source = render(scene, SIDE, SIDE, rng)
        background = another(rng, scene.things[0].colour)
        words = f"{with_article(scene.things[0].colour)} {scene.things[0].shape} somewhere"
        prompt = f"{words} on {with_article(background)} background"
        for guided in (True, False):
            drawn = ask(
                "style_transfer_bytes_and_upload_image",
                {"image_file": source},
                prompt=prompt,
                canny=str(guided).lower(),
                strength=1,
                control_scale=1 if guided else 0.5,
                num_inference_steps=8,
            )
            scores[guided].append(agreement(drawn, source))
            if guided:
                seen, found = look(drawn)
                right.append(seen == background and bool(found) and found[0].colour == scene.things[0].colour)
    with_edges, without = (np.mean(scores[guided], 0) for guided in (True, False))
    return [
        (
            "edges followed, 8 steps, control alone: F-score (precision, recall)",
            "{2:.2f} ({0:.2f}, {1:.2f})".format(*with_edges),
        ),
        ("the same without control", "{2:.2f} ({0:.2f}, {1:.2f})".format(*without)),
        ("edges followed: the prompt's colours right", f"{np.mean(right):.2f}"),
    ]


def repainting(ask: Ask, count: int) -> list[tuple[str, str]]:
    """Request another object in the middle, within a mask: whether it is there, and the rest is unchanged."""
    rng = np.random.default_rng(71_003)
    there, changed = [], 0
    mask = np.zeros((SIDE, SIDE, 3), np.uint8)
    cv2.circle(mask, (SIDE // 2, SIDE // 2), int(SIDE * 0.44), (255, 255, 255), -1)
    for _ in range(count):
        scene = single(rng)
        source = render(scene, SIDE, SIDE, rng)
        thing = Thing(pick(rng, SHAPES), another(rng, scene.background, scene.things[0].colour))
        prompt = f"{with_article(thing.colour)} {thing.shape} on {with_article(scene.background)} background"
        drawn = ask("inpaint_and_upload_image", {"image_file": source, "mask_file": mask}, prompt=prompt)
        _, found = look(drawn)
        there.append(bool(found) and (found[0].shape, found[0].colour) == (thing.shape, thing.colour))
        changed += int((drawn != source).any(2)[mask[..., 0] == 0].sum())
    return [
        ("inpaint: the asked object in the mask", f"{np.mean(there):.2f}"),
        ("inpaint: pixels changed outside the mask, all pictures together", str(changed)),
    ]


if __name__ == "__main__":
    main()
