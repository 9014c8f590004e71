"""Quantizes loaded weights to one byte each, or compresses them losslessly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.packed_weights import pack_layers, to_int8
from stable_diffusion_server.pipelines.loading.placement import Quantization

# The first compute capability of NVIDIA GPUs with float8 products.
FLOAT8_CAPABILITY = (8, 9)


def quantize_parts(modules: Iterable[torch.nn.Module], quantization: Quantization, device: torch.device) -> None:
    """Quantize the weights of `modules` to one byte each, except LoRAs. On the CPU, int8 needs no package.

    Raises `ModelLoadError` when the package is not installed or the machine does not support the format.
    """
    if quantization is Quantization.NONE:
        return
    quantize = _quantizer(quantization, device)
    for module in modules:
        quantize(module)


def _quantizer(quantization: Quantization, device: torch.device) -> Callable[[torch.nn.Module], None]:
    if quantization is Quantization.INT8 and device.type == "cpu":
        return lambda module: pack_layers(module, to_int8)
    if quantization in (Quantization.INT8, Quantization.FLOAT8):
        return _by_quanto(quantization)
    return _by_torchao(quantization)


def load_dfloat11(transformer: torch.nn.Module, path: str, device: torch.device) -> None:
    """Put the DFloat11 weights under `path` into `transformer` (Zhang et al. 2025, arXiv 2504.11651): bit-identical.

    Raises `ModelLoadError` without CUDA, whose kernels unpack them, or without the package.
    """
    if device.type != "cuda":
        raise ModelLoadError("DF11_MODEL_PATH needs a CUDA device: DFloat11 weights are unpacked there.")
    try:
        from dfloat11 import DFloat11Model  # it can be imported with CUDA only
    except ImportError as error:
        raise ModelLoadError("DF11_MODEL_PATH needs the package dfloat11 (pip install dfloat11[cuda12]).") from error
    try:
        DFloat11Model.from_pretrained(path, device="cpu", bfloat16_model=transformer)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"The weights of DF11_MODEL_PATH cannot be loaded ({type(error).__name__}).") from error


def _by_quanto(quantization: Quantization) -> Callable[[torch.nn.Module], None]:
    try:
        from optimum import quanto  # optional, and slow to import
    except ImportError as error:
        raise ModelLoadError("QUANTIZE needs the package optimum-quanto (pip install optimum-quanto).") from error
    kind = {Quantization.INT8: quanto.qint8, Quantization.FLOAT8: quanto.qfloat8}[quantization]

    def quantize(module: torch.nn.Module) -> None:
        quanto.quantize(module, weights=kind, exclude="*lora_*")
        quanto.freeze(module)

    return quantize


def _by_torchao(quantization: Quantization) -> Callable[[torch.nn.Module], None]:
    try:
        from torchao import quantization as torchao  # optional
    except ImportError as error:
        raise ModelLoadError(f"QUANTIZE={quantization} needs the package torchao (pip install torchao).") from error
    dynamic = quantization is Quantization.TORCHAO_FLOAT8_DYNAMIC
    if dynamic and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY):
        raise ModelLoadError(f"QUANTIZE={quantization} needs an NVIDIA GPU of compute capability 8.9 or later.")

    def config(module: Any) -> Any:
        match quantization:
            case Quantization.TORCHAO_INT8:
                return torchao.Int8WeightOnlyConfig()
            case Quantization.TORCHAO_FLOAT8:
                return torchao.Float8WeightOnlyConfig()
        # One scale per row, where the products support it: for bf16 only.
        granularity = torchao.PerRow() if module.dtype == torch.bfloat16 else torchao.PerTensor()
        return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity)

    def is_meant(layer: Any, name: str) -> bool:
        if not isinstance(layer, torch.nn.Linear) or "lora_" in name:
            return False
        # Float8 products need dimensions that are multiples of 16. Only the large inner layers are quantized, not the
        # input and output layers.
        return not dynamic or ("block" in name and layer.in_features % 16 == layer.out_features % 16 == 0)

    return lambda module: torchao.quantize_(module, config(module), filter_fn=is_meant)
