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
        if pixels <= self.whole_pixels or not hasattr(vae, "use_tiling"):
            yield
            return
        changed = self._settings(vae)
        before = {name: getattr(vae, name) for name in changed}
        vae.__dict__.update(changed)
        try:
            yield
        finally:
            vae.__dict__.update(before)

    def _settings(self, vae: Any) -> dict[str, Any]:
        """The attributes of a VAE that turn this tiling on; some have sides of squares, others heights and widths."""
        if hasattr(vae, "tile_sample_min_size"):
            side = min(self.side, vae.tile_sample_min_size) if vae.use_tiling else self.side
            scale = vae.tile_sample_min_size / vae.tile_latent_min_size
            return {"use_tiling": True, "tile_sample_min_size": side, "tile_latent_min_size": int(side / scale)}
        scale = vae.spatial_compression_ratio
        side = min(self.side, vae.tile_sample_min_height) if vae.use_tiling else self.side
        # Tiles begin at whole latents.
        stride = max(1, side * vae.tile_sample_stride_height // vae.tile_sample_min_height // scale) * scale
        settings: dict[str, Any] = {"use_tiling": True}
        for name, size in (("sample_min", side), ("sample_stride", stride), ("latent_min", side // scale)):
            names = (f"tile_{name}_height", f"tile_{name}_width")
            settings |= {one: size for one in names if hasattr(vae, one)}
        return settings


def runs_in_tiles(vae: Any, sides: tuple[int, int], kind: str) -> bool:
    """Whether the VAE takes pixels (`kind` is `sample`) or latents (`latent`) of these sides in tiles, as it is now."""
    return getattr(vae, "use_tiling", False) and max(sides) > getattr(vae, f"tile_{kind}_min_size", 0)


# All images whole.
WHOLE = VaeTiling()
