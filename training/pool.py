"""Keeps encoded pictures with their scenes ready for the denoisers; knows the autoencoder, no denoiser.

Drawing and encoding a picture costs about as much as learning from it, so a pool is filled once and then a
few of its pictures are replaced at every step: what a denoiser sees is fresh, but not all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import trange

from training.grammar import Rng, draw_scene, pick, say_scene
from training.landscape import Landscape
from training.tokenization import OUTSIDE
from training.vae import render, to_tensor
from training.world import Picture, Scene

SIZES: dict[tuple[int, int], float] = {
    (256, 256): 0.84,
    (384, 256): 0.05,
    (256, 384): 0.05,
    (192, 192): 0.03,
    (128, 128): 0.03,
}
"""Width and height with the share of steps that train them."""


class Pool:
    """Latents and scenes by picture size, slowly renewed.

    ``hint_of`` turns a picture into what is kept beside its latents (an edge map), or is None.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        count: int,
        rng: Rng,
        draw: Callable[[Rng], Scene | Landscape] = draw_scene,
        hint_of: Callable[[Picture], Picture] | None = None,
    ) -> None:
        self.vae, self.draw, self.hint_of = vae, draw, hint_of
        self.latents: dict[tuple[int, int], Tensor] = {}
        self.scenes: dict[tuple[int, int], list[Scene | Landscape]] = {}
        self.hints: dict[tuple[int, int], list[Picture]] = {}
        for size, share in SIZES.items():
            parts = [self.encode(size, 8, rng) for _ in trange(max(2, round(count * share / 8)), leave=False)]
            self.latents[size] = torch.cat([part[0] for part in parts])
            self.scenes[size] = [scene for part in parts for scene in part[1]]
            self.hints[size] = [hint for part in parts for hint in part[2]]

    @torch.no_grad()
    def encode(
        self, size: tuple[int, int], count: int, rng: Rng
    ) -> tuple[Tensor, list[Scene | Landscape], list[Picture]]:
        """Draw and encode new pictures of one size: latents, scenes, hints."""
        scenes = [self.draw(rng) for _ in range(count)]
        pictures = [render(scene, *size, rng) for scene in scenes]
        device = next(self.vae.parameters()).device
        latents = self.vae.encode(to_tensor(pictures).to(device)).latent_dist.mean
        hints = [self.hint_of(picture) for picture in pictures] if self.hint_of else []
        return latents.contiguous(), scenes, hints

    def renew(self, size: tuple[int, int], count: int, rng: Rng) -> None:
        """Replace some pictures of one size by new ones."""
        latents, scenes, hints = self.encode(size, count, rng)
        for i, place in enumerate(rng.integers(0, len(self.scenes[size]), count)):
            self.latents[size][place] = latents[i]
            self.scenes[size][place] = scenes[i]
            if hints:
                self.hints[size][place] = hints[i]

    def batch(
        self, count: int, rng: Rng, small: float = 0.0, renewed: int = 3
    ) -> tuple[tuple[int, int], Tensor, list[Scene | Landscape], list[Picture]]:
        """Return a size with latents (n × channels × height/16 × width/16), scenes and hints.

        A share ``small`` (0–1) of the batches is of 128², the others follow ``SIZES``; ``count`` is for 256².
        """
        size = tuple(SIZES)[int(rng.choice(len(SIZES), p=list(SIZES.values())))]
        size = (128, 128) if rng.random() < small else size
        if renewed:
            self.renew(size, renewed, rng)
        few = max(4, round(count * min(2.0, 65536 / (size[0] * size[1]))))
        places = rng.integers(0, len(self.scenes[size]), few)
        hints = [self.hints[size][place] for place in places] if self.hint_of else []
        return size, self.latents[size][places], [self.scenes[size][place] for place in places], hints


def captions_of(scenes: Sequence[Scene | Landscape], rng: Rng, outside: float = 0.03) -> list[str]:
    """Say every scene, plainly or not; a share ``outside`` (0–1) gets unknown words instead."""
    said = []
    for scene in scenes:
        if rng.random() < outside:
            said.append(" ".join(pick(rng, OUTSIDE) for _ in range(int(rng.integers(0, 7)))))
        else:
            said.append(say_scene(scene, rng, pick(rng, (0.0, 0.2, 0.5))))
    return said


def held_out(kind: str | None, style: str | None, count: int, seed: int) -> list[Scene | Landscape]:
    """Return scenes drawn from a seed no training uses (training seeds are small numbers)."""
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, kind, style) for _ in range(count)]
