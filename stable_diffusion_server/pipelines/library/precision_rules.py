"""The precision of a file's weights, and whether this server can compute with them."""

from __future__ import annotations

from typing import NamedTuple

from stable_diffusion_server.pipelines.library.file_headers import TensorHeader

_NAMES = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2",
    "F8_E4M3FNUZ": "fp8_e4m3fnuz", "F8_E5M2FNUZ": "fp8_e5m2fnuz", "F4": "fp4",
}  # fmt: skip
# Types of files that are not quantized; whole numbers of 64 bits are positions.
_PLAIN = {"F64", "F32", "F16", "BF16", "I64"}
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# GGUF types that diffusers dequantises.
READABLE_GGUF = frozenset("f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs".split())
# Last parts of the names of tensors with scales of scaled fp8, in ComfyUI's two forms.
_SCALES = ("scale_weight", "weight_scale")


class Precision(NamedTuple):
    """The type that most weights have, whether they have scales, and why they cannot be read."""

    name: str
    scaled: bool = False
    reason: str = ""


def precision_of(header: TensorHeader) -> Precision:
    """The precision of the weights, by the bytes they take."""
    if header.container == "gguf":
        return _gguf_precision(header)
    if quantized := _quantized_by(header):
        return Precision(quantized, reason=f"has weights quantized as {quantized}, which is not read; take another one")
    known = {dtype: size for dtype, size in header.amounts.items() if dtype in _NAMES and size}
    if not known:
        return Precision("")
    dtype = max(known, key=lambda dtype: known[dtype])
    if dtype in _FP8:
        scaled = any(tail in header.tails for tail in _SCALES)
        why = "" if dtype in ("F8_E4M3", "F8_E5M2") else f"has weights of the type {_NAMES[dtype]}, which is not read"
        return Precision(_NAMES[dtype], scaled, why)
    return Precision(_NAMES[dtype])


def _gguf_precision(header: TensorHeader) -> Precision:
    """The type of most matrices' elements; files keep small tensors in F32 and some layers in a larger type."""
    elements = {dtype.lower(): number for dtype, number in header.amounts.items()}
    if not elements:
        return Precision("")
    name = max(elements, key=lambda name: elements[name])
    if unread := sorted(set(elements) - READABLE_GGUF):
        return Precision(name, reason=f"has weights of the GGUF type {unread[0]}, which is not read; take q8_0 or q4_k")
    return Precision(name)


def _quantized_by(header: TensorHeader) -> str:
    """The scheme of weights in whole numbers or in 4 bits; empty if there are none."""
    dtypes = set(header.amounts)
    if dtypes <= _PLAIN:
        return ""
    tails = header.tails
    if "absmax" in tails:
        return "nf4" if any("nf4" in tail for tail in tails) else "bitsandbytes"
    if "SCB" in tails:
        return "bitsandbytes int8"
    if "wscales" in tails or "smooth_factor" in tails or "smooth" in tails:
        return "svdquant (nunchaku)"
    if "qweight" in tails or "qzeros" in tails:
        return "gptq or awq"
    if "weight_scale_2" in tails or "F4" in dtypes:
        return "nvfp4"
    if "F8_E8M0" in dtypes:
        return "mxfp8"
    if any(tail in tails for tail in _SCALES) and not dtypes & set(_FP8):
        return "int8" if "I8" in dtypes else "an unknown type with scales"
    whole = sum(header.amounts.get(dtype, 0) for dtype in ("I8", "U8"))
    return "int8" if 2 * whole > sum(header.amounts.values()) else ""
