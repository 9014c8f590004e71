"""Runs a network from an ONNX file by ONNX Runtime, on the CPU and within the process for models."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.vision.onnx_file import MOST_BYTES, RefusedFile, check_onnx

# ImageNet's mean and standard deviation per channel, RGB, of values from 0 to 1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_NAMES_MAX, _SENTENCE = 65_536, 200
Floats = NDArray[np.float32]


class OnnxNetwork:
    """A network that takes one picture, 1 × 3 × height × width. Raises `RefusedFile`, also if it takes anything else.

    Weights in other files and libraries of custom operators are never loaded: the file is checked first, and ONNX
    Runtime gets bytes, without a place on the disk.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise RefusedFile("It needs ONNX Runtime: pip install onnxruntime.") from error
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise RefusedFile("It is not a file of 2 GB at most, which is all that ONNX Runtime reads as one.")
        data = path.read_bytes()
        check_onnx(data)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # The arena keeps what the largest picture took.
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self._session: Any = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except MemoryError:
            raise
        except Exception as error:  # its errors share no class
            raise RefusedFile(f"ONNX Runtime cannot load it: {str(error)[:_SENTENCE]}") from error
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else []
        if len(shape) != 4 or shape[1] != 3 or inputs[0].type not in _TYPES:
            raise RefusedFile("It does not take one picture, 1 × 3 × height × width.")
        self._name, self._type = inputs[0].name, _TYPES[inputs[0].type]
        height, width = (side if isinstance(side, int) and side > 0 else None for side in shape[2:])
        self.height: int | None = height
        self.width: int | None = width
        # Of the first output, as the file declares it: sides that it leaves open are texts or `None`.
        self.output_shape: tuple[object, ...] = tuple(self._session.get_outputs()[0].shape)

    def size_or(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that it takes; those given where it takes any."""
        return self.width or width, self.height or height

    def run(self, picture: Floats) -> list[Floats]:
        """Its outputs for a picture, float32, 3 × height × width. Raises `RefusedFile` if it fails."""
        given = np.ascontiguousarray(picture[None]).astype(self._type)
        try:
            outputs = self._session.run(None, {self._name: given})
        except MemoryError:
            raise
        except Exception as error:  # as above
            raise RefusedFile(f"It cannot compute: {str(error)[:_SENTENCE]}") from error
        arrays = [np.asarray(output) for output in outputs]
        if any(array.dtype.kind not in "fiu" for array in arrays):
            raise RefusedFile("It does not answer numbers.")
        return [array.astype(np.float32) for array in arrays]

    def labels(self) -> Mapping[int, str]:
        """The names of its classes by number, from its metadata `names`, as exporters of detectors write them."""
        text = self._session.get_modelmeta().custom_metadata_map.get("names", "")
        if not text or len(text) > _NAMES_MAX:
            return {}
        try:
            names = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return {}
        pairs = (
            enumerate(names) if isinstance(names, list | tuple) else names.items() if isinstance(names, dict) else ()
        )
        return {number: str(name)[:100] for number, name in pairs if isinstance(number, int)}


def as_input(
    pixels: Pixels,
    size: tuple[int, int],
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
    interpolation: int = cv2.INTER_AREA,
) -> Floats:
    """Pixels (uint8, height × width × 3) scaled to `size` (width, height), as 3 × height × width from 0 to 1.

    `mean` is subtracted, and the result divided by `std`, per channel.
    """
    if (pixels.shape[1], pixels.shape[0]) != size:
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=interpolation), np.uint8)
    values = pixels.astype(np.float32) / 255
    values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.asarray(values.transpose(2, 0, 1), np.float32)


def finite(values: Floats) -> Floats:
    """The values. Raises `RefusedFile` if some are not finite."""
    if not np.isfinite(values).all():
        raise RefusedFile("Its numbers are not finite.")
    return values
