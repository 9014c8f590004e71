"""Networks alone with the tensor names of diffusers, and their parts from a diffusers folder beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_stand_ins import flux_pipeline, sdxl_pipeline, write
from drawing import draw, job_for, largest_difference
from original_names import clip_tensors, sdxl_tensors, unet_tensors, vae_tensors
from single_file_specs import T5_WORDS, sdxl_spec
from stock_pictures import assert_equal, no_network, sdxl_job, stock_pixels

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines import find_owned_models
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.part_networks import networks_of
from stable_diffusion_server.pipelines.loading.single_file import checkpoint_files, empty_checkpoint, load_checkpoint
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.model_spec import ModelSpec

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
__all__ = ["no_network"]  # pytest uses it for every test here

FP32 = torch.float32
PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def small() -> Any:
    """A small SDXL."""
    return sdxl_pipeline()


@pytest.fixture(scope="module")
def small_flux() -> Any:
    """A small Flux, schnell."""
    return flux_pipeline(tokenizer=T5_WORDS)


def as_file(network: Any, folder: Path) -> str:
    """One file, without its configuration."""
    network.save_pretrained(folder)
    (folder / "config.json").unlink()
    return PLAIN


def as_shards(network: Any, folder: Path) -> str:
    """Several files with an index, without a configuration."""
    network.save_pretrained(folder, max_shard_size="2MB")
    (folder / "config.json").unlink()
    return f"{PLAIN}.index.json"


def as_folder(network: Any, folder: Path) -> str:
    """A folder as `save_pretrained` writes it."""
    network.save_pretrained(folder, max_shard_size="2MB", variant="fp16")
    return ""


FORMS = {"file": as_file, "shards": as_shards, "folder": as_folder}


def place_of(network: Any, folder: Path, form: Callable[[Any, Path], str]) -> str:
    """Write a network into a folder; returns its path beside that folder."""
    inner = form(network, folder)
    return f"{folder.name}/{inner}".rstrip("/")


def sdxl_files(folder: Path, small: Any, form: Callable[[Any, Path], str]) -> ModelSpec:
    """UNet and VAE in the names of diffusers, with text encoders beside them."""
    write(folder / "clip_l.safetensors", clip_tensors(small.text_encoder), FP32)
    write(folder / "clip_g.safetensors", clip_tensors(small.text_encoder_2), FP32)
    return sdxl_spec(
        ("denoiser", place_of(small.unet, folder / "unet", form)),
        ("vae", place_of(small.vae, folder / "vae", form)),
        ("clip_l", "clip_l.safetensors"),
        ("clip_g", "clip_g.safetensors"),
    )


@pytest.mark.parametrize("form", FORMS)
def test_each_form_loads_as_stock_loads_it(form: str, small: Any, tmp_path: Path) -> None:
    """Weights and what decides the arithmetic are the stock network's; headers alone give the same shapes."""
    spec = sdxl_files(tmp_path, small, FORMS[form])
    assert spec.checkpoint is not None
    ours, empty = (
        networks_of(spec.checkpoint, tmp_path, None, FP32, ignore_progress, meta=False),
        empty_checkpoint(spec, tmp_path),
    )
    for name in ("unet", "vae"):
        stock, loaded = getattr(small, name), ours[name]
        assert loaded.state_dict().keys() == stock.state_dict().keys()
        assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in stock.state_dict().items())
        told = {key: value for key, value in stock.config.items() if not key.startswith("_") and key != "sample_size"}
        assert {key: listed(loaded.config[key]) for key in told} == {key: listed(told[key]) for key in told}
        shapes = {key: tensor.shape for key, tensor in empty[name].state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in stock.state_dict().items()}


def listed(value: Any) -> Any:
    """Tuples as lists, which configurations become in JSON; one number for all blocks as one for each."""
    return list(value) if isinstance(value, tuple) else value


def test_an_sdxl_unet_draws_as_stock_reads_the_same_file(small: Any, tmp_path: Path) -> None:
    """Stock reads the UNet and the VAE from their files, which hold no configuration."""
    spec = sdxl_files(tmp_path, small, as_file)
    small.save_pretrained(tmp_path / "stock")
    stock = sdxl_pipeline(5)
    for name, network_class in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        read = network_class.from_single_file(
            str(tmp_path / name / PLAIN), config=str(tmp_path / "stock"), subfolder=name, local_files_only=True
        )
        setattr(stock, name, read)
    stock.text_encoder, stock.text_encoder_2 = small.text_encoder, small.text_encoder_2
    job = sdxl_job()
    assert_equal(draw(Sdxl(load_checkpoint(spec, tmp_path, FP32), spec), job), stock_pixels(stock, job))


def test_a_vae_of_old_diffusers_is_read(small: Any, tmp_path: Path) -> None:
    """Before version 0.11 the attention was named query, key, value and proj_attn."""
    spec = sdxl_files(tmp_path, small, as_file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = small.vae.state_dict()
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensors[key] for key in tensors}
    write(tmp_path / "vae" / PLAIN, tensors, FP32)
    assert spec.checkpoint is not None
    loaded = networks_of(spec.checkpoint, tmp_path, None, FP32, ignore_progress, meta=False)["vae"].state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in small.vae.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_a_flux_transformer_takes_the_rest_from_a_folder_beside_it(form: str, small_flux: Any, tmp_path: Path) -> None:
    """VAE, text encoders and tokenizers of a Flux folder; the picture is stock's with this transformer in it."""
    other = flux_pipeline(4, tokenizer=T5_WORDS)
    other.save_pretrained(tmp_path / "schnell")
    place_of(small_flux.transformer, tmp_path / "mine", FORMS[form])
    owned = find_owned_models(tmp_path, (tmp_path,))
    assert not owned.refused
    name = next(name for name in owned.specs if name.startswith("mine"))
    spec = owned.specs[name]
    assert spec.checkpoint is not None
    assert dict(spec.checkpoint.parts) | {"denoiser": ""} == {
        "denoiser": "",
        "vae": "schnell/vae",
        "clip_l": "schnell/text_encoder",
        "t5": "schnell/text_encoder_2",
    }
    assert spec.checkpoint.tokenizer == "schnell/tokenizer_2"
    pipeline = load_checkpoint(spec, tmp_path, FP32)
    loaded = pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in small_flux.transformer.state_dict().items())
    if form == "file":
        stock = diffusers.FluxPipeline(**{**other.components, "transformer": small_flux.transformer})
        job = job_for("flux", guidance_scale=0.0)
        drawn = draw(Flux(pipeline, spec), job)
        assert_equal(drawn, stock_pixels(stock, job, max_sequence_length=spec.text_tokens))
        assert largest_difference(drawn, stock_pixels(other, job, max_sequence_length=spec.text_tokens)) > 20


def test_an_sdxl_unet_takes_the_rest_from_a_folder_beside_it(small: Any, tmp_path: Path) -> None:
    """With a Flux folder there too, which has nothing for it. The digest covers weights and tokenizers."""
    other = sdxl_pipeline(6)
    other.save_pretrained(tmp_path / "merge")
    (tmp_path / "a flux").mkdir()
    shutil.copy(tmp_path / "merge" / "model_index.json", tmp_path / "a flux" / "model_index.json")
    write(tmp_path / "bare.safetensors", unet_tensors(small.unet))
    spec = find_owned_models(tmp_path, (tmp_path,)).specs["bare"]
    assert spec.checkpoint is not None
    assert dict(spec.checkpoint.parts)["clip_g"] == "merge/text_encoder_2"
    stock = diffusers.StableDiffusionXLPipeline(**{**other.components, "unet": small.unet}, add_watermarker=False)
    job = sdxl_job()
    assert_equal(draw(Sdxl(load_checkpoint(spec, tmp_path, FP32), spec), job), stock_pixels(stock, job))
    named = checkpoint_files(spec, tmp_path)
    assert {"vae/config.json", "clip_l/model.safetensors", "denoiser"} <= named.keys()
    assert any(name.startswith("tokenizer_2/") for name in named)


def test_the_order_in_which_parts_are_looked_for(small: Any, tmp_path: Path) -> None:
    """The spec, then the part alone, then a folder of the family, then a checkpoint of it."""
    write(tmp_path / "a checkpoint.safetensors", sdxl_tensors(small))
    write(tmp_path / "bare.safetensors", unet_tensors(small.unet))

    def vae() -> str:
        parts = find_owned_models(tmp_path, (tmp_path,)).specs["bare"].checkpoint
        return dict(parts.parts)["vae"] if parts else ""

    assert vae() == "a checkpoint.safetensors"
    small.save_pretrained(tmp_path / "merge")
    assert vae() == "merge/vae"
    small.vae.save_pretrained(tmp_path / "z vae")
    assert vae() == "z vae"
    write(tmp_path / "y vae.safetensors", vae_tensors(small.vae))
    assert vae() == "y vae.safetensors"
    (tmp_path / "bare.toml").write_text('vae = "z vae"')
    assert vae() == "z vae"


def test_what_is_wrong_with_a_folder_or_a_shard_is_named(small: Any, tmp_path: Path) -> None:
    """A part of another class, a shard that is gone, one that is cut, and a scale that lies in another shard."""
    spec = sdxl_files(tmp_path, small, as_folder)
    config = tmp_path / "vae" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace("AutoencoderKL", "AutoencoderTiny"))
    with pytest.raises(ModelLoadError, match="vae holds a AutoencoderTiny, and a AutoencoderKL is needed"):
        load_checkpoint(spec, tmp_path, FP32)
    config.write_text(whole)
    shutil.rmtree(tmp_path / "unet")
    spec = sdxl_files(tmp_path, small, as_shards)
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
    os.truncate(shard, 1000)
    with pytest.raises(ModelLoadError, match=f"{shard.name} is"):
        empty_checkpoint(spec, tmp_path)
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"{shard.name} cannot be read"):
        empty_checkpoint(spec, tmp_path)
