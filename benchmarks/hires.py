"""Measures the sharpness of second passes of the embedded SDXL at 512², against plain pictures and painted ones.

`python -m benchmarks.hires FOLDER` writes the pictures into FOLDER and prints the table of
`benchmarks/results/…-hires.md`.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.app import create_app
from stable_diffusion_server.settings import Settings
from training.captions import draw_scene, say_scene
from training.vae import render

SIDE, PICTURES = 512, 12
Pixels = NDArray[np.uint8]
HALF = {"width": SIDE // 2, "height": SIDE // 2}
WAYS: dict[str, dict[str, Any]] = {
    "plain, 256² shown at 512² by Lanczos": HALF,
    "plain, asked for 512²": {"width": SIDE, "height": SIDE},
    "second pass after Lanczos, strength 0.3": {**HALF, "hires_scale": 2, "hires_strength": 0.3},
    "second pass after Lanczos, strength 0.6": {**HALF, "hires_scale": 2, "hires_strength": 0.6},
    "second pass after `embedded-2x`, strength 0.3": {
        **HALF, "hires_scale": 2, "hires_strength": 0.3, "hires_upscaler": "embedded-2x",
    },
    "second pass after `latent`, strength 0.6": {
        **HALF, "hires_scale": 2, "hires_strength": 0.6, "hires_upscaler": "latent",
    },
    "second pass after `latent-bicubic`, strength 0.75": {
        **HALF, "hires_scale": 2, "hires_strength": 0.75, "hires_upscaler": "latent-bicubic",
    },
}  # fmt: skip


def sharpness(pixels: Pixels) -> float:
    """Variance of the Laplacian of the grey picture."""
    return float(cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def gradient(pixels: Pixels) -> float:
    """The steepest 1 % of the gradients, in levels of 255 per pixel: how narrow the edges are."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(float)
    return float(np.percentile(np.hypot(*np.gradient(grey)), 99))


@contextmanager
def app_client() -> Iterator[TestClient]:
    """A client of an app with the embedded models and a folder of its own."""
    with TemporaryDirectory() as folder:
        settings = Settings(
            _env_file=None, local_bucket_dir=Path(folder, "bucket"), data_dir=Path(folder, "data"), log_level="error"
        )
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.5)
            yield client


def drawn(client: TestClient, prompt: str, seed: int, way: dict[str, Any]) -> Pixels:
    """A picture of a way, at 512²."""
    sent = {"prompt": prompt, "seed": seed, "num_inference_steps": 8, "format": "png", **way}
    answer = client.post("/create_and_upload_image", json=sent).raise_for_status()
    file = client.get(answer.json()["path"]).raise_for_status().content
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main() -> None:
    """Draw all pictures and print the table."""
    folder, rng = Path(sys.argv[1]), np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(rng, kind="one", style="flat") for _ in range(PICTURES)]
    columns = {"painted at 512²": [render(scene, SIDE, SIDE, rng) for scene in scenes]}
    with app_client() as client:
        for name, way in WAYS.items():
            columns[name] = [drawn(client, say_scene(scene, rng, 0.0), n, way) for n, scene in enumerate(scenes)]
    lines = ["| picture | variance of the Laplacian | steepest 1 % of gradients |", "| --- | --- | --- |"]
    for name, pictures in columns.items():
        laplacian, steep = (float(np.median([f(one) for one in pictures])) for f in (sharpness, gradient))
        lines.append(f"| {name} | {laplacian:.0f} | {steep:.1f} |")
        Image.fromarray(np.hstack(pictures[:4])).save(folder / f"{name.replace(' ', '-').replace('`', '')}.png")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
