"""Linear layers, convolutions and upsampling by oneDNN on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional

from stable_diffusion_server.pipelines.adapters.lora_hooks import is_changed
from stable_diffusion_server.pipelines.wrapping import current_tiling


def _by(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, scripted while tracing: a tracer records neither its branches nor non-tensor arguments."""
    return _scripted(function) if torch.jit.is_tracing() else function


@functools.cache
def _scripted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    scripted: Callable[..., torch.Tensor] = torch.jit.script(function)
    return scripted


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """… × in features → … × out features, in fp32 on the CPU, without gradients."""
    # For few rows MKL is faster (two rows: 4 against 13 µs).
    if input.numel() < 32 * weight.size(1):
        return functional.linear(input, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


def _convolution(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        input, weight, bias, padding, stride, dilation, groups, "none", [], ""
    )


class OneDnnLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is read without its types
    """A linear layer by oneDNN; PyTorch's default MKL reaches half the speed on AMD CPUs.

    For fp32 on the CPU without gradients. The weight keeps its layout, for LoRAs and for byte counts.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """… × in features → … × out features."""
        return _by(linear)(input, self.weight, self.bias)


class OneDnnConv2d(torch.nn.Conv2d):  # type: ignore[misc]  # as above
    """A convolution by oneDNN even below PyTorch's threshold (one image, at most 20480 numbers).

    For fp32 on the CPU without gradients, padded with zeros; PyTorch's in a pass that wraps.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows × in channels × height × width → rows × out channels × height × width."""
        if current_tiling() is not None:
            return super().forward(input)
        sizes = (self.padding, self.stride, self.dilation)
        return _by(_convolution)(input, self.weight, self.bias, *sizes, self.groups)


class OneDnnUpsample(Upsample2D):  # type: ignore[misc]  # as above
    """Nearest 2× upsampling and a 3 × 3 convolution as one transposed convolution: 4 products per number instead of 9.

    Several of the nine inputs of the kernel are copies of one number, so their weights are summed beforehand (compare
    sub-pixel convolution, Shi et al. 2016, arXiv 1609.05158). Needs a second copy of the weights, 16/9 as large. Equal
    to the stock block but for rounding.
    """

    @classmethod
    def take(cls, block: Upsample2D) -> None:
        """Convert a block in place."""
        block.__class__ = cls
        block._folded = _folded(block.conv.weight)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rows × channels × height × width to twice the height and width, or to `output_size`."""
        made: torch.Tensor
        if output_size is not None or is_changed(self.conv) or current_tiling() is not None:
            made = super().forward(hidden_states, output_size)
        else:
            made = functional.conv_transpose2d(hidden_states, self._folded, self.conv.bias, stride=2, padding=1)
        return made


def _folded(weight: torch.Tensor) -> torch.Tensor:
    """The kernel (in × out × 4 × 4) of the transposed convolution that equals upsampling and convolving with `weight`.

    `weight` is out × in × 3 × 3, for a padding of 1. The result sums the flipped kernel at the four copies of a number.
    """
    turned = weight.detach().flip(2, 3).transpose(0, 1)
    folded = turned.new_zeros(*turned.shape[:2], 4, 4)
    for row in (0, 1):
        for column in (0, 1):
            folded[:, :, row : row + 3, column : column + 3] += turned
    return folded.contiguous(memory_format=torch.channels_last)


def use_onednn(pipeline: Any, controlnet: Any) -> None:
    """Convert the plain linear layers, convolutions and upsampling blocks of all fp32 components to oneDNN.

    Subclasses are not changed, since they compute differently.
    """
    for module in [*pipeline.components.values(), controlnet]:
        if not isinstance(module, torch.nn.Module) or module.dtype != torch.float32:
            continue
        for part in module.modules():
            if type(part) is torch.nn.Linear:
                part.__class__ = OneDnnLinear
            elif type(part) is torch.nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
                part.__class__ = OneDnnConv2d
        for part in module.modules():
            if type(part) is Upsample2D and is_nearest_doubling(part) and _is_three_by_three(part.conv):
                OneDnnUpsample.take(part)


def is_nearest_doubling(block: Upsample2D) -> bool:
    """True for nearest-neighbour 2× upsampling followed by one convolution."""
    return (
        block.norm is None
        and block.use_conv
        and not block.use_conv_transpose
        and block.interpolate
        and block.name == "conv"
    )


def _is_three_by_three(convolution: torch.nn.Module) -> bool:
    return (
        type(convolution) is OneDnnConv2d
        and convolution.kernel_size == (3, 3)
        and convolution.stride == convolution.padding == convolution.dilation == (1, 1)
        and convolution.groups == 1
    )
