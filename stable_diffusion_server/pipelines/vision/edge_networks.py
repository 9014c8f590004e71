"""Soft edges and line art by networks from ONNX files: HED, PiDiNet, TEED and those of informative drawings."""

from __future__ import annotations

import cv2
import numpy as np

from stable_diffusion_server.imaging import Pixels, thin_lines
from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile
from stable_diffusion_server.pipelines.vision.onnx_network import Floats, OnnxNetwork, as_input, finite

# Networks halve the image some times; AUTOMATIC1111 pads it to multiples of 64, and of 256 for anime line art.
_MULTIPLE, _ANIME_MULTIPLE = 64, 256
# Steps of the levels of "safe" edges, which hide what shines through.
_SAFE_STEPS = 2


def hed_edges(network: OnnxNetwork, pixels: Pixels) -> Floats:
    """The edges that HED finds, 0 to 1, height × width; it takes RGB from 0 to 255."""
    return _edges(network, pixels, (0.0,) * 3, (1 / 255,) * 3)


def pidinet_edges(network: OnnxNetwork, pixels: Pixels) -> Floats:
    """The edges that PiDiNet finds, 0 to 1, height × width; it takes BGR from 0 to 1."""
    return _edges(network, np.ascontiguousarray(pixels[..., ::-1]), (0.0,) * 3, (1.0,) * 3)


def line_art(network: OnnxNetwork, pixels: Pixels) -> Pixels:
    """White lines on black by a network that draws black ones on white, 0 to 1; uint8, height × width × 3."""
    maps = _maps(network, pixels, _MULTIPLE, (0.0,) * 3, (1.0,) * 3)
    return as_picture(1 - maps[-1])


def anime_line_art(network: OnnxNetwork, pixels: Pixels) -> Pixels:
    """White lines on black by a network that draws black ones on white, -1 to 1; uint8, height × width × 3."""
    maps = _maps(network, pixels, _ANIME_MULTIPLE, (0.5,) * 3, (0.5,) * 3)
    return as_picture(0.5 - maps[-1] * 0.5)


def safe_edges(edges: Floats) -> Floats:
    """Edges (0 to 1) in few steps, so that a ControlNet does not read hidden detail from faint levels."""
    return np.asarray(np.floor(edges * (_SAFE_STEPS + 1)).clip(0, _SAFE_STEPS) / _SAFE_STEPS, np.float32)


def scribbled(edges: Floats) -> Pixels:
    """Edges (0 to 1) as broad strokes of a pen; uint8, height × width × 3."""
    return np.repeat(thin_lines(np.ascontiguousarray(as_picture(edges)[..., 0]))[..., None], 3, axis=2)


def as_picture(levels: Floats) -> Pixels:
    """Levels from 0 to 1 as grey pixels, uint8, height × width × 3."""
    return np.repeat((levels * 255).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _edges(network: OnnxNetwork, pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Floats:
    """The last of several maps of edges, which joins the others; the sigmoid of their mean where they are logits."""
    maps = _maps(network, pixels, _MULTIPLE, mean, std)
    if all(part.min() >= 0 and part.max() <= 1 for part in maps):
        return maps[-1]
    logits = np.mean(maps, axis=0).clip(-60, 60)
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


def _maps(
    network: OnnxNetwork, pixels: Pixels, multiple: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[Floats]:
    """The outputs of a network that are one map each, at the size of the image. Raises `RefusedFile`.

    A network of any size gets the image padded by its border pixels, one of a fixed size gets it scaled.
    """
    height, width = pixels.shape[:2]
    if network.width is None and network.height is None:
        margins = ((0, -height % multiple), (0, -width % multiple), (0, 0))
        pixels = np.pad(pixels, margins, mode="edge")
    size = network.size_or(pixels.shape[1], pixels.shape[0])
    found = [finite(output) for output in network.run(as_input(pixels, size, mean, std))]
    flat = [output.reshape(output.shape[-2:]) for output in found if output.ndim >= 2 and output[..., 0, 0].size == 1]
    if not flat:
        raise RefusedFile("It does not answer a map of edges.")
    whole = (pixels.shape[1], pixels.shape[0])
    scaled = [cv2.resize(part, whole, interpolation=cv2.INTER_LINEAR) for part in flat]
    return [np.asarray(part[:height, :width], np.float32) for part in scaled]
