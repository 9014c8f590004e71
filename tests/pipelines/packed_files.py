"""Writes weights in packed formats: ComfyUI's scaled float8, and GGUF."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]


def scaled_float8(tensors: Tensors, form: str) -> tuple[Tensors, Tensors]:
    """The block matrices as ComfyUI scales them, and all tensors multiplied by their scales, in fp32.

    `form` is the older name of the scale (`scale_weight`), the newer (`weight_scale`), or the newer with a scale for
    each row (`rows`).
    """
    scaled: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "blocks." not in name:
            scaled[name] = plain[name] = tensor
            continue
        prefix = name.removesuffix("weight")
        largest = tensor.abs().amax(dim=1) if form == "rows" else tensor.abs().max().reshape(1)
        scale = (largest / 448).float()
        small = (tensor / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
        scaled[name], plain[name] = small, small.float() * scale.reshape(-1, 1)
        if form == "scale_weight":
            scaled |= {f"{prefix}scale_weight": scale, f"{prefix}scale_input": torch.ones(1)}
        else:
            mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            scaled |= {f"{prefix}weight_scale": scale.squeeze(), f"{prefix}comfy_quant": mark}
    if form == "scale_weight":
        scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return scaled, plain


Packed = dict[str, tuple[int, tuple[int, ...], bytes]]
_F32, _F16, _Q8_0 = 0, 1, 8


def quantize_q8_0(tensors: Tensors, mark: str) -> tuple[Packed, Tensors]:
    """Tensors as a GGUF file holds them, the matrices named with `mark` in Q8_0; and the numbers they stand for."""
    packed: Packed = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if tensor.ndim == 2 and mark in name and "relative" not in name:
            blocks = tensor.float().reshape(-1, 32)
            scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
            whole = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
            data = torch.cat([scale.view(torch.uint8).reshape(-1, 2), whole.view(torch.uint8)], dim=1)
            packed[name] = (_Q8_0, shape, data.numpy().tobytes())
            plain[name] = (scale * whole).float().reshape(shape)
        else:
            kind, stored = (_F16, tensor.half()) if tensor.ndim > 1 else (_F32, tensor.float())
            packed[name] = (kind, shape, stored.contiguous().numpy().tobytes())
            plain[name] = stored.float()
    return packed, plain


def gguf_file(file: Path, tensors: Packed, architecture: str) -> Path:
    """Write a GGUF file of version 3."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    offset, body = 0, b""
    for name, (kind, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        body += data + b"\0" * (-len(data) % 32)
        offset = len(body)
    file.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return file
