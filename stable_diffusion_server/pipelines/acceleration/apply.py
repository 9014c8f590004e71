"""Makes loaded models faster without other weights: layout, oneDNN, precision, compiling, recordings. Knows no jobs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import structlog
import torch

from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner, record
from stable_diffusion_server.pipelines.acceleration.onednn import use_onednn
from stable_diffusion_server.pipelines.acceleration.torchscript import trace

_log = structlog.get_logger(__name__)


class Optimization(StrEnum):
    """One way to be faster.

    `layout`: convolutions channels last, on CUDA those of the VAE and of what is replayed. `onednn`: linear layers and
    convolutions of the CPU by oneDNN; they are not compiled then. `trace`: forward passes of the CPU without Python,
    for which threads would take turns. `tf32`: fp32 products on CUDA in TF32. `vae-bf16`: a VAE that had to be fp32 in
    bf16, on CUDA. `compile`: the denoiser's repeated blocks, for which the first picture of each size waits;
    `compile-whole`: the whole denoiser and the VAE's decoder, for which it waits a minute or more. `graphs`: forward
    passes replayed on CUDA.
    """

    LAYOUT = "layout"
    ONEDNN = "onednn"
    TF32 = "tf32"
    VAE_BF16 = "vae-bf16"
    COMPILE = "compile"
    COMPILE_WHOLE = "compile-whole"
    GRAPHS = "graphs"
    TRACE = "trace"


# `safe` changes nothing but rounding, and `trace` not even that.
PRESETS: Mapping[str, frozenset[Optimization]] = MappingProxyType(
    {
        "off": frozenset(),
        "safe": frozenset({Optimization.LAYOUT, Optimization.ONEDNN, Optimization.TF32, Optimization.TRACE}),
        "fast": frozenset(Optimization) - {Optimization.COMPILE_WHOLE},
    }
)


def optimizations_of(performance: str) -> frozenset[Optimization]:
    """The parts of levels and parts, named with commas between. Raises `ValueError` for other names."""
    names = performance.split(",")
    return frozenset[Optimization]().union(
        *(PRESETS[name] if name in PRESETS else {Optimization(name)} for name in names)
    )


def apply_optimizations(
    pipeline: Any, controlnet: Any, device: torch.device, performance: str, *, steady: bool = True
) -> list[CudaGraphRunner]:
    """Change how the modules compute, in place, once they are where they live; gives what is recorded of them.

    `performance` names a level or parts. What a device has no use for is left out, and so are graphs and traces where
    weights may change (`steady` is false), since they hold adapters as they were. What cannot be compiled, since a
    compiler is missing or fails, runs as it is, and a warning says so.
    """
    parts, cuda = optimizations_of(performance), device.type == "cuda"
    vae, denoiser = pipeline.vae, getattr(pipeline, "unet", None) or pipeline.transformer
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    if Optimization.TF32 in parts and cuda:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    # It overflows in fp16, and bf16 has the range of fp32.
    if Optimization.VAE_BF16 in parts and cuda and vae.config.force_upcast and vae.dtype == torch.float32:
        vae.to(torch.bfloat16)
    replayed = Optimization.GRAPHS in parts and cuda and steady
    if Optimization.LAYOUT in parts:
        # On CUDA our kernels take Python longer to launch than a denoiser takes for one picture, unless it is replayed.
        for module in (denoiser, vae, controlnet) if replayed or not cuda else (vae,):
            if module is not None and any(isinstance(part, torch.nn.Conv2d) for part in module.modules()):
                _lay_out(module, device)
    onednn = Optimization.ONEDNN in parts and device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn:
        use_onednn(pipeline, controlnet)
    else:  # the compiler takes none of oneDNN's modules
        _compile(denoiser, vae, parts)
    if Optimization.TRACE in parts and device.type == "cpu" and steady:
        for part in (denoiser, controlnet, vae.encoder, vae.decoder, *encoders):
            if part is not None:
                trace(part)
    if not replayed:
        return []
    return [record(part) for part in (denoiser, controlnet, *encoders) if part]


def _compile(denoiser: Any, vae: Any, parts: frozenset[Optimization]) -> None:
    if not parts & {Optimization.COMPILE, Optimization.COMPILE_WHOLE}:
        return
    from torch import _dynamo  # takes a second, and nobody else needs it

    # Not `fullgraph`, under which a failure of the compiler would be the caller's.
    _dynamo.config.suppress_errors = True
    if Optimization.COMPILE_WHOLE in parts:
        denoiser.forward = torch.compile(denoiser.forward)
        vae.decoder.compile()
    else:
        denoiser.compile_repeated_blocks()


def _lay_out(module: Any, device: torch.device) -> None:
    """Channels last; on CUDA only together with normalisations that take it: PyTorch's turn it around twice each."""
    if device.type != "cuda":
        module.to(memory_format=torch.channels_last)
        return
    try:
        from stable_diffusion_server.pipelines.acceleration.channels_last import (
            use_channels_last,  # Triton comes with CUDA alone
        )

        use_channels_last(module)
    except Exception as error:  # a missing compiler shows in many ways
        _log.warning("not laid out channels last", module=type(module).__name__, exc_info=error)
