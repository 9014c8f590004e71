"""Which upsampling blocks of diffusers can be computed otherwise. Changes none."""

from __future__ import annotations

from diffusers.models.upsampling import Upsample2D


def is_nearest_doubling(block: Upsample2D) -> bool:
    """Whether a block doubles both sides by copies, and convolves then, and does nothing else."""
    return (
        block.norm is None
        and block.use_conv
        and not block.use_conv_transpose
        and block.interpolate
        and block.name == "conv"
    )
