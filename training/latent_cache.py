"""Stores encoded images and their scenes on disk.

Rendering and encoding an image costs more than a training step on it, so one process does it once. The denoisers read
the finished parts while it continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from training.captions import Rng, draw_scene, pick, say_scene
from training.loop import RUNS
from training.synthetic_landscapes import Landscape
from training.synthetic_shapes import Picture, Scene, Thing
from training.tokenization import OUTSIDE
from training.vae import render, to_tensor

SIZES: dict[tuple[int, int], float] = {
    (256, 256): 0.86,
    (384, 256): 0.05,
    (256, 384): 0.05,
    (192, 192): 0.02,
    (128, 128): 0.02,
}
"""Width and height with the share of training steps that are of it."""
PART = 256
"""Pictures in a part; every part holds one size."""
CYCLE = ((256, 256),) * 12 + ((384, 256), (256, 384), (192, 192), (128, 128))
"""The sizes of sixteen parts that follow one another."""


def as_text(scene: Scene | Landscape) -> str:
    """Serialize a scene as JSON."""
    return json.dumps(asdict(scene))


def from_text(line: str) -> Scene | Landscape:
    """Parse a scene that ``as_text`` wrote."""
    fields = json.loads(line)
    if "things" not in fields:
        return Landscape(**fields)
    return Scene(**fields | {"things": tuple(Thing(**thing) for thing in fields["things"])})


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Sequence[Picture]) -> Tensor:
    """Return the unscaled latents of images of one size, n × 4 × height/8 × width/8, in half precision."""
    device = next(vae.parameters()).device
    parts = [
        vae.encode(to_tensor(list(pictures[at : at + 16])).to(device)).latent_dist.mean
        for at in range(0, len(pictures), 16)
    ]
    return torch.cat(parts).half().cpu().contiguous()


def make_part(
    vae: AutoencoderKL,
    path: Path,
    size: tuple[int, int],
    rng: Rng,
    draw: Callable[[Rng], Scene | Landscape],
    hint_of: Callable[[Picture], Picture] | None,
    twin_of: Callable[[Scene | Landscape, Rng], Scene | Landscape] | None,
) -> None:
    """Render and encode one part, and write it atomically."""
    scenes = [draw(rng) for _ in range(PART)]
    seeds = [int(seed) for seed in rng.integers(0, 2**31, PART)]
    pictures = [render(scene, *size, np.random.default_rng(seed)) for scene, seed in zip(scenes, seeds, strict=True)]
    kept = {"latents": encode(vae, pictures).numpy(), "scenes": np.array([as_text(scene) for scene in scenes])}
    if hint_of:
        hints = [hint_of(picture) for picture in pictures]
        kept["hints"] = np.packbits(np.stack(hints)[..., 0] > 127, axis=-1)
        kept["hint latents"] = encode(vae, hints).numpy()
    if twin_of:
        twins = [
            render(twin_of(scene, rng), *size, np.random.default_rng(seed))
            for scene, seed in zip(scenes, seeds, strict=True)
        ]
        kept["twin latents"] = encode(vae, twins).numpy()
    beside = path.with_suffix(".new.npz")
    np.savez(beside, **kept)
    beside.replace(path)


def fill(
    vae: AutoencoderKL,
    name: str,
    parts: int,
    draw: Callable[[Rng], Scene | Landscape] = draw_scene,
    hint_of: Callable[[Picture], Picture] | None = None,
    twin_of: Callable[[Scene | Landscape, Rng], Scene | Landscape] | None = None,
) -> None:
    """Create the missing ones of the first ``parts`` parts of a cache.

    ``hint_of`` computes the edge map stored with an image's latents. ``twin_of`` changes a scene into its twin,
    which is rendered with the same random numbers.
    """
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in trange(parts, desc=name, mininterval=10):
        path = folder / f"{number:04d}.npz"
        if not path.exists():
            size = CYCLE[number % len(CYCLE)]
            make_part(vae, path, size, np.random.default_rng((77, number)), draw, hint_of, twin_of)


@dataclass(frozen=True)
class Batch:
    """Images of one size, width and height: unscaled latents, n × 4 × height/8 × width/8, and their scenes.

    If the cache has edge maps, ``hints`` holds them, n × 1 × height × width, 0 or 1, and ``hint_latents`` their
    latents, encoded as white on black. If it has twins, ``twins`` holds their latents.
    """

    size: tuple[int, int]
    latents: Tensor
    scenes: list[Scene | Landscape]
    hints: Tensor | None = None
    hint_latents: Tensor | None = None
    twins: Tensor | None = None

    def edges(self) -> tuple[Tensor, Tensor]:
        """Return the edge maps and their latents. Raises `ValueError` if the cache has none."""
        if self.hints is None or self.hint_latents is None:
            raise ValueError("this cache has no edge maps")
        return self.hints, self.hint_latents


class LatentCache:
    """The existing parts of a cache, in memory; ``refresh`` reads new ones."""

    def __init__(self, name: str) -> None:
        self.folder = RUNS / name
        self.read: set[str] = set()
        self.parts: dict[tuple[int, int], list[dict[str, NDArray[Any]]]] = {}
        self.scenes: dict[tuple[int, int], list[list[Scene | Landscape]]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the parts written since the last call."""
        for path in sorted(self.folder.glob("[0-9][0-9][0-9][0-9].npz")):
            if path.name in self.read:
                continue
            with np.load(path) as held:
                part = {name: held[name] for name in held.files}
            height, width = part["latents"].shape[2:]
            lines = part.pop("scenes")
            self.parts.setdefault((width * 8, height * 8), []).append(part)
            self.scenes.setdefault((width * 8, height * 8), []).append([from_text(str(line)) for line in lines])
            self.read.add(path.name)

    def gather(self, size: tuple[int, int], name: str, places: list[tuple[int, int]]) -> NDArray[Any]:
        """Return one stored array of the images at ``places`` (part, number)."""
        return np.stack([self.parts[size][part][name][number] for part, number in places])

    def batch(self, count: int, rng: Rng) -> Batch:
        """Sample a batch of one size.

        ``count`` is for 256²; smaller images come in larger batches and larger ones in smaller.
        """
        there = {size: share for size, share in SIZES.items() if size in self.parts}
        shares = np.array(list(there.values()))
        size = list(there)[int(rng.choice(len(there), p=shares / shares.sum()))]
        few = max(4, round(count * min(2.0, 65536 / (size[0] * size[1]))))
        places = [divmod(int(at), PART) for at in rng.integers(0, len(self.parts[size]) * PART, few)]
        latents = torch.from_numpy(self.gather(size, "latents", places)).float()
        scenes = [self.scenes[size][part][number] for part, number in places]
        if "twin latents" in self.parts[size][0]:
            twins = torch.from_numpy(self.gather(size, "twin latents", places)).float()
            return Batch(size, latents, scenes, twins=twins)
        if "hints" not in self.parts[size][0]:
            return Batch(size, latents, scenes)
        hints = np.unpackbits(self.gather(size, "hints", places), axis=-1)
        encoded = torch.from_numpy(self.gather(size, "hint latents", places)).float()
        return Batch(size, latents, scenes, torch.from_numpy(hints)[:, None].float(), encoded)


def captions_of(scenes: Sequence[Scene | Landscape], rng: Rng, outside: float = 0.03) -> list[str]:
    """Write every scene's caption, plain or paraphrased; a share ``outside`` (0–1) gets unknown words instead."""
    said = []
    for scene in scenes:
        if rng.random() < outside:
            said.append(" ".join(pick(rng, OUTSIDE) for _ in range(int(rng.integers(0, 7)))))
        else:
            said.append(say_scene(scene, rng, pick(rng, (0.0, 0.2, 0.5))))
    return said


def held_out(kind: str | None, style: str | None, count: int, seed: int) -> list[Scene | Landscape]:
    """Return scenes from a seed that training never uses (training seeds are small numbers)."""
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, kind, style) for _ in range(count)]
