"""Finds the joints of persons by DWPose: a YOLOX detector, and RTMPose's whole body, whose axes are classified apart.

SimCC (Li et al. 2022, arXiv 2107.03332): each joint has one row of values along x and one along y, two to a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile
from stable_diffusion_server.pipelines.vision.onnx_network import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Floats,
    OnnxNetwork,
    finite,
)
from stable_diffusion_server.pipelines.vision.vision_messages import FoundBox

# Of COCO-WholeBody: 17 of the body, 6 of the feet, 68 of the face, 21 of each hand.
JOINTS, _FACE, _LEFT_HAND, _RIGHT_HAND = 133, slice(23, 91), slice(91, 112), slice(112, 133)
# OpenPose's 18 joints of the body by COCO's; the neck, which COCO lacks, is between the shoulders.
_NECK, _SHOULDERS = 1, (5, 6)
_BODY = (0, 0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
# A joint below it is not drawn; the neck only if both shoulders are above it.
SEEN = 0.3
_PERSON_SCORE, _MOST_PERSONS, _PADDING = 0.3, 20, 1.25


class Pose:
    """The joints of one person, in pixels: x, y and score, float32, by OpenPose's order."""

    def __init__(self, joints: Floats) -> None:
        self.body: Floats = joints[list(_BODY)].copy()
        left, right = joints[_SHOULDERS[0]], joints[_SHOULDERS[1]]
        seen = float(min(left[2], right[2]) > SEEN)
        self.body[_NECK] = (*((left[:2] + right[:2]) / 2), seen)
        self.face: Floats = joints[_FACE]
        self.hands: tuple[Floats, Floats] = (joints[_LEFT_HAND], joints[_RIGHT_HAND])


def find_poses(network: OnnxNetwork, pixels: Pixels, boxes: Sequence[FoundBox]) -> list[Pose]:
    """The poses of the persons in boxes, those with the highest scores first; of the whole image without boxes.

    Raises `RefusedFile` if the network does not answer rows of COCO-WholeBody's joints.
    """
    height, width = pixels.shape[:2]
    persons = [box for box in boxes if box.label_number == 0 and box.score > _PERSON_SCORE][:_MOST_PERSONS]
    whole = FoundBox(0.0, 0.0, float(width), float(height), 1.0, 0, "person")
    return [Pose(_joints(network, pixels, box)) for box in persons or [whole]]


def _joints(network: OnnxNetwork, pixels: Pixels, box: FoundBox) -> Floats:
    """Joints × (x, y, score) of the person in a box, in pixels of the image."""
    width, height = network.size_or(288, 384)
    centre = np.array([box.left + box.right, box.top + box.bottom], np.float32) / 2
    sides = np.array([box.right - box.left, box.bottom - box.top], np.float32) * _PADDING
    scale = float(max(sides[0] / width, sides[1] / height, 1e-3))
    # Pixel (0, 0) of the part lies at `corner`.
    corner = centre - np.array([width, height], np.float32) * scale / 2
    back = np.array([[scale, 0, corner[0]], [0, scale, corner[1]]], np.float32)
    part = cv2.warpAffine(pixels, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    values = (np.asarray(part, np.float32) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    outputs = network.run(np.asarray(values.transpose(2, 0, 1), np.float32))
    if len(outputs) < 2 or any(output.ndim != 3 or output.shape[:2] != (1, JOINTS) for output in outputs[:2]):
        raise RefusedFile("It does not answer the 133 joints of a whole body.")
    along_x, along_y = finite(outputs[0][0]), finite(outputs[1][0])
    places = np.stack([along_x.argmax(axis=1), along_y.argmax(axis=1)], axis=1).astype(np.float32)
    scores = np.minimum(along_x.max(axis=1), along_y.max(axis=1))
    # The rows are as many times as fine as pixels of the part.
    fineness = np.array([along_x.shape[1] / width, along_y.shape[1] / height], np.float32)
    return np.concatenate([places / fineness * scale + corner, scores[:, None]], axis=1)
