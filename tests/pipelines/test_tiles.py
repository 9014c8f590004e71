"""Which images a VAE encodes and decodes in tiles: by size and device, and one image alone where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, job_for, scene

from stable_diffusion_server.errors import OutOfMemory
from stable_diffusion_server.pipelines.loading.working_memory import pixels_per_latent
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest

pytestmark = pytest.mark.slow

JOB = job_for("sdxl", width=256, height=192, num_inference_steps=1)


@contextmanager
def room_for(vae: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[list[str]]:
    """Runs out of memory for more than `most` pixels at a time; yields what was tried."""
    tried: list[str] = []

    def limited(kind: str, work: Callable[..., Any], scale: int) -> Callable[..., Any]:
        def run(given: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            tried.append(kind)
            if given.shape[-1] * given.shape[-2] * scale**2 > most:
                raise torch.OutOfMemoryError("no memory")
            return work(given, *arguments, **more)

        return run

    with monkeypatch.context() as patched:
        patched.setattr(vae.decoder, "forward", limited("decode", vae.decoder.forward, pixels_per_latent(vae)))
        patched.setattr(vae.encoder, "forward", limited("encode", vae.encoder.forward, 1))
        yield tried


def finished(family: Any, job: DiffusionRequest) -> Any:
    """The image of a job, after as many shrinks as it needs."""
    state = family.prepare(job)
    while not state.done:
        family.step([state])
    while True:
        try:
            return family.finish(state)
        except OutOfMemory:
            if not family.shrink(state):
                raise


def test_one_shortage_changes_one_image_and_no_later_one(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that found no memory is decoded in tiles and says so; the same request again is as before."""
    before = finished(sdxl, JOB)
    with room_for(sdxl.pipeline.vae, monkeypatch, most=128 * 128):
        short = finished(sdxl, JOB)
    after = finished(sdxl, JOB)
    assert (before.tiled, short.tiled, after.tiled) == (False, True, False)
    assert np.array_equal(before.pixels, after.pixels)
    assert np.abs(short.pixels.astype(int) - before.pixels).mean() < 8
    assert not sdxl.pipeline.vae.use_tiling


def test_tiles_halve_until_they_are_small(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """512, 256, 128, 64 pixels; then there is nothing left to save, and the request fails."""
    tiling, sides = WHOLE, list[int]()
    while (smaller := tiling.smaller()) is not None:
        tiling = smaller
        sides.append(tiling.side)
    assert sides == [512, 256, 128, 64]
    with room_for(sdxl.pipeline.vae, monkeypatch, most=63 * 63), pytest.raises(OutOfMemory):
        finished(sdxl, JOB)
    assert not sdxl.pipeline.vae.use_tiling


def test_an_input_image_that_finds_no_memory_is_encoded_in_tiles(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image to image: this image says `tiled`, and the next request's does not."""
    job = replace(JOB, image=scene(256, 192), strength=0.5)
    with room_for(sdxl.pipeline.vae, monkeypatch, most=128 * 128) as tried:
        assert finished(sdxl, job).tiled
    assert tried[0] == "encode"
    assert not finished(sdxl, job).tiled


def test_large_images_are_decoded_in_tiles_and_small_ones_whole(sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tiling of the model, at any time: without the warning, and the same image each time."""
    whole = draw(sdxl, JOB)
    monkeypatch.setattr(sdxl, "tiling", VaeTiling(JOB.width * JOB.height - 1, 64))
    large, again = finished(sdxl, JOB), finished(sdxl, JOB)
    assert not large.tiled
    assert np.array_equal(large.pixels, again.pixels)
    assert not np.array_equal(large.pixels, whole)
    monkeypatch.setattr(sdxl, "tiling", VaeTiling(JOB.width * JOB.height, 64))
    assert np.array_equal(finished(sdxl, JOB).pixels, whole)
