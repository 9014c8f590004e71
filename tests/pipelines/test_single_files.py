"""Models from files with original names draw what the stock pipeline draws from the same file, without a socket."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoint_stand_ins import flux_pipeline, sdxl_pipeline, write
from diffusers.loaders import single_file_model, single_file_utils
from drawing import disc_mask, draw, job_for, largest_difference, scene
from original_names import (
    clip_tensors,
    flux_tensors,
    sdxl_tensors,
    t5_tensors,
    transformer_tensors,
    unet_tensors,
    vae_tensors,
)
from packed_files import gguf_file, quantize_q8_0, scaled_float8
from PIL import Image
from single_file_specs import T5_WORDS, flux_spec, sdxl_spec, split_flux, words_in
from stock_pictures import assert_equal, no_network, sdxl_job, stock_pixels

from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.packed_weights import PackedLinear
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
__all__ = ["no_network"]  # pytest uses it for every test here

FP32 = torch.float32
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def sdxl_small() -> Any:
    """A small SDXL."""
    return sdxl_pipeline()


@pytest.fixture(scope="module")
def flux_small() -> dict[bool, Any]:
    """A small Flux without (schnell) and with (dev) guidance embedding."""
    return {guided: flux_pipeline(guided=guided, tokenizer=T5_WORDS) for guided in (False, True)}


@pytest.fixture
def narrow_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' Flux converter with the width of the file; it has 3072 written into it."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    names = dict(vars(single_file_utils))
    wider = source.replace("inner_dim = 3072", 'inner_dim = checkpoint["img_in.bias"].shape[0]')
    exec(wider, names)  # noqa: S102  # diffusers' own code with one number changed
    row = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(row, "checkpoint_mapping_fn", names["convert_flux_transformer_checkpoint_to_diffusers"])


def config_folder(pipeline: Any, folder: Path) -> str:
    """The configurations of a pipeline, as stock single files need them, without weights."""
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return str(folder)


def stock_sdxl(file: Path, config: str, **arguments: Any) -> Any:
    """The stock pipeline of a file."""
    return diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=config, local_files_only=True, add_watermarker=False, torch_dtype=FP32, **arguments
    )


def test_an_sdxl_checkpoint_draws_as_stock(sdxl_small: Any, tmp_path: Path) -> None:
    """One file of 1,112 tensors: UNet, VAE and both text encoders; other schedulers and a negative prompt too."""
    file = write(tmp_path / "model.safetensors", sdxl_tensors(sdxl_small))
    spec = sdxl_spec(("denoiser", file.name))
    family = Sdxl(load_checkpoint(spec, tmp_path, FP32), spec)
    stock = stock_sdxl(file, config_folder(sdxl_small, tmp_path / "config"))
    job = sdxl_job(negative_prompt="blurry")
    assert_equal(draw(family, job), stock_pixels(stock, job, negative_prompt="blurry"))
    stock.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(stock.scheduler.config)
    job = sdxl_job(scheduler="euler_a")
    assert_equal(draw(family, job), stock_pixels(stock, job))


def test_marker_tensors_choose_v_prediction_with_zero_snr(sdxl_small: Any, tmp_path: Path) -> None:
    """Diffusers ignores the markers; with its scheduler set by hand and guidance rescaled, it draws the same."""
    markers = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    file = write(tmp_path / "model.safetensors", {**sdxl_tensors(sdxl_small), **markers})
    spec = sdxl_spec(("denoiser", file.name), prediction="v_prediction", zero_snr=True, guidance_rescale=0.7)
    family = Sdxl(load_checkpoint(spec, tmp_path, FP32), spec)
    stock = stock_sdxl(file, config_folder(sdxl_small, tmp_path / "config"))
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(stock.scheduler.config, **ZERO_SNR)
    job = sdxl_job()
    assert_equal(draw(family, job), stock_pixels(stock, job, guidance_rescale=0.7))


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_an_inpainting_checkpoint_draws_as_stock(strength: float, tmp_path: Path) -> None:
    """A UNet of nine channels; without a mask it repaints the whole image."""
    small = sdxl_pipeline(3, in_channels=9)
    file = write(tmp_path / "model.safetensors", sdxl_tensors(small))
    spec = sdxl_spec(("denoiser", file.name), pipeline_class="StableDiffusionXLInpaintPipeline")
    family = Sdxl(load_checkpoint(spec, tmp_path, FP32), spec)
    stock = diffusers.StableDiffusionXLInpaintPipeline.from_single_file(
        str(file),
        config=config_folder(small, tmp_path / "config"),
        local_files_only=True,
        add_watermarker=False,
        torch_dtype=FP32,
    )
    picture, mask = Image.fromarray(scene().pixels), Image.fromarray(disc_mask().pixels)
    job = sdxl_job(image=scene(), mask=disc_mask(), strength=strength)
    assert_equal(draw(family, job), stock_pixels(stock, job, image=picture, mask_image=mask, strength=strength))
    white = Image.new("L", (128, 128), 255)
    job = sdxl_job()
    assert_equal(draw(family, job), stock_pixels(stock, job, image=picture, mask_image=white, strength=1.0))


def test_a_bare_unet_takes_its_parts_from_other_files(sdxl_small: Any, tmp_path: Path) -> None:
    """UNet, VAE and both text encoders as ComfyUI splits them."""
    write(tmp_path / "unet.safetensors", unet_tensors(sdxl_small.unet))
    write(tmp_path / "vae.safetensors", vae_tensors(sdxl_small.vae))
    write(tmp_path / "clip_l.safetensors", clip_tensors(sdxl_small.text_encoder))
    write(tmp_path / "clip_g.safetensors", clip_tensors(sdxl_small.text_encoder_2))
    job = sdxl_job()
    expected = stock_pixels(sdxl_small, job)
    spec = sdxl_spec(
        ("denoiser", "unet.safetensors"),
        ("vae", "vae.safetensors"),
        ("clip_l", "clip_l.safetensors"),
        ("clip_g", "clip_g.safetensors"),
    )
    assert_equal(draw(Sdxl(load_checkpoint(spec, tmp_path, FP32), spec), job), expected)


def test_another_vae_replaces_the_one_in_the_file(sdxl_small: Any, tmp_path: Path) -> None:
    """A lone VAE gets the family's scale of latents; diffusers would take it for that of Stable Diffusion 1."""
    write(tmp_path / "model.safetensors", sdxl_tensors(sdxl_small))
    other = sdxl_pipeline(9).vae
    write(tmp_path / "vae.safetensors", vae_tensors(other))
    spec = sdxl_spec(("denoiser", "model.safetensors"), ("vae", "vae.safetensors"))
    parts = {**sdxl_small.components, "vae": other}
    stock = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    job = sdxl_job()
    assert_equal(draw(Sdxl(load_checkpoint(spec, tmp_path, FP32), spec), job), stock_pixels(stock, job))


@pytest.mark.parametrize("guided", [False, True], ids=["schnell", "dev"])
def test_a_flux_checkpoint_draws_as_stock(
    guided: bool, flux_small: dict[bool, Any], tmp_path: Path, narrow_converter: None
) -> None:
    """All parts in one file; the schedule is schnell's or dev's, by the guidance embedding."""
    small = flux_small[guided]
    file = write(tmp_path / "model.safetensors", flux_tensors(small))
    words_in(tmp_path)
    spec = flux_spec(("denoiser", file.name))
    family = Flux(load_checkpoint(spec, tmp_path, FP32), spec)
    stock = diffusers.FluxPipeline.from_single_file(
        str(file), config=config_folder(small, tmp_path / "config"), local_files_only=True, torch_dtype=FP32
    )
    stock.text_encoder_2.tie_weights()  # stock leaves the table of words without numbers where the file holds it once
    job = job_for("flux", guidance_scale=3.5)
    assert_equal(draw(family, job), stock_pixels(stock, job, max_sequence_length=spec.text_tokens))


def test_float8_weights_stay_float8_and_draw_as_stock_widens_them(
    flux_small: dict[bool, Any], tmp_path: Path, narrow_converter: None
) -> None:
    """A bare transformer in plain fp8 e4m3, computed in bf16: packed in memory, equal to the widened weights."""
    small = flux_small[False]
    file = write(tmp_path / "fp8.safetensors", transformer_tensors(small.transformer), torch.float8_e4m3fn)
    spec = split_flux(small, tmp_path, file.name)
    pipeline = load_checkpoint(spec, tmp_path, torch.bfloat16)
    packed = [layer for layer in pipeline.transformer.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) > 20
    assert all(layer.weight.dtype == torch.uint8 for layer in packed)
    stock = load_checkpoint(spec, tmp_path, torch.bfloat16)
    stock.transformer = stock_transformer(file, small, tmp_path, torch.bfloat16)
    job = job_for("flux", guidance_scale=0.0)
    assert_equal(draw(Flux(pipeline, spec), job), stock_pixels(stock, job, max_sequence_length=spec.text_tokens))


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "rows"])
def test_scaled_float8_is_multiplied_by_its_scales(
    form: str, flux_small: dict[bool, Any], tmp_path: Path, narrow_converter: None
) -> None:
    """ComfyUI's two forms, and scales by row: equal to stock loaded from the weights multiplied beforehand."""
    small = flux_small[False]
    scaled, plain = scaled_float8(transformer_tensors(small.transformer), form)
    write(tmp_path / "scaled.safetensors", scaled, None)
    file = write(tmp_path / "plain.safetensors", plain, None)
    spec = split_flux(small, tmp_path, "scaled.safetensors")
    family = Flux(load_checkpoint(spec, tmp_path, FP32), spec)
    assert any(
        layer.scale is not None for layer in family.pipeline.transformer.modules() if isinstance(layer, PackedLinear)
    )
    stock = load_checkpoint(spec, tmp_path, FP32)
    stock.transformer = stock_transformer(file, small, tmp_path, FP32)
    job = job_for("flux", guidance_scale=0.0)
    assert_equal(draw(family, job), stock_pixels(stock, job, max_sequence_length=spec.text_tokens))


def test_a_lora_works_on_packed_weights(flux_small: dict[bool, Any], tmp_path: Path, narrow_converter: None) -> None:
    """It is added beside the packed layers; equal to stock with the same LoRA on the weights multiplied beforehand."""
    small = flux_small[False]
    scaled, plain = scaled_float8(transformer_tensors(small.transformer), "weight_scale")
    write(tmp_path / "scaled.safetensors", scaled, None)
    file = write(tmp_path / "plain.safetensors", plain, None)
    generator = torch.Generator().manual_seed(1)
    width = small.transformer.config.num_attention_heads * small.transformer.config.attention_head_dim
    lora = {
        f"transformer.{block}.attn.{part}.lora_{side}.weight": torch.randn(shape, generator=generator) * 0.2
        for block in ("transformer_blocks.0", "single_transformer_blocks.1")
        for part in ("to_q", "to_v")
        for side, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    write(tmp_path / "loras" / "ink.safetensors", lora, None)
    spec = split_flux(small, tmp_path, "scaled.safetensors")
    folder = LoraFolder(tmp_path / "loras")
    pipeline = load_checkpoint(spec, tmp_path, FP32)
    family = Flux(pipeline, spec, loras=LoraManager(pipeline, folder))
    stock = load_checkpoint(spec, tmp_path, FP32)
    stock.transformer = stock_transformer(file, small, tmp_path, FP32)
    job = job_for("flux", guidance_scale=0.0)
    without = stock_pixels(stock, job, max_sequence_length=spec.text_tokens)
    stock.load_lora_weights(str(tmp_path / "loras"), weight_name="ink.safetensors")
    with_lora = stock_pixels(stock, job, max_sequence_length=spec.text_tokens)
    assert largest_difference(without, with_lora) > 20
    chosen = job_for("flux", guidance_scale=0.0, loras=(("ink", 1.0),), lora_digests=(folder.digest("ink"),))
    assert_equal(draw(family, chosen), with_lora)
    assert_equal(draw(family, job), without)


def test_gguf_transformer_and_t5_draw_as_their_numbers(
    flux_small: dict[bool, Any], tmp_path: Path, narrow_converter: None
) -> None:
    """Q8_0 files for both: the transformer stays packed, T5 is unpacked."""
    small = flux_small[False]
    packed, plain = quantize_q8_0(transformer_tensors(small.transformer), "blocks.")
    gguf_file(tmp_path / "flux.gguf", packed, "flux")
    t5_packed, t5_plain = quantize_q8_0(t5_tensors(small.text_encoder_2), "SelfAttention")
    gguf_file(tmp_path / "t5.gguf", t5_packed, "t5encoder")
    file = write(tmp_path / "plain.safetensors", plain, None)
    write(tmp_path / "t5_plain.safetensors", t5_plain, None)
    spec = split_flux(small, tmp_path, "flux.gguf", t5="t5.gguf")
    family = Flux(load_checkpoint(spec, tmp_path, FP32), spec)
    assert any(isinstance(layer, PackedLinear) for layer in family.pipeline.transformer.modules())
    stock = load_checkpoint(split_flux(small, tmp_path, "flux.gguf", t5="t5_plain.safetensors"), tmp_path, FP32)
    stock.transformer = stock_transformer(file, small, tmp_path, FP32)
    job = job_for("flux", guidance_scale=0.0)
    assert_equal(draw(family, job), stock_pixels(stock, job, max_sequence_length=spec.text_tokens))


def stock_transformer(file: Path, small: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer that diffusers reads from a file."""
    config = config_folder(small, folder / "config")
    return diffusers.FluxTransformer2DModel.from_single_file(
        str(file), config=config, subfolder="transformer", local_files_only=True, torch_dtype=dtype
    )


def test_headers_tell_what_a_model_needs_without_weights(sdxl_small: Any, tmp_path: Path) -> None:
    """The components on the meta device have the parameters of the real ones."""
    write(tmp_path / "model.safetensors", sdxl_tensors(sdxl_small))
    parts = empty_checkpoint(sdxl_spec(("denoiser", "model.safetensors")), tmp_path)
    assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())
    for name, part in parts.items():
        real = getattr(sdxl_small, name)
        assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in real.parameters())
