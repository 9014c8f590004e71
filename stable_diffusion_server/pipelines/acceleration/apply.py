"""Applies the optimizations of PERFORMANCE to a loaded model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner, record
from stable_diffusion_server.pipelines.acceleration.onednn import use_onednn
from stable_diffusion_server.pipelines.acceleration.torchscript import trace
from stable_diffusion_server.pipelines.wrapping import is_altered

_log = structlog.get_logger(__name__)


class Optimization(StrEnum):
    """An optimization by its name in PERFORMANCE.

    `layout`: channels-last convolutions; on CUDA only in the VAE and in modules that use CUDA graphs. `onednn`: linear
    layers and convolutions on the CPU by oneDNN, which excludes compiling. `trace`: TorchScript on the CPU, so that
    threads do not wait for Python's lock. `tf32`: fp32 products on CUDA in TF32. `vae-bf16`: a VAE that overflows in
    fp16 runs in bf16 instead of fp32, on CUDA. `compile`: compiles the denoiser's repeated blocks, which delays the
    first image of each size; `compile-whole`: the whole denoiser and the VAE's decoder, which delays it by a minute or
    more. `graphs`: CUDA graphs.
    """

    LAYOUT = "layout"
    ONEDNN = "onednn"
    TF32 = "tf32"
    VAE_BF16 = "vae-bf16"
    COMPILE = "compile"
    COMPILE_WHOLE = "compile-whole"
    GRAPHS = "graphs"
    TRACE = "trace"


# `safe` changes only rounding.
PRESETS: Mapping[str, frozenset[Optimization]] = MappingProxyType(
    {
        "off": frozenset(),
        "safe": frozenset({Optimization.LAYOUT, Optimization.ONEDNN, Optimization.TF32, Optimization.TRACE}),
        "fast": frozenset(Optimization) - {Optimization.COMPILE_WHOLE},
    }
)


def optimizations_of(performance: str) -> frozenset[Optimization]:
    """The optimizations of a comma-separated list of presets and names. Raises `ValueError` for other names."""
    names = performance.split(",")
    return frozenset[Optimization]().union(
        *(PRESETS[name] if name in PRESETS else {Optimization(name)} for name in names)
    )


def apply_optimizations(
    pipeline: Any, controlnet: Any, device: torch.device, performance: str, *, traced: bool = True
) -> list[CudaGraphRunner]:
    """Optimize placed modules in place; returns the CUDA graph runners.

    `performance` is a comma-separated list. Optimizations that a device does not have are skipped. Passes
    with LoRAs, and those that wrap, run neither recorded nor compiled. Without `traced` nothing is traced: TorchScript
    never frees a trace, so that the model could not be unloaded. What cannot be compiled runs normally and a warning is
    logged.
    """
    parts, cuda = optimizations_of(performance), device.type == "cuda"
    vae: Any = getattr(pipeline, "vae", None)  # a pipeline without one has no optimizations, see the stock family
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    if Optimization.TF32 in parts and cuda:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    # It overflows in fp16, and bf16 has the range of fp32.
    if Optimization.VAE_BF16 in parts and cuda and vae.config.get("force_upcast") and vae.dtype == torch.float32:
        vae.to(torch.bfloat16)
    replayed = Optimization.GRAPHS in parts and cuda
    if Optimization.LAYOUT in parts:
        # On CUDA, launching our kernels from Python takes longer than the denoiser's pass, unless a graph replays it.
        for module in (denoiser, vae, controlnet) if replayed or not cuda else (vae,):
            if module is not None and any(isinstance(part, torch.nn.Conv2d) for part in module.modules()):
                _convert_layout(module, device)
    onednn = Optimization.ONEDNN in parts and device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn:
        use_onednn(pipeline, controlnet)
    else:  # the compiler takes none of oneDNN's modules
        _compile(denoiser, vae, parts)
    if Optimization.TRACE in parts and device.type == "cpu" and traced:
        for part in (denoiser, controlnet, vae.encoder, vae.decoder, *encoders):
            if part is not None:
                trace(part)
    if not replayed:
        return []
    return [record(part) for part in (denoiser, controlnet, *encoders) if part]


def _compile(denoiser: Any, vae: Any, parts: frozenset[Optimization]) -> None:
    if not parts & {Optimization.COMPILE, Optimization.COMPILE_WHOLE}:
        return
    from torch import _dynamo  # the import takes a second

    # Without `fullgraph`, a failure of the compiler falls back to eager mode.
    _dynamo.config.suppress_errors = True
    if Optimization.COMPILE_WHOLE in parts:
        denoiser.forward = _unless_altered(torch.compile(denoiser.forward), denoiser.forward)
        vae.decoder.compile()
        vae.decoder._compiled_call_impl = _unless_altered(vae.decoder._compiled_call_impl, vae.decoder._call_impl)
    else:
        denoiser.compile_repeated_blocks()
        for block in denoiser.modules():
            if block._compiled_call_impl is not None:
                block._compiled_call_impl = _unless_altered(block._compiled_call_impl, block._call_impl)


def _unless_altered(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """What was compiled, or in a pass that has LoRAs or wraps the module itself: compiled code looks for neither."""

    @functools.wraps(plain)  # diffusers inspects the signature
    def call(*args: Any, **kwargs: Any) -> Any:
        return (plain if is_altered() else compiled)(*args, **kwargs)

    return call


def _convert_layout(module: Any, device: torch.device) -> None:
    """Convert to channels last; on CUDA with normalisations that keep it, since PyTorch's convert it back and forth."""
    if device.type != "cuda":
        module.to(memory_format=torch.channels_last)
        return
    try:
        from stable_diffusion_server.pipelines.acceleration.channels_last import (
            use_channels_last,  # Triton is installed only with CUDA
        )

        use_channels_last(module)
    except Exception as error:  # a missing compiler raises many types
        _log.warning("not converted to channels last", module=type(module).__name__, exc_info=error)
