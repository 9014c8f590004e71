"""Measures upscalers on the CPU: PSNR of the embedded one, seams by overlap, seconds and memory by size.

`python -m benchmarks.upscaling` prints the tables of `benchmarks/results/…-upscaling.md`. Each size runs in a process
of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.pipelines import UpscalerFiles
from stable_diffusion_server.pipelines.upscaling.network import UpscalerNetwork, load_network
from stable_diffusion_server.pipelines.upscaling.tiles import plan_tiles, run_tiles
from stable_diffusion_server.pipelines.upscaling.upscaler import NetworkUpscaler
from training import upscaler as stage

ROOT = Path(__file__).parent.parent
SIZES = (512, 1024, 2048, 4096)
OVERLAPS = (2, 4, 8, 10, 16)
CPU = torch.device("cpu")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def drawn_by(network: UpscalerNetwork, part: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge a part without tiles."""
    with torch.inference_mode():
        batch = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None].float().div(255)
        whole = network.run(batch)[0].mul(255).round().clamp(0, 255).byte()
    return whole.permute(1, 2, 0).contiguous().numpy()


def largest_seam(network: UpscalerNetwork, pixels: NDArray[np.uint8], overlap: int) -> int:
    """The largest difference of a result in tiles of 96 pixels to the whole, in steps of 255."""
    height, width = pixels.shape[:2]
    tiles = plan_tiles(width, height, 96, overlap, network.multiple)
    size = width * network.scale, height * network.scale
    tiled = run_tiles(lambda part: drawn_by(network, part), pixels, network.scale, tiles, size, lambda: None)
    return int(np.abs(tiled.astype(int) - drawn_by(network, pixels)).max())


def measure_size(side: int) -> None:
    """Enlarge an image to `side`² and say what it took."""
    torch.set_num_threads(2)
    found = UpscalerFiles([ROOT / "models"]).find("embedded-2x", "upscaler")
    upscaler, half = NetworkUpscaler("cpu"), side // 2
    pixels = np.random.default_rng(0).integers(0, 256, (half, half, 3), np.uint8)
    upscaler.enlarge(found, pixels[:64, :64], 128, 128, lambda done, total: None)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    upscaler.enlarge(found, pixels, side, side, lambda done, total: None)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result = side * side * 3 / 2**20
    tiles = len(plan_tiles(half, half, overlap=10))
    seconds = time.perf_counter() - started
    say(f"| {half}² → {side}² | {tiles} | {seconds:.1f} | {grown:.0f} | {result:.0f} | {grown - result:.0f} |")


def main() -> None:
    """Print all tables."""
    if len(sys.argv) > 1:
        measure_size(int(sys.argv[1]))
        return
    torch.set_num_threads(2)
    path = ROOT / "models" / "embedded-upscaler" / "embedded-2x.safetensors"
    network = load_network(path, CPU)
    say("| halved by | embedded-2x, dB | Lanczos, dB |\n| --- | --- | --- |")
    for resampling in stage.FILTERS:
        ours = stage.measure(lambda small: drawn_by(network, small), resampling)
        say(f"| {resampling.name.lower()} | {ours:.2f} | {stage.measure(stage.lanczos, resampling):.2f} |")
    say("\n| overlap | largest seam, of 255 |\n| --- | --- |")
    pixels = np.random.default_rng(1).integers(0, 256, (150, 190, 3), np.uint8)
    for overlap in OVERLAPS:
        say(f"| {overlap} | {largest_seam(network, pixels, overlap)} |")
    say("\n| size | tiles | seconds | memory, MB | the result itself | beside it |")
    say("| --- | --- | --- | --- | --- | --- |")
    for side in SIZES:
        subprocess.run([sys.executable, "-m", "benchmarks.upscaling", str(side)], check=True)  # noqa: S603  # ourselves


if __name__ == "__main__":
    main()
