"""Measures encoding and decoding of pictures as they are drawn here: formats, efforts and sizes, on one core."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping

from PIL import Image

from benchmarks.servers import ROOT
from benchmarks.tables import Result, table

SIDES = (256, 512, 1024)
FORMATS: Mapping[str, Mapping[str, object]] = {
    **{f"WebP 85, method {n}": {"format": "WEBP", "quality": 85, "method": n} for n in range(7)},
    "JPEG 90": {"format": "JPEG", "quality": 90},
    **{f"PNG, level {n}": {"format": "PNG", "compress_level": n} for n in (0, 1, 3, 6, 9)},
}


def measure(rounds: int) -> Result:
    """Every format at every size, in turns; medians."""
    pictures = {side: [sized(part, side) for part in parts()] for side in SIDES}
    encode = {(name, side): list[float]() for name in FORMATS for side in SIDES}
    decode = {key: list[float]() for key in encode}
    size = dict.fromkeys(encode, 0.0)
    for _ in range(rounds):
        for name, side in encode:
            for picture in pictures[side]:
                target = io.BytesIO()
                encode[name, side].append(seconds(lambda p=picture, t=target, n=name: p.save(t, **FORMATS[n])))
                decode[name, side].append(seconds(lambda t=target: Image.open(t).load()))
                size[name, side] = len(target.getvalue()) / 1000
    rows = []
    for name in FORMATS:
        cells = [
            f"{1000 * statistics.median(encode[name, side]):.1f} / {1000 * statistics.median(decode[name, side]):.1f}"
            f" / {size[name, side]:.0f}"
            for side in SIDES
        ]
        rows.append((name, *cells))
    lines = ["Milliseconds of processor time to encode / to decode / KB, medians.", ""]
    return Result([*lines, *table(("format", *(f"{side}²" for side in SIDES)), rows), ""])


def parts() -> list[Image.Image]:
    """Four squares of a sheet of pictures that were drawn here."""
    sheet = Image.open(ROOT / "docs" / "contact-sheet-sdxl.png").convert("RGB")
    side = min(sheet.size) // 4
    return [sheet.crop((n * side, 0, (n + 1) * side, side)) for n in range(4)]


def sized(picture: Image.Image, side: int) -> Image.Image:
    """A square picture at another size, enlarged as the server does."""
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def seconds(work: Callable[[], object]) -> float:
    """Processor time of it, which other work on the machine leaves alone."""
    began = time.thread_time()
    work()
    return time.thread_time() - began
