"""Weights of GGUF files are unpacked to the numbers that diffusers unpacks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stable_diffusion_server.pipelines.library.gguf_header import GGUF_BLOCKS
from stable_diffusion_server.pipelines.loading.gguf_blocks import UNPACKERS, unpack_blocks

pytestmark = pytest.mark.slow

_FUNCTION = re.compile(
    r"^def (?:to_uint32|split_block_dims|get_scale_min|dequantize_blocks_\w+)\(.*?(?=^def |^[A-Z_]+ =)", re.M | re.S
)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """The functions of diffusers; its module needs the package `gguf`, which is no dependency."""
    source = Path(diffusers.__file__).parent / "quantizers" / "gguf" / "utils.py"
    names: dict[str, Any] = {"torch": torch, "QK_K": 256, "K_SCALE_SIZE": 12}
    for function in _FUNCTION.findall(source.read_text()):
        exec(function, names)  # noqa: S102  # diffusers' own code
    return names


@pytest.mark.parametrize("kind", UNPACKERS)
def test_random_bytes_are_the_same_numbers(kind: str, theirs: dict[str, Any]) -> None:
    """Bit for bit, also where they are not finite."""
    weights, stored = GGUF_BLOCKS[kind]
    raw = torch.randint(0, 256, (64, 4 * stored), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dtype = None if kind == "BF16" else torch.float16
    expected = theirs[f"dequantize_blocks_{kind}"](raw.reshape(-1, stored), weights, stored, dtype).reshape(64, -1)
    torch.testing.assert_close(unpack_blocks(raw, kind).float(), expected.float(), rtol=0, atol=0, equal_nan=True)
