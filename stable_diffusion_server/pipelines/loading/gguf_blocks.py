"""Unpacks the block formats of GGUF files.

The formats are those of ggml-quants.c (llama.cpp, MIT); the arithmetic in fp16 is that of diffusers' GGUF loader, so
that images are equal to the stock pipeline's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from stable_diffusion_server.pipelines.library.gguf_header import GGUF_BLOCKS

# The sixteen values of IQ4's weights.
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpack_blocks(raw: torch.Tensor, kind: str) -> torch.Tensor:
    """The fp16 (BF16: fp32) matrix of uint8 rows × bytes in the format `kind`, a key of `UNPACKERS`."""
    _, stored = GGUF_BLOCKS[kind]
    blocks = raw.reshape(-1, stored)
    return UNPACKERS[kind](blocks).reshape(len(raw), -1)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte `start` of each block: blocks × 1."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _shifted(values: torch.Tensor, shifts: tuple[int, ...]) -> torch.Tensor:
    """Bytes … × n shifted right by each of `shifts`: … × shifts × n."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=values.device)
    return values.unsqueeze(-2) >> by.reshape(-1, 1)


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """The low four bits of all bytes of a block, then the high ones."""
    return (_shifted(values, (0, 4)) & 15).flatten(1)


def _fifth_bits(values: torch.Tensor) -> torch.Tensor:
    """The 32 bits of four bytes of each block: blocks × 32."""
    bits = _shifted(values.unsqueeze(-1), (0, 1, 2, 3, 4, 5, 6, 7)) & 1
    return bits.flatten(1)


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).to(torch.int8) - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:]) | (_fifth_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (values.to(torch.int8) - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 8:]) | (_fifth_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * values + _half(blocks, 2)


def _k_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of six bits each, from twelve bytes: blocks × 8 each."""
    low, minimum, high = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    return (
        torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1),
        torch.cat([minimum & 63, (high >> 4) | ((minimum >> 2) & 48)], dim=1),
    )


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, values = blocks[:, :16], blocks[:, 16:80]
    scale, minimum = _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4)
    quarters = (_shifted(values.reshape(-1, 2, 32), (0, 2, 4, 6)) & 3).reshape(-1, 16, 16)
    return scale.unsqueeze(-1) * quarters - minimum.unsqueeze(-1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    high_bits, values, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    low = (_shifted(scales[:, :8], (0, 4)) & 15).flatten(1)
    high = (_shifted(scales[:, 8:], (0, 2, 4, 6)) & 3).flatten(1)
    scale = _half(blocks, 108) * ((low | (high << 4)).to(torch.int8) - 32)
    lows = (_shifted(values.reshape(-1, 2, 32), (0, 2, 4, 6)) & 3).reshape(-1, 16, 16)
    highs = (_shifted(high_bits, (0, 1, 2, 3, 4, 5, 6, 7)) & 1).reshape(-1, 16, 16) ^ 1
    return scale.unsqueeze(-1) * (lows.to(torch.int8) - (highs << 2).to(torch.int8))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    values = (_shifted(blocks[:, 16:].reshape(-1, 4, 32), (0, 4)) & 15).reshape(-1, 8, 32)
    return scale.unsqueeze(-1) * values - minimum.unsqueeze(-1)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    low = (_shifted(blocks[:, 48:].reshape(-1, 4, 32), (0, 4)) & 15).reshape(-1, 8, 32)
    high = _shifted(blocks[:, 16:48], (0, 1, 2, 3, 4, 5, 6, 7)) & 1
    return scale.unsqueeze(-1) * (low | (high << 4)) - minimum.unsqueeze(-1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = (_shifted(blocks[:, :128].reshape(-1, 2, 64), (0, 4)) & 15).reshape(-1, 8, 32)
    high = (_shifted(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6)) & 3).reshape(-1, 8, 32)
    values = ((low | (high << 4)).to(torch.int8) - 32).reshape(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return scale.unsqueeze(-1) * values


def _looked_up(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_LEVELS, dtype=torch.float16, device=nibbles.device)[nibbles.long()]


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _looked_up(_nibbles(blocks[:, 2:]))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    low = _shifted(blocks[:, 4:8].unsqueeze(-1), (0, 4)).flatten(1) & 15
    high = _shifted(blocks[:, 2:4].unsqueeze(-1), (0, 2, 4, 6)).flatten(1) & 3
    scale = _half(blocks, 0) * ((low | (high << 4)).to(torch.int8) - 32)
    values = (_shifted(blocks[:, 8:].reshape(-1, 8, 16), (0, 4)) & 15).reshape(-1, 8, 32)
    return scale.unsqueeze(-1) * _looked_up(values)


UNPACKERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
