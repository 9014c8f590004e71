"""Makes files of textual inversion embeddings for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def vectors(count: int, width: int, seed: int = 1, size: float = 1.0) -> NDArray[np.float32]:
    """Random vectors, of the size of a CLIP's own with `size` 0.02."""
    return (np.random.default_rng(seed).standard_normal((count, width)) * size).astype(np.float32)


def embedding_file(file: Path, tensors: dict[str, NDArray[np.float32]], shape: list[int] | None = None) -> Path:
    """A safetensors file of float32 tensors; `shape` is written instead of the shapes."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        content = tensor.tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": shape or list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file
