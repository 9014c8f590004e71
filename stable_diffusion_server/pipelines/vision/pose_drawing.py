"""Draws poses as OpenPose does, which ControlNets for poses were trained on: coloured limbs on black."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.onnx_network import Floats
from stable_diffusion_server.pipelines.vision.pose_keypoints import SEEN, Pose

# Pairs of joints of the body, and of a hand: a palm, and five fingers of four bones.
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_BONES = tuple(
    (0 if place == 0 else 4 * finger + place, 4 * finger + place + 1) for finger in range(5) for place in range(4)
)
# Colours of the joints of the body, and of its limbs: the wheel in steps of 20 degrees, brightness full.
_COLOURS = tuple(
    (red, green, blue)
    for red, green, blue in (
        (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
        (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
        (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
    )
)  # fmt: skip
# Half the width of a limb, radius of a joint, radius of a point of the face, width of a bone of the hand; in pixels.
_LIMB, _JOINT, _POINT, _BONE = 4, 4, 3, 2
_DIMMED = 0.6


def draw_poses(poses: Sequence[Pose], width: int, height: int, *, body: bool, hands: bool, face: bool) -> Pixels:
    """The chosen parts of poses on black; uint8, height × width × 3."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for pose in poses:
        if body:
            canvas = _with_body(canvas, pose.body)
    for pose in poses:
        for hand in pose.hands if hands else ():
            _draw_hand(canvas, hand)
        if face:
            for point in pose.face:
                if (place := _place(point)) is not None:
                    cv2.circle(canvas, place, _POINT, (255, 255, 255), -1)
    return canvas


def _with_body(canvas: Pixels, joints: Floats) -> Pixels:
    """The canvas with the limbs of a body, all dimmed, and its joints."""
    for (first, second), colour in zip(_LIMBS, _COLOURS, strict=False):
        start, end = _place(joints[first]), _place(joints[second])
        if start is not None and end is not None:
            middle = (start[0] + end[0]) // 2, (start[1] + end[1]) // 2
            along = math.hypot(start[0] - end[0], start[1] - end[1])
            angle = math.degrees(math.atan2(start[1] - end[1], start[0] - end[0]))
            limb = cv2.ellipse2Poly(middle, (int(along / 2), _LIMB), int(angle), 0, 360, 1)
            cv2.fillConvexPoly(canvas, np.array(limb, np.int32), colour)
    canvas = (canvas * _DIMMED).astype(np.uint8)
    for joint, colour in zip(joints, _COLOURS, strict=True):
        if (place := _place(joint)) is not None:
            cv2.circle(canvas, place, _JOINT, colour, -1)
    return canvas


def _draw_hand(canvas: Pixels, joints: Floats) -> None:
    for number, (first, second) in enumerate(_BONES):
        start, end = _place(joints[first]), _place(joints[second])
        if start is not None and end is not None:
            colour = [255 * part for part in colorsys.hsv_to_rgb(number / len(_BONES), 1.0, 1.0)]
            cv2.line(canvas, start, end, colour, _BONE)
    for joint in joints:
        if (place := _place(joint)) is not None:
            cv2.circle(canvas, place, _JOINT, (0, 0, 255), -1)


def _place(joint: Floats) -> tuple[int, int] | None:
    """Where a joint (x, y, score) is drawn, in whole pixels; `None` if it is not seen, or far outside."""
    x, y, score = (float(value) for value in joint)
    if score < SEEN or not (-32_000 < x < 32_000 and -32_000 < y < 32_000):
        return None
    return int(x), int(y)
