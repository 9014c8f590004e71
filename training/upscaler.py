"""Trains the embedded upscaler, which doubles the sides of an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_diffusion_server.pipelines.upscaling.compact import CompactNetwork
from training.captions import Rng, draw_scene
from training.loop import Plan, train
from training.synthetic_shapes import Picture, sheet
from training.vae import clouds, render

WIDTH, LAYERS, SCALE = 32, 8, 2
SIDE, CROPS = 96, 8
"""Side of a crop in pixels, and crops a step."""
FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
"""The filters that pictures are halved with; all of them blur before they leave pixels out."""
NAME = "embedded-2x.safetensors"


def halved(picture: Picture, resampling: Image.Resampling) -> Picture:
    """Halve both sides of a picture."""
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width // SCALE, height // SCALE), resampling))


def lanczos(picture: Picture) -> Picture:
    """Double both sides of a picture without a model."""
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width * SCALE, height * SCALE), Image.Resampling.LANCZOS))


def to_tensor(pictures: list[Picture]) -> Tensor:
    """Convert pictures of one size to a batch × 3 × height × width tensor in 0…1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255)


def to_picture(batch: Tensor) -> Picture:
    """Convert the first image of a tensor in 0…1 to a picture; values are clipped."""
    scaled = (batch[0].detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(1, 2, 0).contiguous().cpu().numpy()


def psnr(first: Picture, second: Picture) -> float:
    """Return the PSNR of two pictures in dB."""
    error = np.square(first.astype(np.float64) - second.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def measure(enlarge: Callable[[Picture], Picture], resampling: Image.Resampling, count: int = 24) -> float:
    """Return the mean PSNR in dB over held-out pictures of 256², halved with a filter and enlarged again."""
    rng = np.random.default_rng(90_101)
    pictures = [render(draw_scene(rng), 256, 256, rng) for _ in range(count)]
    return float(np.mean([psnr(enlarge(halved(picture, resampling)), picture) for picture in pictures]))


def draw_picture(side: int, rng: Rng) -> Picture:
    """Sample a training picture: mostly scenes, some smooth clouds."""
    return clouds(side, side, rng) if rng.random() < 0.03 else render(draw_scene(rng), side, side, rng)


def draw_batch(rng: Rng) -> tuple[Tensor, Tensor]:
    """Return crops of pictures, halved and whole; each with an edge in it, if its picture has one."""
    small, whole = [], []
    while len(whole) < CROPS:
        side = int(rng.choice((192, 256, 256, 384)))
        picture = draw_picture(side, rng)
        for _ in range(2):
            crops = []
            for _ in range(4):
                top, left = rng.integers(0, (side - SIDE) // SCALE + 1, 2) * SCALE
                crops.append(picture[top : top + SIDE, left : left + SIDE])
            crop = max(crops, key=lambda part: float(part.std()))
            whole.append(crop)
            small.append(halved(crop, FILTERS[int(rng.integers(len(FILTERS)))]))
    return to_tensor(small), to_tensor(whole)


def run(plan: Plan, fresh: bool = False) -> Path:
    """Train the upscaler; save it in half precision in the folder ``out`` and return that path."""
    torch.manual_seed(71)
    model = CompactNetwork(WIDTH, LAYERS, SCALE).to(plan.device)
    for layer in model.body:
        if isinstance(layer, nn.Conv2d):  # torch's own initialisation halves the signal with every layer
            nn.init.kaiming_normal_(layer.weight, a=0.25)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(model.body[-1].weight, std=0.002)

    def step_loss(step: int, rng: Rng) -> Tensor:
        small, whole = draw_batch(rng)
        enlarged, whole = model(small.to(plan.device)), whole.to(plan.device)
        return (enlarged - whole).abs().mean() + 20 * F.mse_loss(enlarged, whole)

    @torch.inference_mode()
    def enlarge(picture: Picture) -> Picture:
        return to_picture(model(to_tensor([picture]).to(plan.device)))

    def show(folder: Path) -> None:
        with (folder / "figures.txt").open("a") as file:
            for resampling in FILTERS:
                ours, plain = measure(enlarge, resampling), measure(lanczos, resampling)
                file.write(f"PSNR at 256², halved by {resampling.name}: {ours:.2f} dB, Lanczos {plain:.2f} dB\n")
        rng = np.random.default_rng(90_102)
        pictures = [halved(draw_picture(256, rng), Image.Resampling.BICUBIC) for _ in range(6)]
        rows = [lanczos(picture) for picture in pictures] + [enlarge(picture) for picture in pictures]
        Image.fromarray(sheet(rows, 6)).save(folder / "samples.png")
        (folder / "out").mkdir(exist_ok=True)
        half = {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()}
        save_file(half, folder / "out" / NAME, {"modelspec.title": "Embedded 2x", "modelspec.license": "MIT"})

    return train(plan, {"upscaler": model}, step_loss, show, fresh) / "out"
