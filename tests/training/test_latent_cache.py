"""The latent cache: latents are read back with their scenes, at every size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training import captions, control, latent_cache, synthetic_shapes, vae

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for parts of four images, of two sizes."""
    monkeypatch.setattr(latent_cache, "RUNS", tmp_path)
    monkeypatch.setattr(latent_cache, "PART", 4)
    monkeypatch.setattr(latent_cache, "CYCLE", ((128, 128), (384, 256)))
    return tmp_path


@pytest.mark.parametrize("kind", list(captions.KIND_SHARES))
def test_every_kind_of_scene_is_written_and_read_alike(kind: str) -> None:
    """One JSON line holds a whole scene."""
    scene = captions.draw_scene(np.random.default_rng(0), kind)
    assert latent_cache.from_text(latent_cache.as_text(scene)) == scene


def test_a_batch_holds_latents_of_one_size_with_their_scenes(small: Path) -> None:
    """A later reader sees earlier batches and, after a refresh, new ones."""
    model = vae.build()
    latent_cache.fill(model, "some", 1)
    held = latent_cache.LatentCache("some")
    assert held.batch(2, np.random.default_rng(0)).size == (128, 128)
    latent_cache.fill(model, "some", 2)
    held.refresh()
    seen = {}
    for seed in range(8):
        batch = held.batch(2, np.random.default_rng(seed))
        assert len(batch.scenes) == len(batch.latents) >= 2
        seen[batch.size] = batch.latents.shape[1:]
    assert seen == {(128, 128): (4, 16, 16), (384, 256): (4, 32, 48)}
    with pytest.raises(ValueError, match="no edge maps"):
        held.batch(2, np.random.default_rng(0)).edges()


def test_edge_maps_come_back_as_they_were(small: Path) -> None:
    """A hint is 0 or 1 for every pixel, stored with its latents."""
    latent_cache.fill(vae.build(), "edges", 1, control.draw_loose, synthetic_shapes.edges)
    batch = latent_cache.LatentCache("edges").batch(2, np.random.default_rng(0))
    hints, latents = batch.edges()
    assert hints.shape[1:] == (1, 128, 128)
    assert set(hints.unique().tolist()) == {0.0, 1.0}
    assert latents.shape == batch.latents.shape
    assert batch.latents.dtype == torch.float32
