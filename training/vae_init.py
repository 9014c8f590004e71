"""Initialises the autoencoder with weights that average and interpolate.

From random weights, most of the training time went into learning that latents hold mean colours. This initialisation
computes the mean of 8 × 8 cells and their bilinear enlargement, so that training is only about edges. Two kinds of
layers are not linear. Group norms over all channels: two large constant channels keep the variance the same for every
image. SiLU: every colour is stored with its negative, and silu(x) − silu(−x) = x.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

CONSTANT = 16.0
"""Value of the constant channels."""
HELD = 8
"""Channels that are handed on everywhere: three colours with their negatives, two constants."""
MEAN = torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]])
MIDDLE = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
BILINEAR = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


def hand_on(layer: nn.Conv2d, kernel: Tensor) -> None:
    """Make a convolution apply a kernel to the reserved channels; the weights of the others start small."""
    layer.weight[HELD:] *= 0.2
    layer.weight[:, HELD - 2 : HELD] = 0
    layer.weight[:HELD] = 0
    for channel in range(HELD):
        layer.weight[channel, channel] = kernel
    layer.bias.zero_()


def calm(block: nn.Module) -> None:
    """Make the residual branches of a block small, and its shortcuts pass the reserved channels through."""
    for resnet in block.resnets:
        resnet.conv2.weight.mul_(0.05)
        resnet.conv2.bias.zero_()
        resnet.norm1.weight.fill_(CONSTANT / 2)
        resnet.norm1.weight[HELD - 2 : HELD] = 0.5
        if resnet.conv_shortcut is not None:
            hand_on(resnet.conv_shortcut, torch.ones(1, 1))


def take_in(layer: nn.Conv2d, share: float) -> None:
    """Make a first convolution write three channels, their negatives, and the constants."""
    layer.weight.mul_(0.2)
    layer.weight[:HELD] = 0
    layer.bias.zero_()
    for colour in range(3):
        layer.weight[2 * colour, colour] = share * MIDDLE
        layer.weight[2 * colour + 1, colour] = -share * MIDDLE
    layer.bias[HELD - 2] = CONSTANT
    layer.bias[HELD - 1] = -CONSTANT


def give_out(norm: nn.GroupNorm, layer: nn.Conv2d, gain: float) -> nn.Module:
    """Make a last convolution read the colours; returns the handle of a hook that measures the norm's spread once."""

    def scaled(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        spread = inputs[0].std()
        for colour in range(3):
            layer.weight[colour] = 0
            layer.weight[colour, 2 * colour] = gain * spread * MIDDLE
            layer.weight[colour, 2 * colour + 1] = -gain * spread * MIDDLE

    return norm.register_forward_hook(scaled)


@torch.no_grad()
def average_and_interpolate(model: AutoencoderKL, batch: Tensor) -> None:
    """Set a model's initial weights; ``batch`` (n × 3 × height × width, −1…1) is used to measure spreads."""
    encoder, decoder = model.encoder, model.decoder
    take_in(encoder.conv_in, 1.0)
    take_in(decoder.conv_in, 0.5)
    for block in (*encoder.down_blocks, encoder.mid_block, *decoder.up_blocks, decoder.mid_block):
        calm(block)
        for sampler in getattr(block, "downsamplers", None) or []:
            hand_on(sampler.conv, MEAN)
        for sampler in getattr(block, "upsamplers", None) or []:
            hand_on(sampler.conv, BILINEAR)
    for layer in (encoder.conv_out, decoder.conv_out):
        layer.bias.zero_()
    encoder.conv_out.weight[4:] *= 0.1
    encoder.conv_out.bias[4:] = -5
    handles = [
        give_out(encoder.conv_norm_out, encoder.conv_out, 2.0),
        give_out(decoder.conv_norm_out, decoder.conv_out, 1.0),
    ]
    model.decode(model.encode(batch).latent_dist.mean)
    for handle in handles:
        handle.remove()
