"""The preprocessors of this server, by name, with AUTOMATIC1111's names for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging.control_images import line_maps, tone_maps
from stable_diffusion_server.imaging.control_images.preprocessor import (
    RESOLUTION,
    NeededFile,
    Preprocessor,
    PreprocessorOption,
    to_resolution,
)
from stable_diffusion_server.imaging.edges import canny
from stable_diffusion_server.imaging.resize import Pixels

# The name that stands for a ready-made control image.
NO_PREPROCESSOR = "none"
_LINES = ("canny", "scribble")
_GAMMA = PreprocessorOption("gamma", "Gamma Correction", 1.0, 0.1, 2.0, 0.001)
_BACKGROUND = PreprocessorOption("background", "Normal Background Threshold", 0.4, 0.0, 1.0, 0.01)
_HED = NeededFile("HED", ("hed",), ("teed",))
_PIDINET = NeededFile("PiDiNet", ("pidi",))
_DEPTH = NeededFile("Depth-Anything, MiDaS or another network of depth", ("depth", "midas", "dpt", "zoe"))
_PERSONS = NeededFile("a YOLOX detector of persons", ("yolox",))
_POSE = NeededFile("DWPose", ("dwllucoco", "dwpose", "rtmpose", "rtmw"))
_COARSE = ("coarse", "skmodel2", "anime", "netg", "manga", "erika")
_IN_PROCESS = (
    Preprocessor(
        name="canny",
        kind="canny",
        options=(
            PreprocessorOption("low", "Low Threshold", 100, 0, 2040),
            PreprocessorOption("high", "High Threshold", 200, 0, 2040),
        ),
        draw=lambda pixels, values: canny(pixels, round(values["low"]), round(values["high"])),
    ),
    Preprocessor(
        name="lineart_standard",
        kind="lineart",
        also=("scribble",),
        aliases=("lineart_standard (from white bg & black line)", "lineart"),
        draw=lambda pixels, values: line_maps.lineart(pixels),
    ),
    Preprocessor(
        name="scribble_threshold",
        kind="scribble",
        options=(PreprocessorOption("threshold", "Binarization Threshold", 127, 0, 255),),
        aliases=("scribble", "scribble_thr"),
        draw=lambda pixels, values: line_maps.scribble(pixels, round(values["threshold"])),
    ),
    Preprocessor(
        name="scribble_xdog",
        kind="scribble",
        options=(PreprocessorOption("threshold", "XDoG Threshold", 32, 1, 64),),
        draw=lambda pixels, values: line_maps.scribble_xdog(pixels, round(values["threshold"])),
    ),
    Preprocessor(
        name="softedge_gradient",
        kind="softedge",
        also=("scribble",),
        aliases=("softedge",),
        draw=lambda pixels, values: line_maps.softedge_gradient(pixels),
    ),
    Preprocessor(
        name="threshold",
        kind="scribble",
        also=("lineart",),
        options=(PreprocessorOption("threshold", "Binarization Threshold", 127, 0, 255),),
        draw=lambda pixels, values: line_maps.threshold(pixels, round(values["threshold"])),
    ),
    Preprocessor(
        name="invert",
        kind="lineart",
        also=_LINES,
        aliases=("invert (from white bg & black line)",),
        draw=lambda pixels, values: line_maps.invert(pixels),
        keeps_size=True,
    ),
    Preprocessor(
        name="tile_resample",
        kind="tile",
        also=("blur",),
        options=(PreprocessorOption("down_sampling_rate", "Down Sampling Rate", 1, 1, 8, 0.01),),
        aliases=("tile",),
        draw=lambda pixels, values: tone_maps.tile_resample(pixels, values["down_sampling_rate"]),
        keeps_size=True,
    ),
    Preprocessor(
        name="blur_gaussian",
        kind="blur",
        also=("tile",),
        options=(PreprocessorOption("sigma", "Sigma", 9, 0.01, 64, 0.01),),
        aliases=("blur",),
        draw=lambda pixels, values: tone_maps.blur_gaussian(pixels, values["sigma"]),
    ),
    Preprocessor(
        name="recolor_luminance",
        kind="gray",
        options=(_GAMMA,),
        aliases=("gray", "grey"),
        draw=lambda pixels, values: tone_maps.luminance(pixels, values["gamma"]),
        keeps_size=True,
    ),
    Preprocessor(
        name="recolor_intensity",
        kind="gray",
        options=(_GAMMA,),
        draw=lambda pixels, values: tone_maps.intensity(pixels, values["gamma"]),
        keeps_size=True,
    ),
    Preprocessor(
        name="color_grid",
        kind="color",
        aliases=("t2ia_color_grid", "color"),
        draw=lambda pixels, values: tone_maps.colour_grid(pixels),
    ),
    Preprocessor(
        name="shuffle",
        kind="shuffle",
        options=(PreprocessorOption("seed", "Seed", 0, 0, 2**31 - 1),),
        draw=lambda pixels, values: tone_maps.shuffle(pixels, round(values["seed"])),
    ),
)


def _depth(name: str, what: str, *words: str) -> Preprocessor:
    return Preprocessor(name=name, kind="depth", needs=(NeededFile(what, words),), method="depth")


def _pose(name: str, method: str, *aliases: str) -> Preprocessor:
    return Preprocessor(name=name, kind="openpose", aliases=aliases, needs=(_PERSONS, _POSE), method=method)


_BY_MODELS = (
    Preprocessor(name="depth", kind="depth", needs=(_DEPTH,), method="depth"),
    _depth("depth_anything_v2", "Depth-Anything V2", "depthanythingv2"),
    Preprocessor(
        name="depth_anything",
        kind="depth",
        needs=(NeededFile("Depth-Anything", ("depthanything",), ("depthanythingv2",)),),
        method="depth",
    ),
    _depth("depth_midas", "MiDaS or DPT", "midas", "dpt"),
    _depth("depth_zoe", "ZoeDepth", "zoe"),
    Preprocessor(
        name="normal_depth",
        kind="normal",
        options=(_BACKGROUND,),
        aliases=("normal_midas", "normal_map", "normal"),
        needs=(_DEPTH,),
        method="normal_depth",
    ),
    Preprocessor(
        name="normal_bae",
        kind="normal",
        needs=(NeededFile("a network of normals", ("bae", "normal")),),
        method="normal",
    ),
    Preprocessor(name="softedge_hed", kind="softedge", aliases=("hed",), needs=(_HED,), method="hed"),
    Preprocessor(name="softedge_hedsafe", kind="softedge", aliases=("hed_safe",), needs=(_HED,), method="hed_safe"),
    Preprocessor(name="softedge_pidinet", kind="softedge", aliases=("pidinet",), needs=(_PIDINET,), method="pidinet"),
    Preprocessor(
        name="softedge_pidisafe", kind="softedge", aliases=("pidinet_safe",), needs=(_PIDINET,), method="pidinet_safe"
    ),
    Preprocessor(name="scribble_hed", kind="scribble", aliases=("fake_scribble",), needs=(_HED,), method="hed_thin"),
    Preprocessor(
        name="scribble_pidinet",
        kind="scribble",
        aliases=("pidinet_scribble",),
        needs=(_PIDINET,),
        method="pidinet_thin",
    ),
    Preprocessor(
        name="lineart_realistic",
        kind="lineart",
        needs=(NeededFile("a network of line art", ("lineart", "skmodel"), _COARSE),),
        method="lines",
    ),
    Preprocessor(
        name="lineart_coarse",
        kind="lineart",
        needs=(NeededFile("a network of coarse line art", ("lineartcoarse", "skmodel2")),),
        method="lines",
    ),
    Preprocessor(
        name="lineart_anime",
        kind="lineart",
        needs=(NeededFile("a network of anime line art", ("lineartanime", "netg")),),
        method="anime_lines",
    ),
    _pose("openpose", "pose_body"),
    _pose("openpose_hand", "pose_hand"),
    _pose("openpose_face", "pose_face"),
    _pose("openpose_faceonly", "pose_faceonly"),
    _pose("openpose_full", "pose_full", "dw_openpose_full", "dwpose"),
)
# By name; in the order in which lists show them.
PREPROCESSORS: Mapping[str, Preprocessor] = {row.name: row for row in (*_IN_PROCESS, *_BY_MODELS)}
_NAMES = {name: row for row in PREPROCESSORS.values() for name in (row.name, *row.aliases)}


def find_preprocessor(name: str, field: str) -> Preprocessor:
    """The preprocessor of a name or alias, in any case. Raises `InvalidInput` for `field`."""
    row = _NAMES.get(name.strip().lower())
    if row is None:
        known = ", ".join((NO_PREPROCESSOR, *PREPROCESSORS))
        raise InvalidInput(f"{name[:50]!r} is not a preprocessor here; there are {known}.", field=field)
    return row


def preprocessors_of(kind: str) -> tuple[Preprocessor, ...]:
    """The preprocessors whose results fit a ControlNet of a kind, those made for it first."""
    fitting = [row for row in PREPROCESSORS.values() if kind in row.kinds]
    return tuple(sorted(fitting, key=lambda row: row.kind != kind))


def draw_control(row: Preprocessor, pixels: Pixels, values: Mapping[str, float], field: str) -> Pixels:
    """The control image of an image (uint8, height × width × 3) by a preprocessor that has `draw`.

    Args:
        row: The preprocessor.
        pixels: uint8, height × width × 3, RGB.
        values: The values of all options, as `Preprocessor.values` returns them.
        field: The request parameter that `InvalidInput` names if the control image would be too large.
    """
    if row.draw is None:
        raise InvalidInput(f"{row.name} needs {' and '.join(need.what for need in row.needs)}.", field=field)
    scaled = to_resolution(pixels, values.get(RESOLUTION, 0.0), field)
    return row.draw(np.ascontiguousarray(scaled), values)
