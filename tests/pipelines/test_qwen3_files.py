"""FLUX.2 klein and Z-Image as ComfyUI's users have them: transformer, Qwen3 and VAE in files of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import write
from drawing import draw, largest_difference
from model_files import FILES, qwen3, write_safetensors
from original_names import Tensors, vae_tensors
from packed_files import gguf_file, quantize_q8_0, scaled_float8
from qwen3_original_names import klein_tensors, klein_vae_tensors, z_image_tensors
from tiny_qwen3 import PICTURE, REFERENCES, klein, order, z_image

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading import part_networks
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.packed_weights import is_packed
from stable_diffusion_server.pipelines.loading.part_networks import networks_of
from stable_diffusion_server.pipelines.loading.qwen3_names import klein_names, z_image_names
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TOKENIZER = "qwen3-tokenizer"


def split(tiny: Any, folder: Path, transformer: str) -> ModelSpec:
    """Write the parts beside a transformer; the spec says what widths of this size cannot tell."""
    pipe, family = tiny.pipeline, tiny.spec.name
    encoder = pipe.text_encoder.state_dict()
    prefix = "" if any(name.startswith("model.") for name in encoder) else "model."
    encoder = {f"{prefix}{name}": tensor for name, tensor in encoder.items() if name != "lm_head.weight"}
    write(folder / "qwen_3_4b.safetensors", encoder, None)
    write(folder / "vae.safetensors", klein_vae_tensors(pipe.vae) if family == "flux2" else vae_tensors(pipe.vae), None)
    pipe.tokenizer.save_pretrained(folder / TOKENIZER)
    parts = (("denoiser", transformer), ("vae", "vae.safetensors"), ("qwen3", "qwen_3_4b.safetensors"))
    files = CheckpointFiles(family, parts, tokenizer=TOKENIZER)
    numbers = {"dtype": "float32", "cpu_dtype": "float32", "measured_dtype": False}
    return replace(tiny.spec, folder=transformer, checkpoint=files, **numbers)


def loaded(spec: ModelSpec, folder: Path) -> Any:
    """The family of files, through the registry."""
    return load(folder, "cpu", 1, LoadOptions(models={spec.name: spec})).residents[spec.name].family


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files do not say the groups of a VAE's norms: 32 in all published ones, 4 in these narrow ones."""
    assemble = part_networks.assemble

    def with_four(network_class: Any, config: Any, *given: Any, **more: Any) -> Any:
        narrow = {"norm_num_groups": 4} if "Autoencoder" in network_class.__name__ else {}
        return assemble(network_class, {**config, **narrow}, *given, **more)

    monkeypatch.setattr(part_networks, "assemble", with_four)


def test_klein_from_files_draws_as_from_its_folder(tmp_path: Path) -> None:
    """Text and an edit; the transformer in Black Forest Labs' names, and the VAE with its statistics."""
    tiny = klein()
    write(tmp_path / "flux-2-klein-4b.safetensors", klein_tensors(tiny.pipeline.transformer), None)
    family = loaded(split(tiny, tmp_path, "flux-2-klein-4b.safetensors"), tmp_path)
    assert family.pipeline.config.is_distilled
    for changes in ({}, {"references": REFERENCES[:2]}, {"image": PICTURE, "strength": 0.5}):
        request = order(tiny, **changes)
        assert largest_difference(draw(family, request), draw(tiny, request)) <= 2


@pytest.mark.parametrize("variant", ["turbo", "base"])
def test_z_image_from_files_draws_as_from_its_folder(variant: str, tmp_path: Path) -> None:
    """With the schedule of the variant that the owner's spec chooses."""
    tiny = z_image(variant)
    write(tmp_path / "z_image.safetensors", z_image_tensors(tiny.pipeline.transformer), None)
    family = loaded(split(tiny, tmp_path, "z_image.safetensors"), tmp_path)
    assert family.pipeline.scheduler.config.shift == {"turbo": 3.0, "base": 6.0}[variant]
    request = order(tiny)
    assert largest_difference(draw(family, request), draw(tiny, request)) <= 2


def with_weights(tiny: Any, tensors: Tensors) -> Any:
    """The tiny model with other weights of its transformer."""
    tiny.pipeline.transformer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return tiny


def test_scaled_float8_of_klein_stays_packed(tmp_path: Path) -> None:
    """As ComfyUI scales it: the picture is that of the multiplied weights."""
    tiny = klein()
    scaled, plain = scaled_float8(klein_tensors(tiny.pipeline.transformer), "weight_scale")
    write(tmp_path / "klein-fp8.safetensors", scaled, None)
    family = loaded(split(tiny, tmp_path, "klein-fp8.safetensors"), tmp_path)
    assert is_packed(family.pipeline.transformer)
    request = order(tiny)
    expected = draw(with_weights(tiny, klein_names(plain)), request)
    assert largest_difference(draw(family, request), expected) <= 2


def test_a_gguf_of_z_image_stays_packed(tmp_path: Path) -> None:
    """Fused attention in Q8_0 is split without unpacking it."""
    tiny = z_image()
    packed, plain = quantize_q8_0(z_image_tensors(tiny.pipeline.transformer), "attention.qkv")
    gguf_file(tmp_path / "z.gguf", packed, "lumina2")
    family = loaded(split(tiny, tmp_path, "z.gguf"), tmp_path)
    assert is_packed(family.pipeline.transformer)
    request = order(tiny)
    expected = draw(with_weights(tiny, z_image_names(plain)), request)
    assert largest_difference(draw(family, request), expected) <= 2


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    """Nothing is drawn with random weights."""
    tiny = z_image()
    tensors = z_image_tensors(tiny.pipeline.transformer)
    del tensors["layers.1.attention.out.weight"]
    write(tmp_path / "z_image.safetensors", tensors, None)
    with pytest.raises(ModelLoadError, match=r"layers\.1\.attention\.to_out\.0\.weight"):
        loaded(split(tiny, tmp_path, "z_image.safetensors"), tmp_path)


@pytest.mark.parametrize(("kind", "family", "billions"), [("klein-4b", "flux2", 3.88), ("z-image", "z-image", 6.15)])
def test_a_full_size_transformer_has_every_weight(kind: str, family: str, billions: float, tmp_path: Path) -> None:
    """By the header alone: each name and shape is the network's, and none is left over."""
    file = write_safetensors(tmp_path / "model.safetensors", FILES[kind], "BF16")
    files = CheckpointFiles(family, (("denoiser", file.name),))
    network = networks_of(files, tmp_path, None, torch.bfloat16, lambda _: None, meta=True, only=("denoiser",))
    assert round(sum(weight.numel() for weight in network["transformer"].parameters()) / 1e9, 2) == billions


def test_full_size_files_are_found_with_their_parts(tmp_path: Path) -> None:
    """By their headers: one Qwen3 for both; what is missing is named, and where the tokenizer belongs."""
    for name, kind in (("flux-2-klein-4b", "klein-4b"), ("z_image_turbo_bf16", "z-image")):
        write_safetensors(tmp_path / f"{name}.safetensors", FILES[kind], "BF16")
    (tmp_path / "flux-2-klein-4b.toml").write_text('variant = "klein-base"\n')
    refused = find_owned_models(tmp_path, [tmp_path]).refused
    assert "lacks a VAE and the text encoder Qwen3-4B (qwen_3_4b.safetensors)" in refused["flux-2-klein-4b"]
    write_safetensors(tmp_path / "qwen_3_4b.safetensors", qwen3(), "BF16")
    write_safetensors(tmp_path / "ae.safetensors", FILES["vae-flux"], "BF16")
    refused = find_owned_models(tmp_path, [tmp_path]).refused
    assert "lacks a VAE;" in refused["flux-2-klein-4b"]
    assert "Qwen3's tokenizer: put the folder tokenizer of FLUX.2-klein-4B" in refused["z_image_turbo_bf16"]
    z_image().pipeline.tokenizer.save_pretrained(tmp_path / TOKENIZER)
    spec = find_owned_models(tmp_path, [tmp_path]).specs["z_image_turbo_bf16"]
    assert spec.checkpoint is not None
    assert dict(spec.checkpoint.parts) == {
        "denoiser": "z_image_turbo_bf16.safetensors",
        "vae": "ae.safetensors",
        "qwen3": "qwen_3_4b.safetensors",
    }
    assert (spec.checkpoint.tokenizer, spec.default_steps, spec.default_guidance) == (TOKENIZER, 8, 0.0)
    write_safetensors(tmp_path / "flux2-vae.safetensors", FILES["vae-flux2"], "BF16")
    base = find_owned_models(tmp_path, [tmp_path]).specs["flux-2-klein-4b"]
    assert (base.default_steps, base.takes_guidance) == (50, True)
