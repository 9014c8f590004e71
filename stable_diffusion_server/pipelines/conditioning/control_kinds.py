"""What ControlNets follow: guessed from the name of one that was trained for one kind, listed for those of several."""

from __future__ import annotations

import re

from stable_diffusion_server.types import ControlKind

# Kinds by words in names of files, longer words first where one holds another.
_WORDS: tuple[tuple[str, ControlKind], ...] = (
    ("inpaint", ControlKind.INPAINT),
    ("repaint", ControlKind.INPAINT),
    ("openpose", ControlKind.OPENPOSE),
    ("pose", ControlKind.OPENPOSE),
    ("dwpose", ControlKind.OPENPOSE),
    ("canny", ControlKind.CANNY),
    ("mlsd", ControlKind.LINEART),
    ("lineart", ControlKind.LINEART),
    ("line", ControlKind.LINEART),
    ("softedge", ControlKind.SOFTEDGE),
    ("hed", ControlKind.SOFTEDGE),
    ("pidi", ControlKind.SOFTEDGE),
    ("scribble", ControlKind.SCRIBBLE),
    ("sketch", ControlKind.SCRIBBLE),
    ("depth", ControlKind.DEPTH),
    ("zoe", ControlKind.DEPTH),
    ("midas", ControlKind.DEPTH),
    ("normal", ControlKind.NORMAL),
    ("normalbae", ControlKind.NORMAL),
    ("seg", ControlKind.SEGMENTATION),
    ("tile", ControlKind.TILE),
    ("upscaler", ControlKind.TILE),
    ("blur", ControlKind.BLUR),
    ("gray", ControlKind.GRAY),
    ("grey", ControlKind.GRAY),
    ("recolor", ControlKind.GRAY),
)
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_LONGEST = 500
# Index of each kind in ControlNetUnionModel's `control_type`: xinsir's ControlNet++ has the first 6, its ProMax 8.
_SDXL_UNION = {
    ControlKind.OPENPOSE: 0,
    ControlKind.DEPTH: 1,
    ControlKind.SOFTEDGE: 2,
    ControlKind.SCRIBBLE: 2,
    ControlKind.CANNY: 3,
    ControlKind.LINEART: 3,
    ControlKind.NORMAL: 4,
    ControlKind.SEGMENTATION: 5,
    ControlKind.TILE: 6,
    ControlKind.INPAINT: 7,
}
# `control_mode` of FLUX.1-dev-ControlNet-Union (InstantX, Shakker Labs).
_FLUX_UNION = {
    ControlKind.CANNY: 0,
    ControlKind.TILE: 1,
    ControlKind.DEPTH: 2,
    ControlKind.BLUR: 3,
    ControlKind.OPENPOSE: 4,
    ControlKind.GRAY: 5,
    ControlKind.LOW_QUALITY: 6,
}
# Z-Image-Turbo-Fun-Controlnet-Union follows these, without being told which.
_Z_IMAGE_UNION = (
    ControlKind.CANNY,
    ControlKind.SOFTEDGE,
    ControlKind.DEPTH,
    ControlKind.OPENPOSE,
    ControlKind.LINEART,
    ControlKind.SCRIBBLE,
    ControlKind.INPAINT,
    ControlKind.TILE,
)


def kinds_of(name: str, family: str, variant: str) -> tuple[ControlKind, ...]:
    """The kinds that a network follows, the usual one first; none if its name does not tell."""
    if family == "z-image":
        return _Z_IMAGE_UNION
    if variant == "union":
        return tuple(_FLUX_UNION if family == "flux" else _SDXL_UNION)
    words = set(_SEPARATORS.split(name[-_LONGEST:].casefold()))
    found = dict.fromkeys(kind for word, kind in _WORDS if word in words)
    if not found:  # words may be joined, as in `controlnetdepth_v2`
        joined = _SEPARATORS.sub("", name[-_LONGEST:].casefold())
        found = dict.fromkeys(kind for word, kind in _WORDS if len(word) > len("line") and word in joined)
    return tuple(found)


def union_index(kind: ControlKind, *, flux: bool) -> int | None:
    """The number by which a union is told a kind; `None` if it does not follow it."""
    return (_FLUX_UNION if flux else _SDXL_UNION).get(kind)
