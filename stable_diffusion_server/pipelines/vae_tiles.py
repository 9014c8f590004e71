"""Which images a VAE encodes and decodes whole, and how it runs in tiles for the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Sides of tiles in pixels; in smaller tiles most pixels would belong to the overlap.
USUAL_SIDE, SMALLEST_SIDE = 512, 64


@dataclass(frozen=True, slots=True)
class VaeTiling:
    """Images of more than `whole_pixels` pixels are encoded and decoded in tiles of `side` × `side` pixels.

    Both follow from the model and the memory that the device has, not from what is free: the same request gives the
    same picture at any time.
    """

    whole_pixels: int = sys.maxsize
    side: int = USUAL_SIDE

    def smaller(self) -> VaeTiling | None:
        """For an image that found no memory: all sizes in tiles, half as wide each time; `None` at the smallest."""
        if self.whole_pixels:
            return VaeTiling(0, self.side)
        return VaeTiling(0, self.side // 2) if self.side > SMALLEST_SIDE else None

    @contextmanager
    def applied(self, vae: Any, pixels: int) -> Iterator[None]:
        """Run a block with this tiling for an image of `pixels` pixels; tiling that VAE_TILING turned on stays on."""
        if pixels <= self.whole_pixels:
            yield
            return
        before = vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size
        side = min(self.side, vae.tile_sample_min_size) if vae.use_tiling else self.side
        scale = vae.tile_sample_min_size / vae.tile_latent_min_size
        vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = True, side, int(side / scale)
        try:
            yield
        finally:
            vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size = before


# All images whole.
WHOLE = VaeTiling()
