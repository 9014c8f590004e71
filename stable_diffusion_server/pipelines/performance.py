"""Makes loaded models faster without other weights: memory layout, precision of the VAE, compilation. Knows no jobs."""

from __future__ import annotations

from typing import Any, Literal

import torch

Performance = Literal["off", "safe", "fast"]


def speed_up(pipeline: Any, controlnet: Any, device: torch.device, performance: Performance) -> None:
    """Change how the modules compute, in place, once they are where they live.

    `safe` lays convolutions out by channels last, and lets CUDA multiply fp32 matrices in TF32: rounding differs and
    nothing else. `fast` also holds a VAE that had to be fp32, since it overflows in fp16, in bf16, which has fp32's
    range, and compiles the denoiser's repeated blocks and the VAE's decoder: the first picture of each size waits for
    the compiler. What cannot be compiled, since a compiler is missing or fails, runs as it is, and a warning says so.
    """
    if performance == "off":
        return
    vae, denoiser = pipeline.vae, getattr(pipeline, "unet", None) or pipeline.transformer
    for module in (denoiser, vae, controlnet):
        if module is not None and any(isinstance(part, torch.nn.Conv2d) for part in module.modules()):
            module.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if performance == "fast":
        if vae.config.force_upcast and vae.dtype == torch.float32 and device.type == "cuda":
            vae.to(torch.bfloat16)
        from torch import _dynamo  # takes a second, and nobody else needs it

        # Not `fullgraph`, under which a failure of the compiler would be the caller's.
        _dynamo.config.suppress_errors = True
        denoiser.compile_repeated_blocks()
        vae.decoder.compile()
