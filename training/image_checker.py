"""Recognises colours, shapes, counts and positions in an image by pixel statistics and contours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from training.synthetic_landscapes import Landscape
from training.synthetic_landscapes import render as render_landscape
from training.synthetic_shapes import COLOURS, POSITIONS, SHAPES, Picture, Scene, outline_points

SIDE = 48
"""Side, in pixels, of the masks in which shapes are compared."""


@dataclass(frozen=True)
class Found:
    """An object detected in an image: shape, colour name, centre in pixels (x, y), area in square pixels."""

    shape: str
    colour: str
    centre: tuple[float, float]
    area: float


def to_lab(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Convert RGB pixels, … × 3, to 8-bit CIELAB, height × width × 3."""
    return cv2.cvtColor(pixels.reshape(1, -1, 3), cv2.COLOR_RGB2LAB).astype(np.float64).reshape(pixels.shape)


@cache
def reference_colours() -> NDArray[np.float64]:
    """Return the named colours in CIELAB, 12 × 3."""
    return to_lab(np.array(list(COLOURS.values()), np.uint8))


def nearest_colour(rgb: NDArray[np.float64]) -> str:
    """Return the name of the colour nearest to three channels of 0–255. Lightness has a lower weight."""
    here = to_lab(np.clip(np.round(rgb), 0, 255).astype(np.uint8)[None])[0]
    distance = (((reference_colours() - here) * (0.6, 1, 1)) ** 2).sum(1)
    return list(COLOURS)[int(distance.argmin())]


def background_of(picture: Picture) -> NDArray[np.float64]:
    """Return the median colour of an image's border, three channels of 0–255."""
    width = max(2, min(picture.shape[:2]) // 24)
    rim = [picture[:width], picture[-width:], picture[:, :width], picture[:, -width:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in rim]), 0)


def silhouette(contour: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return a contour's filled mask (0–1), scaled to SIDE × SIDE without changing its proportions."""
    x, y, width, height = cv2.boundingRect(contour)
    side = max(width, height)
    mask = np.zeros((side, side), np.uint8)
    cv2.drawContours(mask, [contour - np.array([[x - (side - width) // 2, y - (side - height) // 2]])], -1, 255, -1)
    return cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def contours_of(mask: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Return the outer contours of a mask's components, the largest first."""
    found, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return sorted(found, key=cv2.contourArea, reverse=True)


@cache
def templates() -> tuple[list[str], NDArray[np.float32]]:
    """Return shape names and their silhouettes at several small angles, n × SIDE × SIDE."""
    names, masks = [], []
    for shape in SHAPES:
        for angle in np.linspace(-0.5, 0.5, 11):
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            mask = np.zeros((300, 300), np.uint8)
            cv2.fillPoly(mask, [(outline_points(shape) @ turn.T * 100 + 150).round().astype(np.int32)], 255)
            names.append(shape)
            masks.append(silhouette(contours_of(mask)[0]))
    return names, np.stack(masks)


def shape_of(contour: NDArray[np.int32]) -> str:
    """Return the shape whose silhouette is most similar to a contour's."""
    names, masks = templates()
    return names[int(((masks - silhouette(contour)) ** 2).mean((1, 2)).argmin())]


def look(picture: Picture) -> tuple[str, list[Found]]:
    """Return the background's colour name and the objects in front of it, the largest first."""
    height, width = picture.shape[:2]
    ground = background_of(picture)
    away = to_lab(picture) - to_lab(np.round(ground).astype(np.uint8)[None])[0]
    mask = (np.sqrt(((away * (0.8, 1, 1)) ** 2).sum(2)) > 28).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((max(2, min(height, width) // 64 + 1),) * 2, np.uint8))
    found = []
    for contour in contours_of(mask):
        if cv2.contourArea(contour) < 0.004 * height * width:
            continue
        inside = np.zeros((height, width), np.uint8)
        cv2.drawContours(inside, [contour], -1, 1, -1)
        core = cv2.erode(inside & mask, np.ones((5, 5), np.uint8))
        core = core if core.sum() > 8 else inside
        x, y, w, h = cv2.boundingRect(contour)
        colour = nearest_colour(np.median(picture[core > 0], 0))
        found.append(Found(shape_of(contour), colour, (x + w / 2, y + h / 2), float(cv2.contourArea(contour))))
    return nearest_colour(ground), found


def in_place(position: str, centre: tuple[float, float], width: int, height: int) -> bool:
    """Whether a centre (pixels) is nearer to the named position than to all others, the middle included."""
    places = POSITIONS | {"": (0.5, 0.5)}
    here = np.array(centre) / (width, height)
    return min(places, key=lambda name: float(((np.array(places[name]) - here) ** 2).sum())) == position


def check_scene(picture: Picture, scene: Scene) -> dict[str, bool]:
    """Check an image of shapes: background, colour, shape, count, place; ``all`` means that all are right.

    For two objects ``both`` means that each is found in its own colour, ``place`` that their relation is right.
    """
    height, width = picture.shape[:2]
    ground, found = look(picture)
    verdict = {
        "background": ground == scene.background,
        "count": len(found) == sum(t.count for t in scene.things),
    }
    if scene.kind == "two":
        first, second = scene.things
        ones = [f for f in found if (f.shape, f.colour) == (first.shape, first.colour)]
        others = [f for f in found if (f.shape, f.colour) == (second.shape, second.colour)]
        verdict["colour"] = {t.colour for t in scene.things} == {f.colour for f in found}
        verdict["shape"] = {t.shape for t in scene.things} == {f.shape for f in found}
        verdict["both"] = bool(ones) and bool(others)
        verdict["place"] = any(related(scene.relation, a, b) for a in ones for b in others if a is not b)
    else:
        thing = scene.things[0]
        verdict["colour"] = bool(found) and all(f.colour == thing.colour for f in found)
        verdict["shape"] = bool(found) and all(f.shape == thing.shape for f in found)
        if scene.kind in ("one", "placed"):
            verdict["place"] = bool(found) and in_place(scene.position, found[0].centre, width, height)
    return verdict | {"all": all(verdict.values())}


def related(relation: str, first: Found, second: Found) -> bool:
    """Whether the first object is in the named relation to the second."""
    (ax, ay), (bx, by) = first.centre, second.centre
    return {"above": ay < by, "below": ay > by, "left of": ax < bx, "right of": ax > bx}[relation]


def check_landscape(picture: Picture, view: Landscape) -> dict[str, bool]:
    """Check a landscape image, fact by fact.

    A fact is right if the image is nearer to its scene's rendering than to renderings with that fact changed.
    """
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (width // 2, height // 2), interpolation=cv2.INTER_AREA).astype(np.float64)

    def distance(other: Landscape) -> float:
        drawn = render_landscape(other, width, height, np.random.default_rng(0))
        return float(((cv2.resize(drawn, (width // 2, height // 2), interpolation=cv2.INTER_AREA) - small) ** 2).mean())

    own, verdict = distance(view), {}
    for fact, others in variants(view).items():
        verdict[fact] = all(own < distance(other) for other in others)
    return verdict | {"all": all(verdict.values())}


def variants(view: Landscape) -> dict[str, list[Landscape]]:
    """Return the landscapes that differ in one fact, by that fact."""
    from dataclasses import replace

    times = [t for t in ("day", "night", "sunset") if t != view.time]
    found = {"time": [replace(view, time=t, body="moon" if t == "night" else "sun") for t in times]}
    if view.ground == "hill":
        found["tree"] = [replace(view, tree=not view.tree)]
        found["house"] = [replace(view, house=c) for c in ("", *COLOURS) if c != view.house]
        found["ground"] = [replace(view, ground="sea", house="", tree=False)]
    else:
        found["boat"] = [replace(view, boat=c) for c in ("", *COLOURS) if c != view.boat]
        found["ground"] = [replace(view, ground="hill", boat="")]
    return found
