"""Renders small synthetic landscapes, the second kind of training image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.synthetic_shapes import COLOURS, Picture, paint

TIMES = ("day", "night", "sunset")
GROUNDS = ("hill", "sea")
SKIES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "day": ((105, 180, 245), (205, 232, 250)),
    "night": ((12, 16, 52), (48, 58, 118)),
    "sunset": ((105, 70, 150), (252, 160, 85)),
}
"""Colour of the sky at the top and at the horizon."""
GROUND_COLOURS: dict[tuple[str, str], tuple[int, int, int]] = {
    ("hill", "day"): (86, 172, 76),
    ("hill", "night"): (26, 66, 52),
    ("hill", "sunset"): (96, 112, 58),
    ("sea", "day"): (38, 112, 190),
    ("sea", "night"): (22, 36, 92),
    ("sea", "sunset"): (120, 78, 122),
}
STARS = ((0.12, 0.12), (0.3, 0.2), (0.46, 0.08), (0.55, 0.27), (0.16, 0.36), (0.9, 0.4))
"""Where a night's stars stand, as fractions of width and height."""


@dataclass(frozen=True)
class Landscape:
    """A sky over a hill or the sea. ``house`` and ``boat`` are colour names, or empty for none.

    A house and a tree stand on a hill, a boat is on the sea; ``body`` is sun or moon.
    """

    time: str
    ground: str
    body: str
    house: str = ""
    tree: bool = False
    boat: str = ""


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Return the four corners of a rectangle, 4 × 2."""
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def round_points(x: float, y: float, radius: float) -> np.ndarray:
    """Return a circle's outline, 64 × 2."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1)


def tone(rgb: tuple[int, int, int] | str, time: str) -> np.ndarray:
    """Return a colour's channels, 0–255, slightly darker at night."""
    value = np.array(COLOURS[rgb] if isinstance(rgb, str) else rgb, np.float32)
    return value * (0.8 if time == "night" else 1.0)


def draw_sky(picture: Picture, view: Landscape, scale: np.ndarray) -> None:
    """Fill the whole image with sky, stars at night, and the sun or the moon; in place."""
    height, width = picture.shape[:2]
    side = float(scale.min())
    top, horizon = (np.array(colour, np.float32) for colour in SKIES[view.time])
    down = np.clip(np.linspace(0, 1.4, height, dtype=np.float32), 0, 1)[:, None, None]
    picture[:] = np.broadcast_to(top * (1 - down) + horizon * down, (height, width, 3)).round()
    if view.time == "night":
        for x, y in STARS:
            points = round_points(x * width, y * height, 0.013 * side)
            paint(picture, points, np.array([240, 240, 220], np.float32))
    if view.body == "moon":
        paint(
            picture,
            round_points(0.76 * width, 0.2 * height, 0.09 * side),
            np.array(COLOURS["white"], np.float32),
        )
        return
    colour = np.array((252, 110, 50) if view.time == "sunset" else COLOURS["yellow"], np.float32)
    x, y = (0.88, 0.5) if view.time == "sunset" else (0.76, 0.2)
    paint(picture, round_points(x * width, y * height, 0.11 * side), colour)


def draw_house(picture: Picture, view: Landscape, foot: np.ndarray, side: float) -> None:
    """Draw a house, in place. ``foot`` is the middle of its base line in pixels."""
    x, y = foot
    wall, roof = tone(view.house, view.time), tone((96, 52, 44), view.time)
    window = np.array((255, 225, 120) if view.time == "night" else (215, 235, 250), np.float32)
    paint(picture, box(x - 0.13 * side, y - 0.2 * side, x + 0.13 * side, y), wall)
    eaves = y - 0.2 * side
    paint(
        picture,
        np.array([[x - 0.17 * side, eaves], [x, eaves - 0.15 * side], [x + 0.17 * side, eaves]]),
        roof,
    )
    paint(picture, box(x - 0.09 * side, y - 0.12 * side, x - 0.02 * side, y), roof)
    paint(picture, box(x + 0.03 * side, y - 0.14 * side, x + 0.1 * side, y - 0.07 * side), window)


def draw_tree(picture: Picture, view: Landscape, foot: np.ndarray, side: float) -> None:
    """Draw a tree, in place. ``foot`` is the middle of its base in pixels."""
    x, y = foot
    paint(picture, box(x - 0.025 * side, y - 0.18 * side, x + 0.025 * side, y), tone((110, 72, 40), view.time))
    paint(picture, round_points(x, y - 0.25 * side, 0.12 * side), tone((34, 124, 48), view.time))


def draw_boat(picture: Picture, view: Landscape, keel: np.ndarray, side: float) -> None:
    """Draw a sailing boat, in place. ``keel`` is the middle of its keel in pixels."""
    x, y = keel
    hull = np.array([[-0.2, -0.09], [0.2, -0.09], [0.13, 0], [-0.13, 0]]) * side + keel
    sail = np.array([[-0.01, -0.4], [-0.01, -0.12], [0.17, -0.12]]) * side + keel
    paint(picture, hull, tone(view.boat, view.time))
    paint(
        picture,
        box(x - 0.03 * side, y - 0.4 * side, x - 0.012 * side, y - 0.08 * side),
        tone((96, 60, 40), view.time),
    )
    paint(picture, sail, tone("white", view.time))


def render(view: Landscape, width: int, height: int, rng: np.random.Generator) -> Picture:
    """Render a landscape; positions vary by half a percent of the shorter side."""
    picture = np.empty((height, width, 3), np.uint8)
    scale = np.array([width, height], np.float64)
    side = float(scale.min())
    shift = side * rng.uniform(-0.004, 0.004, 2)
    draw_sky(picture, view, scale)
    ground = np.array(GROUND_COLOURS[view.ground, view.time], np.float32)
    across = np.linspace(0, 1, 33)
    swell = 0.06 * np.sin(np.pi * across) if view.ground == "hill" else np.zeros(33)
    line = np.stack([across * width, (0.7 - swell) * height], 1)
    paint(picture, np.concatenate([line, [[width, height], [0, height]]]), ground)
    if view.house:
        draw_house(picture, view, scale * (0.32, 0.8) + shift, side)
    if view.tree:
        draw_tree(picture, view, scale * (0.68, 0.8) + shift, side)
    if view.boat:
        draw_boat(picture, view, scale * (0.4, 0.82) + shift, side)
    return picture
