"""Samples random scenes and writes their captions."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from training.synthetic_landscapes import GROUNDS, TIMES, Landscape
from training.synthetic_shapes import COLOURS, POSITIONS, RELATIONS, SHAPES, STYLES, Scene, Thing, far

Item = TypeVar("Item")
Rng = np.random.Generator

KIND_SHARES = {"one": 0.24, "two": 0.44, "many": 0.07, "placed": 0.10, "free": 0.05, "landscape": 0.10}
"""How often each kind of scene is drawn; they sum to 1."""

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet", "ruby"),
    "green": ("emerald", "lime", "grass green"),
    "blue": ("navy", "azure", "royal blue"),
    "yellow": ("golden", "lemon", "gold"),
    "orange": ("tangerine", "amber"),
    "purple": ("violet", "lilac", "magenta"),
    "pink": ("rose", "rosy", "light pink"),
    "cyan": ("turquoise", "aqua", "teal", "light blue"),
    "white": ("snow white", "ivory", "snowy"),
    "black": ("jet black", "ebony", "dark black"),
    "gray": ("grey", "silver", "ash"),
    "brown": ("chocolate", "tan", "chestnut"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "ball", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid",),
    "star": ("five-pointed star",),
    "diamond": ("rhombus", "lozenge"),
    "hexagon": ("six-sided polygon",),
    "heart": ("love heart",),
    "cross": ("plus", "plus sign"),
}
PLURALS = {"cross": "crosses", "plus": "pluses", "box": "boxes", "rhombus": "rhombuses"}
SIZE_WORDS = {"small": ("little", "tiny", "mini"), "large": ("big", "huge", "giant")}
NUMBER_WORDS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("over", "on top of"),
    "below": ("under", "beneath", "underneath"),
    "left of": ("to the left of", "on the left of", "left to", "and", "next to", "beside", "and"),
    "right of": ("to the right of", "on the right of"),
}
POSITION_WORDS: dict[str, tuple[str, ...]] = {
    "top left": ("at the top left", "in the upper left corner", "in the upper left"),
    "top right": ("at the top right", "in the upper right corner", "in the upper right"),
    "bottom left": ("at the bottom left", "in the lower left corner", "in the lower left"),
    "bottom right": ("at the bottom right", "in the lower right corner", "in the lower right"),
    "left": ("on the left side", "at the left"),
    "right": ("on the right side", "at the right"),
    "top": ("on the top", "near the top"),
    "bottom": ("on the bottom", "near the bottom"),
}
STYLE_WORDS = {
    "outline": ("outline", "outline style", "line art", "as an outline"),
    "striped": ("striped", "stripes", "striped style", "with stripes"),
    "gradient": ("gradient", "gradient style", "with a gradient"),
}
OPENINGS = (
    "a picture of",
    "an image of",
    "a drawing of",
    "a photo of",
    "an illustration of",
    "draw",
    "show me",
)
CLOSINGS = (
    "high quality",
    "detailed",
    "masterpiece",
    "4k",
    "best quality",
    "flat style",
    "please",
    "minimalist",
)
FILLERS = ("beautiful", "nice", "very", "shiny", "cute", "bright", "simple", "pretty", "lovely", "perfect")


def pick(rng: Rng, items: Sequence[Item]) -> Item:
    """Return one item, chosen uniformly at random."""
    return items[int(rng.integers(len(items)))]


def usual_background(things: Sequence[Thing]) -> str:
    """Return the background implied by a caption that names none.

    It is white, or black if the objects would not show on white.
    """
    return "white" if all(far(thing.colour, "white") for thing in things) else "black"


def draw_scene(rng: Rng, kind: str | None = None, style: str | None = None) -> Scene | Landscape:
    """Sample a scene of the given kind, or by ``KIND_SHARES``. Without a style, 88 % are flat."""
    kind = kind or str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    if kind == "landscape":
        return draw_landscape(rng)
    background = pick(rng, tuple(COLOURS))
    if rng.random() < 0.05:
        background = pick(rng, ("white", "black"))
    usable = [colour for colour in COLOURS if far(colour, background)]
    style = style or ("flat" if rng.random() < 0.88 else pick(rng, STYLES[1:]))
    count = int(rng.integers(2, 4)) if kind == "many" else 1
    size = "small" if kind == "placed" else ""
    if kind == "one":
        size = pick(rng, ("", "", "small", "large"))
    things = tuple(Thing(pick(rng, SHAPES), pick(rng, usable), count, size) for _ in range(2 if kind == "two" else 1))
    relation = pick(rng, RELATIONS) if kind == "two" else ""
    position = pick(rng, tuple(POSITIONS)) if kind == "placed" else ""
    return Scene(kind, background, things, style, relation, position)


def draw_landscape(rng: Rng) -> Landscape:
    """Sample a landscape. The moon appears at night, the sun by day and at sunset."""
    time, ground = pick(rng, TIMES), pick(rng, GROUNDS)
    colour = pick(rng, ("red", "white", "yellow", "orange", "purple", "pink", "brown", "blue"))
    body = "moon" if time == "night" else "sun"
    if ground == "sea":
        return Landscape(time, ground, body, boat=colour if rng.random() < 0.8 else "")
    house = colour if rng.random() < 0.7 else ""
    return Landscape(time, ground, body, house=house, tree=rng.random() < 0.6)


def word(rng: Rng, plain: str, others: Sequence[str], rate: float) -> str:
    """Return the plain word, or with probability ``rate`` (0–1) a synonym."""
    return pick(rng, others) if others and rng.random() < rate else plain


def with_article(words: str) -> str:
    """Prefix words with ``a`` or ``an``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def say_thing(thing: Thing, rng: Rng, rate: float) -> str:
    """Describe objects with an article or a number: ``a small red circle``, ``three green hearts``."""
    noun = word(rng, thing.shape, SHAPE_WORDS[thing.shape], rate)
    words = [word(rng, thing.colour, COLOUR_WORDS[thing.colour], rate)]
    if thing.size:
        words.insert(0, word(rng, thing.size, SIZE_WORDS[thing.size], rate * 1.5))
    if rate and rng.random() < 0.06:
        words.insert(0, pick(rng, FILLERS) if rng.random() < 0.5 else nonsense(rng))
    if thing.count > 1:
        number = word(rng, NUMBER_WORDS[thing.count][0], NUMBER_WORDS[thing.count][1:], rate)
        return " ".join([number, *words, PLURALS.get(noun, noun + "s")])
    said = " ".join([*words, noun])
    return said if rate and rng.random() < 0.08 else with_article(said)


def nonsense(rng: Rng) -> str:
    """Return a random word of 2–8 letters, which is most likely in no vocabulary."""
    letters = rng.integers(0, 26, int(rng.integers(2, 9)))
    return "".join(string.ascii_lowercase[int(letter)] for letter in letters)


HOUSE_WORDS = ("hut", "home", "cottage")
BOAT_WORDS = ("ship", "sailing boat", "sailboat")
GROUND_WORDS = {
    "hill": ("a hill", "a green hill", "the hills", "a meadow", "a grassy hill"),
    "sea": ("the sea", "the ocean", "the water", "a lake", "a blue sea"),
}
TIME_WORDS = {
    "day": ("in the day", "by day", "in the daytime", "on a sunny day", "under the sun", "in the morning"),
    "night": ("at night", "by night", "in the night", "under the moon", "in the moonlight", "at midnight"),
    "sunset": ("at sunset", "at dusk", "in the evening", "with a sunset", "at sundown"),
}


def say_landscape(view: Landscape, rng: Rng, rate: float) -> str:
    """Describe a landscape: ``a red house and a tree on a green hill at night``."""
    parts = []
    for colour, noun, others in ((view.house, "house", HOUSE_WORDS), (view.boat, "boat", BOAT_WORDS)):
        if colour:
            said = word(rng, colour, COLOUR_WORDS[colour], rate)
            parts.append(with_article(f"{said} {word(rng, noun, others, rate)}"))
    if view.tree:
        parts.append(word(rng, "a tree", ("a green tree", "an oak tree"), rate))
    ground, time = GROUND_WORDS[view.ground], TIME_WORDS[view.time]
    words = [word(rng, ground[0], ground[1:], rate), word(rng, time[0], time[1:], rate)]
    return " ".join([" and ".join(parts), "on", *words] if parts else words)


def say_background(background: str, rng: Rng, rate: float) -> str:
    """Describe the background: ``on a blue background``, or a paraphrase."""
    colour = word(rng, background, COLOUR_WORDS[background], rate)
    usual = f"on {with_article(colour + ' background')}"
    others = (
        f"on {colour}",
        f"against {with_article(colour + ' background')}",
        f"with {with_article(colour + ' background')}",
        f"in front of {with_article(colour + ' background')}",
        f"on {with_article(colour + ' backdrop')}",
        f"{colour} background",
    )
    return word(rng, usual, others, rate * 1.2)


def say_scene(scene: Scene | Landscape, rng: Rng, rate: float = 0.25) -> str:
    """Write a scene's caption in lower case.

    ``rate`` (0–1) is the probability of each paraphrase; 0 gives the plain caption.
    """
    if isinstance(scene, Landscape):
        said = say_landscape(scene, rng, rate)
    else:
        said = say_thing(scene.things[0], rng, rate)
        if scene.relation:
            relation = word(rng, scene.relation, RELATION_WORDS[scene.relation], rate * 1.6)
            said += f" {relation} {say_thing(scene.things[1], rng, rate)}"
        if scene.position:
            usual = f"in the {scene.position} corner" if " " in scene.position else f"on the {scene.position}"
            usual = f"at the {scene.position}" if scene.position in ("top", "bottom") else usual
            said += f" {word(rng, usual, POSITION_WORDS[scene.position], rate)}"
        if scene.kind == "free":
            said += " somewhere"
        elif scene.kind == "one" and rate and rng.random() < 0.1:
            said += pick(rng, (" in the middle", " in the center", " in the centre"))
        if rate and scene.background == usual_background(scene.things) and rng.random() < 0.35:
            pass  # a caption may omit the implied background
        elif rate and rng.random() < 0.12:
            said = f"{word(rng, scene.background, COLOUR_WORDS[scene.background], rate)} background, {said}"
        else:
            said += f" {say_background(scene.background, rng, rate)}"
        if scene.style != "flat":
            said += f", {pick(rng, STYLE_WORDS[scene.style])}"
    if not rate:
        return said
    if rng.random() < 0.15:
        said = f"{pick(rng, OPENINGS)} {said}"
    if rng.random() < 0.12:
        said += f", {pick(rng, CLOSINGS) if rng.random() < 0.7 else nonsense(rng)}"
    return said


def restyled(said: str, rng: Rng) -> str:
    """Return the caption as a user might type it: one of three capitalisations, a full stop or an exclamation mark."""
    said = pick(rng, (str.upper, str.title, str.capitalize))(said)
    return said + pick(rng, (".", "!", "", " ."))
