"""Finds things in pictures by detectors from ONNX files, in the layouts that exporters write.

Boxes are letterboxed in and out, and overlapping ones of a class are left out (non-maximum suppression).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile
from stable_diffusion_server.pipelines.vision.onnx_network import Floats, OnnxNetwork, as_input, finite
from stable_diffusion_server.pipelines.vision.vision_messages import MOST_BOXES, FoundBox

# The side of the square that files of any size get, and the level around the picture.
_SIDE, _GREY = 640, 114
# Pixels along the cells of each level of a detector.
_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
# Overlap (intersection over union) from which the weaker of two boxes is left out; candidates.
_OVERLAP, _MOST_CANDIDATES = 0.45, 3000
# Rows that a file with its own suppression answers at most.
_MOST_FINAL = 1000
_LARGEST_EXPONENT = 20.0


def detect_boxes(network: OnnxNetwork, pixels: Pixels, least_score: float) -> list[FoundBox]:
    """What a detector finds with at least `least_score`, the highest score first, at most 300.

    Layouts: 1 × (4 + classes) × N of YOLOv8 and later (also with mask coefficients), 1 × N × (5 + classes) of YOLOv5
    and YOLOX (whose raw cells are decoded), N × 6 or N × 7 of files with their own suppression. Raises `RefusedFile`.
    """
    sides = network.size_or(_SIDE, _SIDE)
    outputs: list[Floats] | None = None
    is_yolox = _is_yolox(network.output_shape, sides)
    if not is_yolox:
        boxed, scale, corner = letterbox(pixels, *sides, centred=True)
        outputs = network.run(as_input(boxed, sides))
        is_yolox = _is_yolox(outputs[0].shape, sides)  # files may leave their shapes open
    if is_yolox or outputs is None:
        # YOLOX takes blue first, levels from 0 to 255, and the picture in the corner.
        boxed, scale, corner = letterbox(pixels, *sides, centred=False)
        outputs = network.run(boxed[..., ::-1].transpose(2, 0, 1).astype(np.float32))
        rows = _decode_yolox(outputs[0][0], sides)
    else:
        rows = _rows(outputs, sides, len(network.labels()))
    rows = finite(rows)[rows[:, 4] >= least_score]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")][:_MOST_CANDIDATES]
    limits = np.tile(np.array([pixels.shape[1], pixels.shape[0]], np.float32), 2)
    boxes = ((rows[:, :4] - np.tile(corner, 2)) / scale).clip(0, limits)
    names = network.labels()
    found = []
    for index in suppress(boxes, rows[:, 5])[:MOST_BOXES]:
        left, top, right, bottom = (float(side) for side in boxes[index])
        number = int(rows[index, 5])
        name = names.get(number, str(number))
        found.append(FoundBox(left, top, right, bottom, float(rows[index, 4]), number, name))
    return found


def letterbox(pixels: Pixels, width: int, height: int, *, centred: bool) -> tuple[Pixels, float, Floats]:
    """An image scaled into `width` × `height` on grey, its scale, and the place of its upper left corner (x, y)."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    scaled = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    left, top = ((width - size[0]) // 2, (height - size[1]) // 2) if centred else (0, 0)
    boxed = np.full((height, width, 3), _GREY, np.uint8)
    boxed[top : top + size[1], left : left + size[0]] = scaled
    return boxed, scale, np.array([left, top], np.float32)


def suppress(boxes: Floats, labels: Floats) -> list[int]:
    """The places of the boxes to keep, of boxes sorted by falling score: none overlaps a better one of its class much.

    Args:
        boxes: float32, N × (left, top, right, bottom).
        labels: The class of each box, N.
    """
    areas = np.prod((boxes[:, 2:] - boxes[:, :2]).clip(0), axis=1)
    kept: list[int] = []
    left = np.arange(len(boxes))
    while left.size and len(kept) < MOST_BOXES:
        best, rest = int(left[0]), left[1:]
        kept.append(best)
        corners = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.prod((corners[1] - corners[0]).clip(0), axis=1)
        union = np.maximum(areas[best] + areas[rest] - shared, 1e-6)
        left = rest[(shared / union <= _OVERLAP) | (labels[rest] != labels[best])]
    return kept


def _cells(sides: tuple[int, int], strides: tuple[int, ...]) -> int:
    return sum((sides[0] // stride) * (sides[1] // stride) for stride in strides)


def _is_yolox(shape: tuple[object, ...], sides: tuple[int, int]) -> bool:
    """Whether an output has one row per cell of YOLOX, of 5 numbers and the classes."""
    return len(shape) == 3 and shape[0] == 1 and shape[1] in [_cells(sides, strides) for strides in _STRIDES]


def _decode_yolox(found: Floats, sides: tuple[int, int]) -> Floats:
    """Rows of left, top, right, bottom, score and class, from cells whose places and sizes are relative."""
    if found.shape[1] < 6:
        raise RefusedFile("It does not answer boxes in a layout that is known here.")
    strides = next(strides for strides in _STRIDES if _cells(sides, strides) == len(found))
    places: list[NDArray[np.float32]] = []
    for stride in strides:
        y, x = np.mgrid[: sides[1] // stride, : sides[0] // stride].reshape(2, -1)
        places.append(np.stack([x, y, np.full_like(x, stride)], axis=1).astype(np.float32))
    grid = np.concatenate(places)
    middle, size = found[:, :2], found[:, 2:4]
    # Some exporters decode: then middles reach across the picture, and not only over neighbours of a cell.
    if np.abs(middle).max() < max(sides) / 4:
        middle = (middle + grid[:, :2]) * grid[:, 2:]
        size = np.exp(size.clip(max=_LARGEST_EXPONENT)) * grid[:, 2:]
    return _ranked(middle, size, found[:, 4:5] * found[:, 5:])


def _rows(outputs: list[Floats], sides: tuple[int, int], names: int) -> Floats:
    """Rows of left, top, right, bottom, score and class from the outputs. Raises `RefusedFile`."""
    found = outputs[0][0] if outputs[0].ndim == 3 and len(outputs[0]) == 1 else outputs[0]
    if found.ndim != 2:
        raise RefusedFile("It does not answer boxes in a layout that is known here.")
    count, numbers = found.shape
    if numbers == 7 and outputs[0].ndim == 2:  # image, box, class, score
        return found[:, [1, 2, 3, 4, 6, 5]]
    if numbers == 6 and count <= _MOST_FINAL:
        return found
    masks = outputs[1].shape[1] if len(outputs) > 1 and outputs[1].ndim == 4 else 0
    if 5 <= count - masks < numbers:
        classes = names if 0 < names <= count - 4 - masks else count - 4 - masks
        return _ranked(found[:2].T, found[2:4].T, found[4 : 4 + classes].T)
    if 6 <= numbers - masks < count:
        return _ranked(found[:, :2], found[:, 2:4], found[:, 4:5] * found[:, 5 : numbers - masks])
    raise RefusedFile("It does not answer boxes in a layout that is known here.")


def _ranked(middle: Floats, size: Floats, scores: Floats) -> Floats:
    """Rows of left, top, right, bottom, score and class from middles, sizes, and the scores of all classes."""
    best = scores.argmax(axis=1)
    score = np.take_along_axis(scores, best[:, None], axis=1)
    return np.concatenate([middle - size / 2, middle + size / 2, score, best[:, None]], axis=1).astype(np.float32)
