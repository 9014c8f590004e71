"""Enlarges images with the networks of upscaler files: keeps a few in memory, draws tile by tile."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
from cachetools import LRUCache

from stable_diffusion_server.errors import NotFinite, OutOfMemory
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.pipelines.loading.footprint import choose_device
from stable_diffusion_server.pipelines.upscaling.network import UpscalerNetwork, load_network
from stable_diffusion_server.pipelines.upscaling.tiles import TILE, Tile, plan_tiles, run_tiles
from stable_diffusion_server.pipelines.upscaling.upscaler_files import UpscalerFile

# Networks in memory; the largest files of today have 0.3 GB.
_KEPT = 2
# A network is run again on its own result until the size is reached, at most as often as AUTOMATIC1111 does.
_MOST_PASSES = 3
# Sides of tiles that are tried one after the other while the device is short of memory.
_SIDES = (TILE, TILE // 2)
# Networks reflect their input at its edges, which needs some pixels.
_LEAST_SIDE = 32


class ReportTiles(Protocol):
    """Receives how many tiles are done, out of how many. What it raises ends the work."""

    def __call__(self, done: int, total: int, /) -> None:
        """Receive the state after a tile."""


class NetworkUpscaler:
    """Enlarges images. Thread-safe: threads take turns tile by tile, so at most one tile is in the device's memory.

    The drawing of other requests goes on between tiles.
    """

    def __init__(self, device_name: str) -> None:
        self._device = choose_device(device_name)
        self._networks: LRUCache[str, UpscalerNetwork] = LRUCache(_KEPT)
        self._loading, self._turn = threading.Lock(), threading.Lock()

    def enlarge(self, file: UpscalerFile, pixels: Pixels, width: int, height: int, report: ReportTiles) -> Pixels:
        """Enlarge an image (uint8, height × width × 3) to a size of the same aspect ratio.

        What the network's factor exceeds or lacks, Lanczos adds. Raises `ModelLoadError` for an unusable file,
        `OutOfMemory`, and `NotFinite` for a result that is none.
        """
        network = self._network(file)
        for side in _SIDES:
            try:
                return self._passes(network, pixels, (width, height), side, report)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        raise OutOfMemory("The device has no memory left to enlarge the image, not even in small tiles.")

    def _network(self, file: UpscalerFile) -> UpscalerNetwork:
        with self._loading:
            network = self._networks.get(file.digest)
            if network is None:
                network = self._networks[file.digest] = load_network(file.path, self._device)
            return network

    def _passes(
        self, network: UpscalerNetwork, pixels: Pixels, size: tuple[int, int], side: int, report: ReportTiles
    ) -> Pixels:
        plans, total, finished = _plan(network, pixels, size, side), 0, 0
        total = sum(len(tiles) for tiles, _ in plans)

        def done() -> None:
            nonlocal finished
            finished += 1
            report(finished, total)

        report(0, total)
        for tiles, target in plans:
            pixels = run_tiles(lambda part: self._draw(network, part), pixels, network.scale, tiles, target, done)
        return pixels

    def _draw(self, network: UpscalerNetwork, part: Pixels) -> Pixels:
        """Enlarge a part by the network's factor."""
        height, width = part.shape[:2]
        missing = max(0, _LEAST_SIDE - height), max(0, _LEAST_SIDE - width)
        padded = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), "edge") if any(missing) else part
        with self._turn, torch.inference_mode():
            batch = torch.from_numpy(np.array(padded)).to(self._device)
            drawn = network.run(batch.permute(2, 0, 1)[None].float().div(255))[0].float()
            if not torch.isfinite(drawn).all():
                raise NotFinite("The upscaler's numbers are not finite.")
            whole = drawn.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
        return np.asarray(whole.numpy()[: height * network.scale, : width * network.scale])


def _plan(
    network: UpscalerNetwork, pixels: Pixels, size: tuple[int, int], side: int
) -> list[tuple[list[Tile], tuple[int, int]]]:
    """The tiles of each pass, and the size of its result."""
    plans: list[tuple[list[Tile], tuple[int, int]]] = []
    height, width = pixels.shape[:2]
    while True:
        tiles = plan_tiles(width, height, side, network.overlap, network.multiple)
        width, height = width * network.scale, height * network.scale
        reached = (width >= size[0] and height >= size[1]) or network.scale == 1
        last = reached or len(plans) + 1 == _MOST_PASSES
        plans.append((tiles, size if last else (width, height)))
        if last:
            return plans
