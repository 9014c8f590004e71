"""Every stage runs from its command line on the output of earlier stages, here for a step on tiny data."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stable_diffusion_server.pipelines.upscaling.network import load_network
from training import __main__ as command
from training import control, evaluate, flux, flux_vae, latent_cache, loop, lora, package, sdxl, text, upscaler, vae
from training.captions import draw_scene
from training.tokenization import make_clip, make_t5

pytestmark = pytest.mark.slow


def remember_samples(pipe: object, folder: Path) -> None:
    """Replaces the sample sheet, which needs fifty images."""
    (folder / "shown").touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the first stages: untrained encoders and autoencoders, with their tokenizers."""
    folder = tmp_path_factory.mktemp("runs")
    text.build_clip(make_clip(folder / "clip" / "out" / "tokenizer")).save_pretrained(
        folder / "clip" / "out" / "encoder"
    )
    text.build_t5(make_t5(folder / "t5" / "out" / "tokenizer")).save_pretrained(folder / "t5" / "out" / "encoder")
    source = vae.build()
    source.save_pretrained(folder / "vae" / "out")
    flux_vae.build(source).save_pretrained(folder / "vae-flux" / "out")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, runs: Path, tmp_path: Path) -> None:
    """Data of one part of four small images, and folders of the test's own."""
    for module in (command, flux_vae, loop, package, latent_cache, text):
        monkeypatch.setattr(module, "RUNS", runs)
    monkeypatch.setattr(package, "MODELS", tmp_path)
    monkeypatch.setattr(latent_cache, "PART", 4)
    monkeypatch.setattr(latent_cache, "CYCLE", ((128, 128),))
    monkeypatch.setattr(command, "STORES", dict.fromkeys(command.STORES, 1))
    monkeypatch.setattr(evaluate, "show_samples", remember_samples)


def run(monkeypatch: pytest.MonkeyPatch, *stages: str) -> None:
    """Run stages for one step each."""
    asked = [word for stage in stages for word in ("--stage", stage)]
    monkeypatch.setattr(sys, "argv", ["python -m training", "--steps", "1", *asked])
    command.main()


def test_the_sdxl_family_is_made_and_packaged(
    monkeypatch: pytest.MonkeyPatch, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The denoiser, its ControlNet and the LoRA, in half precision and under their own names."""
    run(monkeypatch, "sdxl", "controlnet-sdxl", "lora", "package-sdxl")
    assert (runs / "sdxl" / "shown").exists()
    assert (runs / "lora" / "out" / "pytorch_lora_weights.safetensors").exists()
    assert (tmp_path / "embedded-controlnet-canny-sdxl" / "config.json").exists()
    assert (tmp_path / "loras" / "outlines.safetensors").exists()
    assert f"embedded-{package.digest(tmp_path / 'embedded-sdxl')}" in capsys.readouterr().out


# The transformer's norms keep fp32 weights, while matrix products use bfloat16.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_flux_family_is_made_and_packaged(monkeypatch: pytest.MonkeyPatch, runs: Path, tmp_path: Path) -> None:
    """The same for the transformer, whose autoencoder is folded."""
    run(monkeypatch, "flux", "controlnet-flux", "package-flux")
    made = flux.FluxPipeline.from_pretrained(tmp_path / "embedded-flux")
    assert made.vae_scale_factor == 16
    weights = load_file(tmp_path / "embedded-flux" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert (tmp_path / "embedded-controlnet-canny-flux" / "config.json").exists()


def test_noise_is_drawn_where_four_steps_look() -> None:
    """Most training samples lie near the four noise levels that inference uses."""
    torch.manual_seed(0)
    steps, times = sdxl.draw_steps(4000), flux.draw_times(4000)
    assert 0 <= steps.min() <= steps.max() <= 999
    assert (steps == 999).float().mean() == pytest.approx(0.88 * sdxl.SHARES[0], abs=0.03)
    assert 0 <= times.min() <= times.max() == 1
    assert (times == 1).float().mean() == pytest.approx(0.84 * flux.SHARES[0], abs=0.03)


def test_the_upscaler_is_made_and_packaged(monkeypatch: pytest.MonkeyPatch, runs: Path, tmp_path: Path) -> None:
    """Its file in half precision is a network that the server reads, and its figures name every filter."""
    monkeypatch.setattr(upscaler, "measure", lambda enlarge, resampling: 1.0)
    run(monkeypatch, "upscaler", "package-upscaler")
    file = tmp_path / "embedded-upscaler" / upscaler.NAME
    assert load_network(file, torch.device("cpu")).scale == upscaler.SCALE
    figures = (loop.RUNS / "upscaler" / "figures.txt").read_text()
    assert all(resampling.name in figures for resampling in upscaler.FILTERS)


def test_loose_scenes_and_outlines_are_what_their_stages_want() -> None:
    """Most edge maps are of scenes whose caption omits the place; the LoRA sees outlines only."""
    rng = np.random.default_rng(0)
    free = [getattr(control.draw_loose(rng), "kind", "") == "free" for _ in range(200)]
    assert 0.5 < np.mean(free) < 0.8
    assert {lora.draw_outlined(rng).style for _ in range(20)} == {"outline"}


def test_a_twin_is_the_same_scene_in_other_colours() -> None:
    """Shapes, sizes and places stay; no object has its background's colour. Landscapes have no twin."""
    rng = np.random.default_rng(1)
    for scene in [sdxl.draw_twinned(rng) for _ in range(50)]:
        twin = sdxl.recoloured(scene, rng)
        assert isinstance(twin, type(scene))
        assert [replace(thing, colour="") for thing in twin.things] == [
            replace(thing, colour="") for thing in scene.things
        ]
        assert all(thing.colour != twin.background for thing in twin.things)
    landscape = draw_scene(rng, "landscape")
    assert sdxl.recoloured(landscape, rng) == landscape


def test_the_turned_velocity_leads_from_the_twin_to_the_picture() -> None:
    """Subtracted from the noised twin it leaves the image's latents; for the image itself it is the usual velocity."""
    torch.manual_seed(2)
    latents, twins, steps, shares = (
        torch.randn(3, 4, 2, 2),
        torch.randn(3, 4, 2, 2),
        torch.tensor([300, 500, 849]),
        sdxl.signal_shares(),
    )
    mixed, velocity = sdxl.turned(latents, twins, steps, shares)
    share = shares[steps].view(-1, 1, 1, 1)
    torch.testing.assert_close(share.sqrt() * mixed - (1 - share).sqrt() * velocity, latents)
    torch.manual_seed(2)
    ordinary = sdxl.noised(twins, steps, shares)
    torch.manual_seed(2)
    torch.testing.assert_close(sdxl.turned(twins, twins, steps, shares), ordinary)
