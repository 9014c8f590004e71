"""The network of Real-ESRGAN's compact files (SRVGGNetCompact), of which the embedded upscaler is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from torch import Tensor, nn


class CompactNetwork(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Convolutions at the input's resolution, whose result is added to the input enlarged by repetition.

    The layers are named as in Real-ESRGAN's files: `body.0` to `body.N`, convolutions and PReLUs in turn. A pixel of
    the result depends on inputs at most `reach` pixels away.
    """

    def __init__(self, width: int, layers: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.reach = layers + 2
        parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(layers):
            parts += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        parts.append(nn.Conv2d(width, 3 * scale * scale, 3, padding=1))
        self.body = nn.ModuleList(parts)

    def forward(self, images: Tensor) -> Tensor:
        """Enlarge images, batch × 3 × height × width with values 0…1."""
        changed = images
        for part in self.body:
            changed = part(changed)
        base = images.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)
        return torch.add(F.pixel_shuffle(changed, self.scale), base)
