"""Modules of diffusers that take tensors laid out channels last as they are, on CUDA. Knows no jobs.

Import it where Triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional

from stable_diffusion_server.pipelines.group_norm import GroupNorm


class Resnet(ResnetBlock2D):  # type: ignore[misc]  # diffusers is read without its types
    """A residual block whose normalisations bring SiLU along; equal to the stock block but for rounding."""

    @classmethod
    def can_be(cls, block: ResnetBlock2D) -> bool:
        """Whether a block is of the kind that the models here are made of."""
        return (
            isinstance(block.nonlinearity, torch.nn.SiLU)
            and (block.time_emb_proj is None or block.time_embedding_norm == "default")
            and block.upsample is None
            and block.downsample is None
            and not block.skip_time_act
        )

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rows × channels × height × width, and rows × channels of what the timestep says."""
        made: torch.Tensor = self.conv1(self.norm1.activated(input_tensor))
        if self.time_emb_proj is not None:
            made = made + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        made = self.conv2(self.norm2.activated(made))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        made = input_tensor + made
        return made if self.output_scale_factor == 1 else made / self.output_scale_factor


def lay_out(module: torch.nn.Module) -> None:
    """Lay a network's convolutions out channels last, with normalisations that keep it so.

    Whatever derives from the plain classes stays as it is. Raises whatever Triton does where it cannot compile, before
    anything is changed.
    """
    _try_out(module)
    module.to(memory_format=torch.channels_last)
    parts = list(module.modules())
    for part in parts:
        if type(part) is torch.nn.GroupNorm and part.affine:
            part.__class__ = GroupNorm
    for part in parts:
        if type(part) is ResnetBlock2D and type(part.norm1) is type(part.norm2) is GroupNorm and Resnet.can_be(part):
            part.__class__ = Resnet


def _try_out(module: torch.nn.Module) -> None:
    """Normalise a small tensor: a compiler that is missing shows here, and not in a caller's picture."""
    parameter = next(module.parameters())
    norm = GroupNorm(2, 32, device=parameter.device, dtype=parameter.dtype)
    small = torch.zeros(1, 32, 8, 8, device=parameter.device, dtype=parameter.dtype)
    with torch.inference_mode():
        norm(small.to(memory_format=torch.channels_last))
