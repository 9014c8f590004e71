"""Classifies pictures: by a network from an ONNX file, or from a folder of transformers."""

from __future__ import annotations

from typing import Any

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

_SIDE, _MOST_LABELS = 224, 1000


def classify_by_onnx(network: OnnxNetwork, pixels: Pixels) -> list[tuple[str, float]]:
    """Labels with scores from 0 to 1, the highest first, at most 1000.

    It gets ImageNet's normalization. Raises `RefusedFile`.
    """
    found = network.run(as_input(pixels, network.size_or(_SIDE, _SIDE), IMAGENET_MEAN, IMAGENET_STD))[0].ravel()
    names = network.labels()
    return _sorted(_shares(found), [names.get(number, str(number)) for number in range(found.size)])


def classify_by_folder(model: Any, processor: Any, pixels: Pixels) -> list[tuple[str, float]]:
    """Labels with scores from 0 to 1, the highest first, at most 1000, by a model of transformers."""
    import torch

    with torch.inference_mode():
        logits = model(**processor(images=pixels, return_tensors="pt")).logits[0].float().numpy()
    found = finite(np.asarray(logits, np.float32))
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    scores = np.asarray(1 / (1 + np.exp(-found)), np.float32) if several else _shares(found)
    names = model.config.id2label
    return _sorted(scores, [str(names.get(number, number)) for number in range(found.size)])


def _shares(found: Floats) -> Floats:
    """The softmax of logits; probabilities as they are."""
    if found.size == 0 or found.size > 100_000:
        raise RefusedFile("It does not answer scores of classes.")
    found = finite(found)
    if found.min() >= 0 and abs(float(found.sum()) - 1) < 1e-3:
        return found
    powers = np.exp(found - found.max())
    return np.asarray(powers / powers.sum(), np.float32)


def _sorted(scores: Floats, names: list[str]) -> list[tuple[str, float]]:
    order = np.argsort(-scores, kind="stable")[:_MOST_LABELS]
    return [(names[number][:100], float(scores[number])) for number in order]
