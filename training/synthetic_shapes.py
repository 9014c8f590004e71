"""Renders synthetic images of shapes, the first kind of training image.

The images have *low entropy*: a scene's facts determine its image (an object without a stated place is centred, sizes
are three fixed radii, two objects have two fixed places), so that a few million parameters can learn them. Only the
kind ``free`` places its object at random, and its caption says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

cv2.setNumThreads(1)

Picture = NDArray[np.uint8]
"""Pixels, height × width × 3, RGB, 0–255."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 210),
    "yellow": (245, 215, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 165),
    "pink": (250, 150, 190),
    "cyan": (70, 205, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
    "gray": (130, 130, 132),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "heart", "cross")
STYLES = ("flat", "outline", "striped", "gradient")
RELATIONS = ("above", "below", "left of", "right of")
POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
}
"""Where a placed object's centre lies, as fractions of width and height."""
RADII = {"small": 0.17, "": 0.30, "large": 0.42}
"""Radius of a lone object as a fraction of the shorter side; "" is the unstated size."""
JITTER = 4.0
"""Largest deviation of a colour channel from its name's value, of 255."""


@dataclass(frozen=True)
class Thing:
    """One or more identical objects: shape, colour name, count (1–3) and a size of ``RADII``."""

    shape: str
    colour: str
    count: int = 1
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """All facts of an image of shapes.

    ``kind`` is one of one, many, two, placed and free; ``relation`` is set for two, ``position`` for placed.
    ``things`` holds one Thing, or two for the kind two.
    """

    kind: str
    background: str
    things: tuple[Thing, ...]
    style: str = "flat"
    relation: str = ""
    position: str = ""


def far(first: str, second: str) -> bool:
    """Whether two colours differ enough to be distinguished when one lies on the other (L1 distance above 110)."""
    return sum(abs(a - b) for a, b in zip(COLOURS[first], COLOURS[second], strict=True)) > 110


def outline_points(shape: str) -> NDArray[np.float64]:
    """Return the closed outline of a shape of about unit radius, n × 2; x points right and y down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85
    if shape == "diamond":
        return np.array([[0, -1.1], [0.8, 0], [0, 1.1], [-0.8, 0]])
    if shape == "triangle":
        return np.array([[0, -1.0], [1.0, 0.8], [-1.0, 0.8]])
    if shape == "hexagon":
        corner = np.arange(6) * np.pi / 3
        return np.stack([np.cos(corner), np.sin(corner)], 1)
    if shape == "star":
        corner = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.1, 0.46)
        return np.stack([np.cos(corner) * radius, np.sin(corner) * radius], 1)
    if shape == "cross":
        arm = 0.33
        quarter = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        return np.array(quarter + [(-x, -y) for x, y in quarter])
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x / 16, (-2.5 - y) / 16], 1)
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")


def jittered(colour: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a colour's three channels, 0–255, each changed by at most ``JITTER``."""
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-JITTER, JITTER, 3), 0, 255).astype(np.float32)


def texture(colour: NDArray[np.float32], style: str, width: int, height: int) -> NDArray[np.float32]:
    """Return a height × width × 3 field, 0–255, of one colour: striped, with a vertical gradient, or plain."""
    field = np.broadcast_to(colour, (height, width, 3)).astype(np.float32)
    if style == "gradient":
        down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        dark = np.clip(colour * 0.35 + (30 if colour.sum() < 150 else 0), 0, 255)
        light = np.clip(colour * 1.1 + 45, 0, 255)
        field = np.broadcast_to(light * (1 - down) + dark * down, (height, width, 3))
    elif style == "striped":
        diagonal = np.arange(width, dtype=np.float32)[None, :] + np.arange(height, dtype=np.float32)[:, None]
        period = min(width, height) * 0.11
        share = np.clip(np.sin(diagonal * 2 * np.pi / period) * 4 + 0.5, 0, 1)[..., None]
        other = colour * 0.55 if colour.sum() > 250 else colour + 80
        field = colour * share + other * (1 - share)
    return np.clip(field, 0, 255)


def paint(picture: Picture, points: NDArray[np.float64], colour: NDArray[np.float32], style: str = "flat") -> None:
    """Draw an anti-aliased polygon into an image, in place; points are in pixels."""
    height, width = picture.shape[:2]
    fixed = np.round(points * 16).astype(np.int32)
    plain = tuple(float(round(channel)) for channel in colour)
    if style == "flat":
        cv2.fillPoly(picture, [fixed], plain, cv2.LINE_AA, 4)
        return
    if style == "outline":
        thickness = max(3, round(min(width, height) * 0.035))
        cv2.polylines(picture, [fixed], True, plain, thickness, cv2.LINE_AA, 4)
        return
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, 4)
    share = mask.astype(np.float32)[..., None] / 255
    picture[:] = (picture * (1 - share) + texture(colour, style, width, height) * share).round()


def placements(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, tuple[float, float], float]]:
    """Return each object with its centre (fractions of width and height) and radius (fraction of the shorter side)."""
    first = scene.things[0]
    if scene.kind == "two":
        upright = scene.relation in ("above", "below")
        near, away = ((0.5, 0.26), (0.5, 0.74)) if upright else ((0.26, 0.5), (0.74, 0.5))
        if scene.relation in ("below", "right of"):
            near, away = away, near
        return [(first, near, 0.2), (scene.things[1], away, 0.2)]
    if scene.kind == "many":
        return [(first, ((i + 0.5) / first.count, 0.5), 0.36 / first.count) for i in range(first.count)]
    if scene.kind == "free":
        radius = rng.uniform(0.14, 0.4)
        x, y = rng.uniform(radius, 1 - radius, 2)
        return [(first, (float(x), float(y)), float(radius))]
    return [(first, POSITIONS.get(scene.position, (0.5, 0.5)), RADII[first.size])]


def render(scene: Scene, width: int, height: int, rng: np.random.Generator) -> Picture:
    """Render a scene of shapes.

    Position and size vary by at most a percent; the kind ``free`` has a random position.
    """
    side = min(width, height)
    ground = jittered(scene.background, rng)
    style = "gradient" if scene.style == "gradient" else "flat"
    picture = np.ascontiguousarray(texture(ground, style, width, height).round(), dtype=np.uint8)
    for thing, (x, y), radius in placements(scene, rng):
        angle = rng.uniform(-0.5, 0.5) if scene.kind == "free" else 0.0
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        scale = side * radius * rng.uniform(0.99, 1.01)
        centre = np.array([width * x, height * y]) + side * rng.uniform(-0.004, 0.004, 2)
        points = outline_points(thing.shape) @ turn.T * scale + centre
        paint(picture, points, jittered(thing.colour, rng), scene.style)
    return picture


def edges(picture: Picture) -> Picture:
    """Return the Canny edge map (thresholds 100 and 200) as three equal channels of 0 or 255."""
    return np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, axis=2)


def sheet(pictures: list[Picture], columns: int, gap: int = 2) -> Picture:
    """Arrange images of one size in rows on white, ``gap`` pixels apart."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        page[top : top + height, left : left + width] = picture
    return page
