"""Runs a network over an image tile by tile, so that memory is bounded by the tile, whatever the image's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stable_diffusion_server.imaging import Pixels

# Pixels of the input around a tile that are drawn with it and cut off. The reach of a Real-ESRGAN network is some
# 350 pixels in theory; from 16 on its seams are below 1/255 (benchmarks/results/2026-12-01-upscaling.md).
OVERLAP = 32
# Side of a tile with its overlap, in pixels of the input.
TILE = 256
# Enlarges a part of an image, uint8, height × width × 3.
Run = Callable[[Pixels], Pixels]


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of the input that is drawn (`left` … `bottom`), and the part of it that is kept, in input pixels."""

    left: int
    top: int
    right: int
    bottom: int
    keep_left: int
    keep_top: int
    keep_right: int
    keep_bottom: int


def plan_tiles(width: int, height: int, tile: int = TILE, overlap: int = OVERLAP, multiple: int = 1) -> list[Tile]:
    """The tiles of an image, row by row; offsets are multiples of `multiple`. An image of one tile has no seams."""
    return [
        Tile(left, top, right, bottom, keep_left, keep_top, keep_right, keep_bottom)
        for top, bottom, keep_top, keep_bottom in _spans(height, tile, overlap, multiple)
        for left, right, keep_left, keep_right in _spans(width, tile, overlap, multiple)
    ]


def _spans(length: int, tile: int, overlap: int, multiple: int) -> Iterator[tuple[int, int, int, int]]:
    """Start and end of what is drawn and of what is kept, along one side. The last tile is as large as the others."""
    if length <= tile:
        yield 0, length, 0, length
        return
    overlap = math.ceil(overlap / multiple) * multiple
    step = max(multiple, (tile - 2 * overlap) // multiple * multiple)
    for start in range(0, length, step):
        end = min(length, start + step)
        stop = min(length, end + overlap)
        begin = min(start - overlap, (stop - tile) // multiple * multiple)
        yield max(0, begin), stop, start, end


def run_tiles(
    run: Run, pixels: Pixels, scale: int, tiles: list[Tile], size: tuple[int, int], done: Callable[[], None]
) -> Pixels:
    """Enlarge an image (uint8, height × width × 3) to `size`, its width and height.

    `run` enlarges a part by `scale`. Its result is brought to `size` before the next tile is drawn, so the image at
    the network's own size is never whole in memory. `done` is called after each tile; what it raises ends the work.
    """
    width, height = size
    result = np.empty((height, width, 3), np.uint8)
    own = pixels.shape[1] * scale, pixels.shape[0] * scale
    for tile in tiles:
        drawn = run(pixels[tile.top : tile.bottom, tile.left : tile.right])
        columns = _target(tile.left, tile.keep_left, tile.keep_right, scale, own[0] / width)
        rows = _target(tile.top, tile.keep_top, tile.keep_bottom, scale, own[1] / height)
        result[rows.start : rows.end, columns.start : columns.end] = _fitted(drawn, columns, rows, exact=own == size)
        done()
    return result


@dataclass(frozen=True, slots=True)
class _Target:
    """Start and end of a tile in the result, and the same as positions in the tile's drawn pixels."""

    start: int
    end: int
    begin: float
    stop: float


def _target(origin: int, keep_start: int, keep_end: int, scale: int, factor: float) -> _Target:
    """Where the kept part of a tile lies along one side; `factor` is the network's own size by that of the result.

    A pixel of the result belongs to the tile that keeps its middle.
    """
    start = math.ceil(keep_start * scale / factor - 0.5)
    end = math.ceil(keep_end * scale / factor - 0.5)
    return _Target(start, end, start * factor - origin * scale, end * factor - origin * scale)


def _fitted(drawn: Pixels, columns: _Target, rows: _Target, *, exact: bool) -> Pixels:
    """The kept part of a tile in the size of the result, by Lanczos, which also sees the pixels around it."""
    if exact:
        return drawn[round(rows.begin) : round(rows.stop), round(columns.begin) : round(columns.stop)]
    size = columns.end - columns.start, rows.end - rows.start
    if not all(size):
        return np.empty((size[1], size[0], 3), np.uint8)
    height, width = drawn.shape[:2]
    box = max(0.0, columns.begin), max(0.0, rows.begin), min(width, columns.stop), min(height, rows.stop)
    return np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.LANCZOS, box))
