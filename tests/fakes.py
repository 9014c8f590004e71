"""Small real stand-ins for large things: a denoiser that paints squares, settings in a test's own folder."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.engine import DenoiserCapabilities
from stable_diffusion_server.errors import NotFinite, QueueFull
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import DiffusionRequest

COLOURS = {
    "red": (215, 40, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 210),
    "yellow": (245, 215, 50),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
}


@dataclass(slots=True)
class Canvas:
    """State of a square while it is painted."""

    job: DiffusionRequest
    steps: int
    index: int = 0

    @property
    def shape(self) -> tuple[object, ...]:
        return self.job.shape

    @property
    def done(self) -> bool:
        return self.index >= self.steps


@dataclass(frozen=True, slots=True)
class FakePixels:
    """Result of the fake denoiser."""

    pixels: NDArray[np.uint8]
    redecoded: bool = False
    tiled: bool = False
    warnings: tuple[str, ...] = ()
    latents: NDArray[np.float32] | None = None


@dataclass
class FakeDenoiser(DenoiserCapabilities):
    """Paints the whole canvas in the first colour that the prompt names; its brightness depends on the seed.

    It counts its calls, and can be slowed down, held at a gate, or made to fail by words in a prompt.
    """

    seconds_per_step: float = 0.0
    gate: threading.Event | None = None
    prepared: list[DiffusionRequest] = field(default_factory=list)
    finished: list[DiffusionRequest] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)

    def count_tokens(self, model: str, prompt: str) -> int:
        return len(prompt.split()) + 2

    def prepare(self, job: DiffusionRequest) -> Canvas:
        if "unpreparable" in job.prompt:
            raise RuntimeError("cannot prepare this")
        self.prepared.append(job)
        return Canvas(job, job.num_inference_steps)

    def step(self, states: Sequence[Canvas]) -> None:
        self.batches.append([state.job.prompt for state in states])
        if self.gate is not None:
            assert self.gate.wait(30), "the test forgot to open the gate"
        time.sleep(self.seconds_per_step)
        if any("unsteppable" in state.job.prompt for state in states):
            raise RuntimeError("cannot step this")
        for state in states:
            state.index += 1

    def finish(self, state: Canvas) -> FakePixels:
        job = state.job
        self.finished.append(job)
        named = next((word for word in job.prompt.split() if word in COLOURS), "white")
        shade = np.array(COLOURS[named], np.int16) - job.seed % 16
        pixels = np.broadcast_to(shade.clip(0, 255).astype(np.uint8), (job.height, job.width, 3))
        latents = (
            np.full((4, job.height // 8, job.width // 8), job.seed % 16, np.float32) if job.keeps_latents else None
        )
        return FakePixels(np.ascontiguousarray(pixels), latents=latents)


def lora_file(file: Path, content: bytes = b"", layer: str = "unet.mid_block") -> Path:
    """A valid LoRA file that fits no model, with numbers derived from `content`."""
    data = content.ljust(32, b"\0")[:32]
    header = json.dumps(
        {
            f"{layer}.lora_{half}.weight": {
                "dtype": "F32",
                "shape": [2, 2],
                "data_offsets": [16 * number, 16 * number + 16],
            }
            for number, half in enumerate("AB")
        }
    ).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Settings whose bucket and state lie in `folder`, independent of the environment."""
    values: dict[str, Any] = {"local_bucket_dir": folder / "bucket", "data_dir": folder / "data", **changes}
    return Settings(_env_file=None, **values)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition; the bound only ends a hanging test."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@dataclass
class FakeImageDenoiser(FakeDenoiser):
    """Uses the images of a request, and can return defective images.

    An image is mixed with the colour by `strength`, except where a mask protects it; edges are drawn in white.
    `spoil` lists the defects of the next images in turn: `black`, `bumpy`, `very bumpy`, `not finite`, `busy`.
    """

    spoil: list[str] = field(default_factory=list)

    def finish(self, state: Canvas) -> FakePixels:
        job, fault = state.job, self.spoil.pop(0) if self.spoil else ""
        fine = super().finish(state)
        colour = fine.pixels
        match fault:
            case "not finite":
                raise NotFinite("The latents are not finite.")
            case "busy":
                raise QueueFull("Too many pictures wait.")
            case "black":
                return FakePixels(np.zeros_like(colour))
            case "bumpy" | "very bumpy":
                return FakePixels(bumpy_pixels(job.width, job.height, ends=0.05 if fault == "bumpy" else 0.2))
        if job.image is None:
            return FakePixels(colour, latents=fine.latents)
        mixed = (1 - job.strength) * job.image.pixels + job.strength * colour
        if job.mask is not None:
            mixed = np.where(job.mask.pixels[..., None] > 0, colour, job.image.pixels)
        if job.control is not None:
            mixed = np.where(job.control.pixels > 0, 255, mixed)
        return FakePixels(np.rint(mixed).astype(np.uint8), latents=fine.latents)


def bumpy_pixels(width: int, height: int, ends: float) -> NDArray[np.uint8]:
    """Noise of all levels, with that share of black pixels and as many white ones."""
    chance = np.random.default_rng(0)
    pixels = chance.integers(10, 246, (height, width, 3), dtype=np.uint8)
    where = chance.random((height, width))
    pixels[where < ends], pixels[where > 1 - ends] = 0, 255
    return pixels


def file_of(pixels: NDArray[np.uint8], file_format: str = "PNG", **options: Any) -> bytes:
    """An image file of an array."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, file_format, **options)
    return target.getvalue()


def disc(width: int = 96, height: int = 80, inside: str = "red", outside: str = "blue") -> NDArray[np.uint8]:
    """A disc in the middle of an image."""
    y, x = np.mgrid[:height, :width]
    within = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 4) ** 2
    return np.where(within[..., None], np.uint8(COLOURS[inside]), np.uint8(COLOURS[outside]))


def joined_retry(ask: Callable[[str], list[int]], squares: FakeDenoiser, count: int) -> None:
    """Check that a retry joins the running request that it repeats, and that others do not.

    `ask` sends one request for `count` images with this `x-stainless-retry-count`, and returns their seeds. `squares`
    has a gate.
    """
    assert squares.gate is not None
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, "0")
        until(lambda: bool(squares.batches))
        retry, other = pool.submit(ask, "1"), pool.submit(ask, "0")
        threading.Event().wait(0.5)
        squares.gate.set()
        seeds = [one.result(30) for one in (first, retry, other)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(squares.finished) == 2 * count
    assert ask("1") != seeds[0]
