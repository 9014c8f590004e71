"""Trains the SDXL family's autoencoder, from which the Flux family's is made.

It downsamples by 8, into four channels. All later stages use its latents.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from training import synthetic_landscapes, synthetic_shapes
from training.captions import Rng, draw_scene
from training.loop import Plan, train
from training.vae_init import average_and_interpolate

WIDTHS = (8, 16, 32, 64)
CHANNELS = 4
FACTOR = 2 ** (len(WIDTHS) - 1)
SIZES = ((256, 256), (256, 256), (256, 256), (384, 256), (256, 384), (192, 192), (320, 192), (128, 128))
"""Width and height of whole pictures; each step draws one pair."""


def render(
    scene: synthetic_shapes.Scene | synthetic_landscapes.Landscape, width: int, height: int, rng: Rng
) -> synthetic_shapes.Picture:
    """Render either kind of scene."""
    if isinstance(scene, synthetic_landscapes.Landscape):
        return synthetic_landscapes.render(scene, width, height, rng)
    return synthetic_shapes.render(scene, width, height, rng)


def to_tensor(pictures: list[synthetic_shapes.Picture]) -> Tensor:
    """Convert images of one size to a batch × 3 × height × width tensor in −1…1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return stacked.contiguous(memory_format=torch.channels_last)


def to_pictures(batch: Tensor) -> list[synthetic_shapes.Picture]:
    """Convert a tensor in −1…1 to images; values are clipped."""
    scaled = ((batch.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def build() -> AutoencoderKL:
    """Return the untrained autoencoder (0.68 million parameters), initialised as averaging and interpolation."""
    torch.manual_seed(11)
    depth = len(WIDTHS)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    average_and_interpolate(model, draw_batch(False, np.random.default_rng(4)))
    return model


def clouds(width: int, height: int, rng: Rng) -> synthetic_shapes.Picture:
    """Return smooth random colours, so that the autoencoder also reproduces other images than scenes."""
    coarse = rng.integers(0, 256, (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def draw_picture(width: int, height: int, rng: Rng) -> synthetic_shapes.Picture:
    """Sample one training image: mostly scenes, some edge maps (for Flux's ControlNet), some random clouds."""
    kind = rng.random()
    if kind < 0.04:
        return clouds(width, height, rng)
    picture = render(draw_scene(rng), width, height, rng)
    return synthetic_shapes.edges(picture) if kind < 0.12 else picture


def draw_batch(cropped: bool, rng: Rng) -> Tensor:
    """Return a batch of 128-pixel crops (for the first phase) or of whole images of one size."""
    if cropped:
        crops = []
        for _ in range(8):
            picture = draw_picture(256, 256, rng)
            top, left = rng.integers(0, 129, 2)
            crops.append(picture[top : top + 128, left : left + 128])
        return to_tensor(crops)
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    count = max(2, round(4 * 65536 / (width * height)))
    return to_tensor([draw_picture(width, height, rng) for _ in range(min(count, 8))])


def slopes(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbouring pixels, vertical and horizontal."""
    return batch[..., 1:, :] - batch[..., :-1, :], batch[..., 1:] - batch[..., :-1]


def picture_loss(drawn: Tensor, batch: Tensor) -> Tensor:
    """Return L1 + 4 · L2 + half the L1 of the gradients."""
    down, across = slopes(drawn - batch)
    loss = (drawn - batch).abs().mean() + 4 * F.mse_loss(drawn, batch)
    return loss + 0.5 * (down.abs().mean() + across.abs().mean())


def loss_of(model: AutoencoderKL, batch: Tensor) -> Tensor:
    """Return the image loss, a small KL term, and a term that ties three channels to the mean colour of their cell."""
    posterior = model.encode(batch).latent_dist
    loss = picture_loss(model.decode(posterior.sample()).sample, batch)
    loss = loss + 1e-3 * posterior.kl().mean() / batch[0].numel()
    tie = F.mse_loss(posterior.mean[:, :3], 2 * F.avg_pool2d(batch, FACTOR))
    return loss + 0.05 * tie


@torch.no_grad()
def round_trip(model: AutoencoderKL, batch: Tensor) -> Tensor:
    """Encode and decode images without noise."""
    return torch.cat([model.decode(model.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in batch.split(8)])


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the mean over images of the PSNR in dB, for values in −1…1."""
    return float((-10 * ((first - second) / 2).pow(2).mean((1, 2, 3)).log10()).mean())


def measure(model: AutoencoderKL, style: str | None, kind: str | None, count: int = 24) -> float:
    """Return the round trip's PSNR in dB on held-out 256² images."""
    rng = np.random.default_rng(90_001)
    batch = to_tensor([render(draw_scene(rng, kind, style), 256, 256, rng) for _ in range(count)])
    return psnr(round_trip(model, batch), batch)


@torch.no_grad()
def relaid(model: AutoencoderKL, forth: Tensor) -> AutoencoderKL:
    """Return a copy whose latents are multiplied by a matrix, channels × channels, and have no noise.

    The change is linear, so it is merged into the convolutions on both sides of the latents and costs nothing.
    """
    copy, channels = deepcopy(model), len(forth)
    last, first = copy.encoder.conv_out, copy.decoder.conv_in
    last.weight[:channels] = torch.einsum("oc,cihw->oihw", forth, last.weight[:channels])
    last.bias[:channels] = forth @ last.bias[:channels]
    last.weight[channels:] = 0
    last.bias[channels:] = -20
    first.weight.copy_(torch.einsum("ochw,ci->oihw", first.weight, torch.linalg.inv(forth)))
    return copy


def evening(latents: Tensor, share: float, least: float) -> Tensor:
    """Return the symmetric matrix that equalises the variances of latents, n × channels × any.

    ``share`` is how far, in logarithms: 0 not at all, 1 completely. Variances below ``least`` are treated as
    ``least``.
    """
    values, vectors = torch.linalg.eigh(torch.cov(latents.transpose(0, 1).flatten(1).double()))
    return (vectors @ torch.diag(values.clamp(min=least) ** (-share / 2)) @ vectors.T).float()


@torch.no_grad()
def settled(model: AutoencoderKL) -> AutoencoderKL:
    """Return a copy whose latents have uncorrelated channels of unit variance and no noise.

    A denoiser's squared error then weighs the position of edges as much as brightness.
    """
    rng = np.random.default_rng(5)
    batches = [to_tensor([draw_picture(256, 256, rng) for _ in range(16)]) for _ in range(12)]
    device = next(model.parameters()).device
    latents = torch.cat([model.encode(batch.to(device)).latent_dist.mean for batch in batches])
    forth = evening(latents, 1.0, 1e-3)
    copy = relaid(model, forth)
    mean = float((forth @ latents.mean((0, 2, 3))).mean())
    copy.register_to_config(scaling_factor=1.0, shift_factor=mean)
    return copy


def run(plan: Plan, fresh: bool = False) -> Path:
    """Train the autoencoder, first mostly on crops; save it as ``out`` and return that path."""
    model = build().to(plan.device, memory_format=torch.channels_last)

    def step_loss(step: int, rng: Rng) -> Tensor:
        fraction = step / plan.steps
        cropped = rng.random() < (0.7 if fraction < 0.6 else 0.3)
        return loss_of(model, draw_batch(cropped, rng).to(plan.device))

    def show(folder: Path) -> None:
        flat, every = measure(model, "flat", "one"), measure(model, None, None)
        with (folder / "figures.txt").open("a") as file:
            file.write(f"PSNR at 256²: flat {flat:.2f} dB, all {every:.2f} dB\n")
        rng = np.random.default_rng(90_002)
        batch = to_tensor([draw_picture(256, 256, rng) for _ in range(12)])
        pairs = zip(to_pictures(batch), to_pictures(round_trip(model, batch)), strict=True)
        Image.fromarray(synthetic_shapes.sheet([picture for pair in pairs for picture in pair], 6)).save(
            folder / "samples.png"
        )
        settled(model).save_pretrained(folder / "out")

    return train(plan, {"vae": model}, step_loss, show, fresh) / "out"
