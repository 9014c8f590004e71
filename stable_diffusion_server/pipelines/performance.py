"""Makes loaded models faster without other weights: layout, oneDNN, the VAE's precision, compiling. Knows no jobs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional

Performance = Literal["off", "safe", "fast"]

# With fewer rows than this MKL, which has less to set up, is the faster one (4 against 13 µs for two).
_FEW_ROWS = 32


class OneDnnLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is read without its types
    """A linear layer by oneDNN, which PyTorch leaves to MKL otherwise: that uses half of what AMD's CPUs can do.

    For fp32 on the CPU without gradients. The weight stays as it is, for adapters and for what counts bytes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """… × in features → … × out features."""
        if input.numel() < _FEW_ROWS * self.in_features:
            return functional.linear(input, self.weight, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


class OneDnnConv2d(torch.nn.Conv2d):  # type: ignore[misc]  # as above
    """A convolution by oneDNN also where PyTorch thinks it too small: one picture, at most 20480 numbers.

    For fp32 on the CPU without gradients, padded with zeros.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows × in channels × height × width → rows × out channels × height × width."""
        sizes = (self.padding, self.stride, self.dilation, self.groups)
        made: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            input, self.weight, self.bias, *sizes, "none", [], ""
        )
        return made


def speed_up(pipeline: Any, controlnet: Any, device: torch.device, performance: Performance) -> None:
    """Change how the modules compute, in place, once they are where they live.

    `safe` lays convolutions out by channels last, multiplies by oneDNN on a CPU, and lets CUDA multiply fp32 matrices
    in TF32: rounding differs and nothing else. `fast` also holds a VAE that had to be fp32, since it overflows in fp16,
    in bf16, which has fp32's range, and compiles the denoiser's repeated blocks and the VAE's decoder: the first
    picture of each size waits for the compiler. What cannot be compiled, since a compiler is missing or fails, runs as
    it is, and a warning says so.
    """
    if performance == "off":
        return
    vae, denoiser = pipeline.vae, getattr(pipeline, "unet", None) or pipeline.transformer
    for module in (denoiser, vae, controlnet):
        if module is not None and any(isinstance(part, torch.nn.Conv2d) for part in module.modules()):
            module.to(memory_format=torch.channels_last)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        use_onednn(pipeline, controlnet)
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


def use_onednn(pipeline: Any, controlnet: Any) -> None:
    """Let the plain linear layers and convolutions of all fp32 parts compute by oneDNN.

    Whatever derives from the two stays as it is: it computes otherwise.
    """
    for module in [*pipeline.components.values(), controlnet]:
        if not isinstance(module, torch.nn.Module) or module.dtype != torch.float32:
            continue
        for part in module.modules():
            if type(part) is torch.nn.Linear:
                part.__class__ = OneDnnLinear
            elif type(part) is torch.nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
                part.__class__ = OneDnnConv2d
