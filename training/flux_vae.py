"""Trains the Flux family's autoencoder from the SDXL family's (space-to-depth).

It downsamples by 16 instead of 8, into 16 channels: the SDXL family's 4 channels with every square of 2 × 2 cells
packed into one cell. The latents are the same, so one cache serves both families. The transformer has a quarter of the
tokens and learns three times as fast. The outer layers are copied from the SDXL family's autoencoder; only the coarsest
blocks are new. They first learn its latents and inner features, then images.
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
    """Return the autoencoder with all weights of ``source`` that fit, and its scaling."""
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
    """Return a decoder's activations after the first residual block of an up block."""
    held = model.decoder.mid_block(model.decoder.conv_in(latents))
    for up in model.decoder.up_blocks[:block]:
        held = up(held)
    return model.decoder.up_blocks[block].resnets[0](held, None)


def feature_loss(model: AutoencoderKL, source: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the squared error of the features against the source's, relative to their variance.

    ``latents`` are not packed.
    """
    with torch.no_grad():
        wanted = features(source, latents, 0)
    return F.mse_loss(features(model, F.pixel_unshuffle(latents, 2), 1), wanted) / wanted.var()


def vae_loss(model: AutoencoderKL, source: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the sum of two losses: of the encoder's latents and of decoded images.

    The latents are compared with the source's packed latents. The decoder decodes those, with a little noise added.
    """
    with torch.no_grad():
        wanted = F.pixel_unshuffle(source.encode(pictures).latent_dist.mean, 2)
    drawn = model.decode(wanted + 0.03 * torch.randn_like(wanted)).sample
    return picture_loss(drawn, pictures) + F.mse_loss(model.encode(pictures).latent_dist.mean, wanted)


def folded_sample(folder: Path) -> Tensor:
    """Return packed latents of the cache's first 8 parts, which are of 256² images: n × 16 × height × width."""
    parts = [np.load(path)["latents"] for path in sorted(folder.glob("[0-9][0-9][0-9][0-9].npz"))[:8]]
    return F.pixel_unshuffle(torch.from_numpy(np.concatenate(parts)).float(), 2)


@cache
def stretch(folder: Path) -> Tensor:
    """Return the 16 × 16 matrix that multiplies a cache's packed latents before training.

    The spread of fine detail is a twentieth of that of colour. The matrix makes them more equal, so that errors in
    detail count in the denoiser's loss and detail is decided before the last step.
    """
    return evening(folded_sample(folder), 0.6, 0.01)


def fold(latents: Tensor) -> Tensor:
    """Convert cached latents, n × 4 × height × width, to the family's unscaled ones, n × 16 × height/2 × width/2."""
    forth = stretch(RUNS / "pictures").to(latents.device)
    return torch.einsum("oc,nchw->nohw", forth, F.pixel_unshuffle(latents, 2))


def stretched(model: AutoencoderKL) -> AutoencoderKL:
    """Return a copy that encodes to and decodes from stretched latents, with their mean and scale configured."""
    forth = stretch(RUNS / "pictures")
    latents = torch.einsum("oc,nchw->nohw", forth, folded_sample(RUNS / "pictures"))
    copy = relaid(model, forth.to(model.device))
    copy.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    return copy


def run(plan: Plan, source: AutoencoderKL, fresh: bool = False) -> Path:
    """Train the decoder's features for a quarter of the steps, then encoder and decoder on images; return the path."""
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
    """Return the PSNR in dB of held-out images that the model decodes from the source's latents."""
    batch = draw_batch(False, np.random.default_rng(90_001)).to(model.device)
    return psnr(model.decode(F.pixel_unshuffle(source.encode(batch).latent_dist.mean, 2)).sample.clamp(-1, 1), batch)
