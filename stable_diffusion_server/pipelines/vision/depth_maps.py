"""Depth and normals as control images: near is white, and normals point to the viewer in blue."""

from __future__ import annotations

import math
from typing import Any, Protocol

import cv2
import numpy as np

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile
from stable_diffusion_server.pipelines.vision.onnx_network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Floats,
    OnnxNetwork,
    as_input,
    finite,
)

# Depth-Anything's size where a file takes any: the shorter side, and what both sides are multiples of.
_SIDE, _MULTIPLE = 518, 14
# Share of the depth below which differences are rounding.
_FLAT = 1e-4
# Levels of depth that make a slope of 45 degrees.
_SLOPE = 2 * math.pi


class DepthNetwork(Protocol):
    """Estimates depth."""

    def nearness(self, pixels: Pixels) -> Floats:
        """How near each pixel is, float32, height × width, in any unit; larger is nearer."""


class OnnxDepth:
    """A network of depth from an ONNX file: ImageNet's normalization, one map of relative inverse depth."""

    def __init__(self, network: OnnxNetwork) -> None:
        self._network = network

    def nearness(self, pixels: Pixels) -> Floats:
        """How near each pixel is; see `DepthNetwork`. Raises `RefusedFile`."""
        height, width = pixels.shape[:2]
        scale = _SIDE / min(height, width)
        sides = (max(_MULTIPLE, round(side * scale / _MULTIPLE) * _MULTIPLE) for side in (width, height))
        size = self._network.size_or(*sides)
        outputs = self._network.run(as_input(pixels, size, IMAGENET_MEAN, IMAGENET_STD, cv2.INTER_CUBIC))
        found = np.squeeze(outputs[0])
        if found.ndim != 2:
            raise RefusedFile("It does not answer one map of depth.")
        return np.asarray(cv2.resize(finite(found), (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


class FolderDepth:
    """A network of depth from a folder of transformers; metric depth is turned into nearness."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model = model
        self._processor = processor
        config = model.config
        self._metric = config.model_type in ("zoedepth", "glpn") or (
            getattr(config, "depth_estimation_type", "relative") == "metric"
        )

    def nearness(self, pixels: Pixels) -> Floats:
        """How near each pixel is; see `DepthNetwork`. Raises `RefusedFile`."""
        import torch

        inputs = self._processor(images=pixels, return_tensors="pt")
        with torch.inference_mode():
            outputs = self._model(**inputs)
        sizes = [(pixels.shape[0], pixels.shape[1])]
        found = self._processor.post_process_depth_estimation(outputs, target_sizes=sizes)[0]["predicted_depth"]
        depth = finite(np.asarray(found.float().numpy(), np.float32))
        return -depth if self._metric else depth


def depth_map(network: DepthNetwork, pixels: Pixels) -> Pixels:
    """The depth of an image as grey, the nearest white and the farthest black; uint8, height × width × 3."""
    grey = np.rint(_levels(network.nearness(pixels))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def normal_map(network: DepthNetwork, pixels: Pixels, background: float) -> Pixels:
    """The normals of an image from its depth; uint8, height × width × 3: red right, green down, blue to the viewer.

    What is farther than the share `background` of the depth, 0 to 1, is a wall that faces the viewer.
    """
    levels = _levels(network.nearness(pixels))
    x = np.asarray(cv2.Sobel(levels, cv2.CV_32F, 1, 0, ksize=3))
    y = np.asarray(cv2.Sobel(levels, cv2.CV_32F, 0, 1, ksize=3))
    far = levels < background * 255
    x[far], y[far] = 0, 0
    return encode_normals(np.stack([x, y, np.full_like(x, _SLOPE)], axis=2))


def network_normals(network: OnnxNetwork, pixels: Pixels) -> Pixels:
    """The normals that an ONNX network estimates, 3 × height × width; uint8, height × width × 3."""
    height, width = pixels.shape[:2]
    size = network.size_or(*(max(32, round(side / 32) * 32) for side in (width, height)))
    found = np.squeeze(network.run(as_input(pixels, size, IMAGENET_MEAN, IMAGENET_STD))[0])
    # Some answer a fourth channel, the concentration.
    if found.ndim != 3 or found.shape[0] not in (3, 4):
        raise RefusedFile("It does not answer one map of normals.")
    normals = np.ascontiguousarray(finite(found)[:3].transpose(1, 2, 0))
    return encode_normals(np.asarray(cv2.resize(normals, (width, height), interpolation=cv2.INTER_LINEAR)))


def encode_normals(normals: Floats) -> Pixels:
    """Vectors of any length, float32, height × width × 3, as colours: -1 is 0, and 1 is 255."""
    length = np.sqrt((normals**2).sum(axis=2, keepdims=True))
    return np.asarray(np.clip(normals / np.maximum(length, 1e-6) * 127.5 + 127.5, 0, 255), np.uint8)


def _levels(nearness: Floats) -> Floats:
    """Nearness stretched to 0 … 255; zeros for a flat one."""
    least, most = float(nearness.min()), float(nearness.max())
    if most - least <= _FLAT * max(abs(least), abs(most)):
        return np.zeros_like(nearness)
    return np.asarray((nearness - least) * (255 / (most - least)), np.float32)
