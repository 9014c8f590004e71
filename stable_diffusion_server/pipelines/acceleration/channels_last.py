"""diffusers modules that compute on channels-last tensors on CUDA.

Importing it requires Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional

from stable_diffusion_server.pipelines.acceleration.group_norm import GroupNorm, add_shifted, is_channels_last
from stable_diffusion_server.pipelines.acceleration.onednn import is_nearest_doubling
from stable_diffusion_server.pipelines.adapters.lora_hooks import is_changed


class Resnet(ResnetBlock2D):  # type: ignore[misc]  # diffusers is read without its types
    """A residual block whose normalisations include SiLU and biases; equal to the stock block but for rounding."""

    @classmethod
    def can_be(cls, block: ResnetBlock2D) -> bool:
        """Whether a block has the options that this implementation supports."""
        return (
            type(block.norm1) is type(block.norm2) is GroupNorm
            and isinstance(block.nonlinearity, torch.nn.SiLU)
            and (block.time_emb_proj is None or block.time_embedding_norm == "default")
            and block.upsample is None
            and block.downsample is None
            and not block.skip_time_act
            and block.output_scale_factor == 1
        )

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes rows × channels × height × width, and the timestep embedding."""
        made, shift = _unbiased(self.conv1, self.norm1.activated(input_tensor))
        if self.time_emb_proj is not None:
            embedded = self.time_emb_proj(functional.silu(temb))
            shift = embedded if shift is None else embedded + shift
        made, shift = _unbiased(self.conv2, self.norm2.activated(made, shift))
        if self.conv_shortcut is not None:
            input_tensor, more = _unbiased(self.conv_shortcut, input_tensor)
            shift = more if shift is None else shift if more is None else shift + more
        if shift is None:
            return input_tensor + made
        if is_channels_last(made) and is_channels_last(input_tensor):
            return add_shifted(made, shift, input_tensor)
        return input_tensor + (made + shift[:, None, None])


class Transformer(Transformer2DModel):  # type: ignore[misc]  # as above
    """A UNet's transformer whose output stays channels last."""

    @classmethod
    def can_be(cls, block: Transformer2DModel) -> bool:
        """Whether a block has the options that this implementation supports."""
        return bool(block.is_input_continuous and block.use_linear_projection)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        made: torch.Tensor = self.proj_out(hidden_states).reshape(batch_size, height, width, inner_dim)
        return made.permute(0, 3, 1, 2) + residual


class Upsample(Upsample2D):  # type: ignore[misc]  # as above
    """Nearest 2× upsampling that copies several channels at once; PyTorch copies single numbers."""

    can_be = staticmethod(is_nearest_doubling)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rows × channels × height × width to twice the height and width, or to `output_size`."""
        made: torch.Tensor
        if output_size is not None or hidden_states.shape[1] % 8 != 0 or not is_channels_last(hidden_states):
            made = super().forward(hidden_states, output_size)
            return made
        rows, _, height, width = hidden_states.shape
        wide = hidden_states.permute(0, 2, 3, 1).view(torch.float64)[:, :, None, :, None, :]
        doubled = wide.expand(rows, height, 2, width, 2, -1).reshape(rows, 2 * height, 2 * width, -1)
        made = self.conv(doubled.view(hidden_states.dtype).permute(0, 3, 1, 2))
        return made


def use_channels_last(module: torch.nn.Module) -> None:
    """Convert a network to channels last, with blocks that keep the layout.

    Subclasses of the plain classes are not changed. Raises Triton's errors when it cannot compile, before anything is
    changed.
    """
    _try_out(module)
    module.to(memory_format=torch.channels_last)
    parts = list(module.modules())
    for part in parts:
        if type(part) is torch.nn.GroupNorm and part.affine:
            part.__class__ = GroupNorm
    for part in parts:
        for stock, ours in ((ResnetBlock2D, Resnet), (Transformer2DModel, Transformer), (Upsample2D, Upsample)):
            if type(part) is stock and ours.can_be(part):
                part.__class__ = ours


def _unbiased(layer: torch.nn.Module, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a convolution without its bias, and the bias; for a layer with a LoRA the output and `None`."""
    if type(layer) is torch.nn.Conv2d and not is_changed(layer):
        return layer._conv_forward(given, layer.weight, None), layer.bias
    return layer(given), None


def _try_out(module: torch.nn.Module) -> None:
    """Normalise a small tensor, so that a missing compiler is noticed here and not in a request."""
    parameter = next(module.parameters())
    norm = GroupNorm(2, 32, device=parameter.device, dtype=parameter.dtype)
    small = torch.zeros(1, 32, 8, 8, device=parameter.device, dtype=parameter.dtype)
    with torch.inference_mode():
        norm(small.to(memory_format=torch.channels_last))
