"""Trains the autoencoder of the Flux model from that of the SDXL model (space-to-depth).

It shrinks sixteen times instead of eight, into 16 channels, which are the other's 4 with every square of
2 × 2 cells packed into one: the same latents, so that one cache serves both families, and a quarter of the
tokens for the transformer, which learns three times as fast. Both ends of it are the other's own; only
the coarsest blocks are new. They learn the other's latents and inner features first, then pictures.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL
from torch import Tensor

from training.captions import Rng
from training.latent_cache import LatentCache
from training.loop import RUNS, Plan, train
from training.vae import CHANNELS, WIDTHS, draw_batch, evening, measure, picture_loss, psnr, relaid

EXTRA = 96
"""Channels of the new, coarsest blocks."""


def build(source: AutoencoderKL) -> AutoencoderKL:
    """Return the autoencoder with everything of the source's that fits, its scale among it."""
    torch.manual_seed(12)
    depth = len(WIDTHS) + 1
    config = dict(source.config) | {
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
        "block_out_channels": (*WIDTHS, EXTRA),
        "latent_channels": 4 * CHANNELS,
    }
    model = AutoencoderKL(**{key: value for key, value in config.items() if not key.startswith("_")})
    own, fitting = model.state_dict(), {}
    for name, value in source.state_dict().items():
        head, found, rest = name.partition("decoder.up_blocks.")
        moved = f"{head}{found}{int(rest[0]) + 1}{rest[1:]}" if found else name
        if "mid_block" not in moved and own[moved].shape == value.shape:
            fitting[moved] = value
    model.load_state_dict(fitting, strict=False)
    return model


def features(model: AutoencoderKL, latents: Tensor, block: int) -> Tensor:
    """Return what a decoder holds after the first half of an up block."""
    held = model.decoder.mid_block(model.decoder.conv_in(latents))
    for up in model.decoder.up_blocks[:block]:
        held = up(held)
    return model.decoder.up_blocks[block].resnets[0](held, None)


def feature_loss(model: AutoencoderKL, source: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return how far the features are from the source's, relative to their spread; latents are unfolded."""
    with torch.no_grad():
        wanted = features(source, latents, 0)
    return F.mse_loss(features(model, F.pixel_unshuffle(latents, 2), 1), wanted) / wanted.var()


def vae_loss(model: AutoencoderKL, source: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the error of the encoder's latents from the source's folded ones and of pictures decoded from these.

    The decoder gets them slightly noised.
    """
    with torch.no_grad():
        wanted = F.pixel_unshuffle(source.encode(pictures).latent_dist.mean, 2)
    drawn = model.decode(wanted + 0.03 * torch.randn_like(wanted)).sample
    return picture_loss(drawn, pictures) + F.mse_loss(model.encode(pictures).latent_dist.mean, wanted)


def folded_sample(folder: Path) -> Tensor:
    """Return some packed latents of a cache, n × 16 × height × width: those of its first parts, which are of 256²."""
    parts = [np.load(path)["latents"] for path in sorted(folder.glob("[0-9][0-9][0-9][0-9].npz"))[:8]]
    return F.pixel_unshuffle(torch.from_numpy(np.concatenate(parts)).float(), 2)


@cache
def stretch(folder: Path) -> Tensor:
    """Return the matrix, 16 × 16, by which a cache's packed latents are multiplied before they are learned.

    Fine detail spreads a twentieth as far as colour does. Brought nearer to it, its error weighs in the
    denoiser's loss, and it is decided before the last step.
    """
    return evening(folded_sample(folder), 0.6, 0.01)


def fold(latents: Tensor) -> Tensor:
    """Turn stored latents, n × 4 × height × width, into the family's, n × 16 × height/2 × width/2, unscaled."""
    forth = stretch(RUNS / "pictures").to(latents.device)
    return torch.einsum("oc,nchw->nohw", forth, F.pixel_unshuffle(latents, 2))


def stretched(model: AutoencoderKL) -> AutoencoderKL:
    """Return a copy that makes and draws stretched latents, and tells their mean and spread as pipelines want it."""
    forth = stretch(RUNS / "pictures")
    latents = torch.einsum("oc,nchw->nohw", forth, folded_sample(RUNS / "pictures"))
    copy = relaid(model, forth.to(model.device))
    copy.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return copy


def run(plan: Plan, source: AutoencoderKL, fresh: bool = False) -> Path:
    """Train the decoder's features for a quarter of the steps, then both ends on pictures; return the path."""
    model = build(source).to(plan.device)
    store = LatentCache("pictures")

    def step_loss(step: int, rng: Rng) -> Tensor:
        if step < 0.25 * plan.steps:
            latents = store.batch(8, rng).latents.to(plan.device)
            return feature_loss(model, source, latents + 0.03 * torch.randn_like(latents))
        return vae_loss(model, source, draw_batch(False, rng).to(plan.device))

    def show(folder: Path) -> None:
        flat, every = measure(model, "flat", "one"), measure(model, None, None)
        drawn = measure_folded(model, source)
        with (folder / "figures.txt").open("a") as file:
            file.write(f"PSNR at 256²: flat {flat:.2f} dB, all {every:.2f} dB, from the other's latents {drawn:.2f}\n")
        stretched(model).save_pretrained(folder / "out")

    return train(plan, {"vae": model}, step_loss, show, fresh) / "out"


@torch.no_grad()
def measure_folded(model: AutoencoderKL, source: AutoencoderKL) -> float:
    """Return the PSNR in dB of what the model draws of the source's latents of held-out pictures."""
    batch = draw_batch(False, np.random.default_rng(90_001)).to(model.device)
    return psnr(model.decode(F.pixel_unshuffle(source.encode(batch).latent_dist.mean, 2)).sample.clamp(-1, 1), batch)
