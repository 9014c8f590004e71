"""The kinds of model files that scripts/model_file_table.py writes, with what the stock pipeline of each is."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from checkpoint_stand_ins import flux_pipeline, sd15_pipeline, sdxl_pipeline, write
from drawing import disc_mask, scene
from five_models import MARKERS, WORDS
from model_files import FILES, write_safetensors
from original_names import (
    clip_tensors,
    flux_tensors,
    sd15_tensors,
    sdxl_tensors,
    t5_tensors,
    transformer_tensors,
    unet_tensors,
    vae_tensors,
)
from packed_files import gguf_file, quantize_q8_0, scaled_float8
from PIL import Image
from single_file_specs import sdxl_spec, split_flux

from stable_diffusion_server.pipelines.loading.network_assembly import assemble
from stable_diffusion_server.pipelines.model_spec import ModelSpec

FP32 = torch.float32


# All of an image to be repainted, as a request without a mask has it.
WHITE = {"image": Image.fromarray(scene().pixels), "mask_image": Image.new("L", (128, 128), 255), "strength": 1.0}


class Built(NamedTuple):
    """A model in a folder: its name, the stock pipeline with its weights; a spec where widths are too small to tell."""

    name: str
    stock: Any
    spec: ModelSpec | None = None
    job: Mapping[str, Any] = {}
    stock_arguments: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Kind:
    """A row of the table; `file` is the one that is identified."""

    title: str
    file: str
    build: Callable[[Path], Built] = field(repr=False)


sdxl = functools.cache(sdxl_pipeline)


@functools.cache
def flux(*, guided: bool = False) -> Any:
    """A small Flux."""
    return flux_pipeline(guided=guided, tokenizer=WORDS)


def rescheduled(pipeline: Any, name: str, **options: Any) -> Any:
    """The pipeline with another scheduler."""
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    return diffusers.StableDiffusionXLPipeline(**{**pipeline.components, "scheduler": scheduler}, add_watermarker=False)


def _checkpoint(dtype: torch.dtype) -> Callable[[Path], Built]:
    def build(folder: Path) -> Built:
        write(folder / "model.safetensors", sdxl_tensors(sdxl()), dtype)
        return Built("model", sdxl())

    return build


def _v_prediction(folder: Path) -> Built:
    write(folder / "model.safetensors", {**sdxl_tensors(sdxl()), **MARKERS})
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Built("model", rescheduled(sdxl(), "EulerDiscreteScheduler", **options))


def _inpainting(folder: Path) -> Built:
    pipeline = sdxl_pipeline(3, in_channels=9)
    write(folder / "model.safetensors", sdxl_tensors(pipeline))
    return Built("model", pipeline, stock_arguments=WHITE)


def _sd15(*, in_channels: int = 4, spec: str = "") -> Callable[[Path], Built]:
    def build(folder: Path) -> Built:
        pipeline = sd15_pipeline(in_channels=in_channels, width=768)
        write(folder / "model.safetensors", sd15_tensors(pipeline))
        if not spec:
            return Built("model", pipeline, stock_arguments=WHITE if in_channels == 9 else {})
        (folder / "model.toml").write_text(spec)
        scheduler = diffusers.PNDMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
        parts = {**pipeline.components, "scheduler": scheduler, "requires_safety_checker": False}
        return Built("model", diffusers.StableDiffusionPipeline(**parts))

    return build


def _sd15_folder(folder: Path) -> Built:
    pipeline = sd15_pipeline(width=768)
    pipeline.save_pretrained(folder / "v1-5")
    return Built("v1-5", pipeline)


def _flux_tool(kind: str, spec: str = "") -> Callable[[Path], Built]:
    """A transformer of FLUX.1 Fill or Kontext, beside a Flux folder, which gives it the rest."""

    def build(folder: Path) -> Built:
        own = flux_pipeline(5, guided=True, tokenizer=WORDS, kind=kind)
        flux().save_pretrained(folder / "schnell")
        write(folder / "mine.safetensors", transformer_tensors(own.transformer))
        if spec:
            (folder / "mine.toml").write_text(spec)
        scheduler = own.scheduler
        parts = {**flux().components, "transformer": own.transformer, "scheduler": scheduler}
        stock = type(own)(**{name: part for name, part in parts.items() if name in own.components})
        fills = kind == "Fill"
        job = {"image": scene(), "mask": disc_mask()} if fills else {}
        pictures = {"image": Image.fromarray(scene().pixels), "mask_image": Image.fromarray(disc_mask().pixels)}
        return Built("mine", stock, job=job, stock_arguments=pictures if fills else {"max_area": 128 * 128})

    return build


def _bare_unet(folder: Path) -> Built:
    write(folder / "unet.safetensors", unet_tensors(sdxl().unet))
    write(folder / "vae.safetensors", vae_tensors(sdxl().vae))
    write(folder / "clip_l.safetensors", clip_tensors(sdxl().text_encoder))
    write(folder / "clip_g.safetensors", clip_tensors(sdxl().text_encoder_2))
    names = {"denoiser": "unet", "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g"}
    spec = sdxl_spec(*((part, f"{name}.safetensors") for part, name in names.items()))
    return Built("unet", sdxl(), spec)


def _of_diffusers(**saved: Any) -> Callable[[Path], Built]:
    """UNet and VAE as `save_pretrained` names their tensors, without configurations; the rest from an SDXL folder."""

    def build(folder: Path) -> Built:
        other = sdxl(6)
        other.save_pretrained(folder / "merge")
        for network, name in ((sdxl().unet, "unet"), (sdxl().vae, "vae")):
            network.save_pretrained(folder / name, **saved)
            (folder / name / "config.json").unlink()
        parts = {**other.components, "unet": sdxl().unet, "vae": sdxl().vae}
        return Built("diffusion_pytorch_model", diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False))

    return build


def _unet_folder(folder: Path) -> Built:
    sdxl(6).save_pretrained(folder / "merge")
    sdxl().unet.save_pretrained(folder / "mine", variant="fp16")
    parts = {**sdxl(6).components, "unet": sdxl().unet}
    return Built("mine", diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False))


def _flux_of_diffusers(write_it: Callable[[Path], Any]) -> Callable[[Path], Built]:
    """A transformer beside a Flux folder, which gives it VAE, text encoders and tokenizers."""

    def build(folder: Path) -> Built:
        other = flux_pipeline(4, tokenizer=WORDS)
        other.save_pretrained(folder / "schnell")
        write_it(folder)
        stock = diffusers.FluxPipeline(**{**other.components, "transformer": flux().transformer})
        return Built("mine", stock)

    return build


def _flux_shards(folder: Path) -> None:
    flux().transformer.save_pretrained(folder, max_shard_size="2MB")
    (folder / "config.json").unlink()
    for file in folder.glob("diffusion_pytorch_model*"):
        text = file.name.replace("diffusion_pytorch_model", "mine")
        file.rename(folder / text)
    index = folder / "mine.safetensors.index.json"
    index.write_text(index.read_text().replace("diffusion_pytorch_model", "mine"))


def _with_vae(folder: Path) -> Built:
    other = sdxl(9).vae
    write(folder / "model.safetensors", sdxl_tensors(sdxl()))
    write(folder / "vae" / "sharp.safetensors", vae_tensors(other))
    (folder / "model.toml").write_text('vae = "sharp"\n')
    stock = diffusers.StableDiffusionXLPipeline(**{**sdxl().components, "vae": other}, add_watermarker=False)
    return Built("model", stock)


def _folder(scheduler: str = "EulerDiscreteScheduler", **saved: Any) -> Callable[[Path], Built]:
    options = saved.pop("options", {})

    def build(folder: Path) -> Built:
        pipeline = rescheduled(sdxl(), scheduler, **options)
        pipeline.save_pretrained(folder / "my merge", **saved)
        return Built("my merge", pipeline)

    return build


def _hub_cache(folder: Path) -> Built:
    snapshot = folder / "models--me--merge" / "snapshots" / ("0" * 40)
    sdxl().save_pretrained(snapshot)
    (folder / "models--me--merge" / "refs").mkdir()
    (folder / "models--me--merge" / "refs" / "main").write_text("0" * 40)
    return Built("me/merge", sdxl())


def _flux_checkpoint(*, guided: bool) -> Callable[[Path], Built]:
    def build(folder: Path) -> Built:
        write(folder / "model.safetensors", flux_tensors(flux(guided=guided)))
        (folder / "t5-tokenizer").symlink_to(WORDS)
        return Built("model", flux(guided=guided))

    return build


def _flux_folder(folder: Path) -> Built:
    flux().save_pretrained(folder / "my flux")
    return Built("my flux", flux())


def _split(pack: Callable[[Path, dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str) -> Callable[..., Built]:
    """A bare transformer that `pack` writes; it returns the numbers that the file stands for."""

    def build(folder: Path) -> Built:
        numbers = pack(folder / name, transformer_tensors(flux().transformer))
        spec = split_flux(flux(), folder, name)
        return Built(name, _with_transformer(numbers), spec)

    return build


def _with_transformer(numbers: dict[str, torch.Tensor]) -> Any:
    from stable_diffusion_server.pipelines.loading.checkpoint_names import transformer_names

    config = dict(flux().transformer.config)
    transformer = assemble(diffusers.FluxTransformer2DModel, config, transformer_names(numbers), FP32)
    return diffusers.FluxPipeline(**{**flux().components, "transformer": transformer})


def _float8(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    write(file, tensors, torch.float8_e4m3fn)
    return {name: tensor.to(torch.float8_e4m3fn).float() for name, tensor in tensors.items()}


def _scaled(form: str) -> Callable[..., dict[str, torch.Tensor]]:
    def pack(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scaled, plain = scaled_float8(tensors, form)
        write(file, scaled, None)
        return plain

    return pack


def _gguf(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    packed, plain = quantize_q8_0(tensors, "blocks.")
    gguf_file(file, packed, "flux")
    return plain


def _plain(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    write(file, tensors)
    return tensors


def _gguf_t5(folder: Path) -> Built:
    write(folder / "flux.safetensors", transformer_tensors(flux().transformer))
    packed, plain = quantize_q8_0(t5_tensors(flux().text_encoder_2), "SelfAttention")
    gguf_file(folder / "t5.gguf", packed, "t5encoder")
    encoder = type(flux().text_encoder_2)(flux().text_encoder_2.config).eval()
    encoder.load_state_dict({**plain, "encoder.embed_tokens.weight": plain["shared.weight"]})
    stock = diffusers.FluxPipeline(**{**flux().components, "text_encoder_2": encoder})
    return Built("flux", stock, split_flux(flux(), folder, "flux.safetensors", t5="t5.gguf"))


_OF_DIFFUSERS = "unet/diffusion_pytorch_model.safetensors"
_KARRAS = {"use_karras_sigmas": True}
_FLUX = "flux.safetensors"
LOADED = (
    Kind("SDXL checkpoint, fp16", "model.safetensors", _checkpoint(torch.float16)),
    Kind("SDXL checkpoint, fp32", "model.safetensors", _checkpoint(FP32)),
    Kind("SDXL v-prediction with zero SNR (markers)", "model.safetensors", _v_prediction),
    Kind("SDXL inpainting, 9 channels", "model.safetensors", _inpainting),
    Kind("SDXL UNet, VAE, CLIP-L and CLIP-G apart", "unet.safetensors", _bare_unet),
    Kind("SDXL UNet and VAE in the names of diffusers", _OF_DIFFUSERS, _of_diffusers()),
    Kind("the same in shards", f"{_OF_DIFFUSERS}.index.json", _of_diffusers(max_shard_size="4MB")),
    Kind("SDXL UNet as a folder, fp16 variant", "mine", _unet_folder),
    Kind("SDXL checkpoint with another VAE (spec)", "model.safetensors", _with_vae),
    Kind("SDXL diffusers folder of any name", "my merge", _folder()),
    Kind("SDXL folder, fp16 variant", "my merge", _folder(variant="fp16")),
    Kind("SDXL folder, sharded fp16 variant", "my merge", _folder(variant="fp16", max_shard_size="2MB")),
    Kind("SDXL folder, Euler a", "my merge", _folder("EulerAncestralDiscreteScheduler")),
    Kind("SDXL folder, DPM++ 2M Karras", "my merge", _folder("DPMSolverMultistepScheduler", options=_KARRAS)),
    Kind("SDXL folder, LCM", "my merge", _folder("LCMScheduler")),
    Kind("SDXL folder, TCD", "my merge", _folder("TCDScheduler")),
    Kind("cache of the hub as MODELS_DIR", "models--me--merge/snapshots/" + "0" * 40, _hub_cache),
    Kind("SD 1.5 checkpoint", "model.safetensors", _sd15()),
    Kind("SD 1.5 inpainting, 9 channels", "model.safetensors", _sd15(in_channels=9)),
    Kind("SD 1.5 v-prediction (spec)", "model.safetensors", _sd15(spec='prediction_type = "v_prediction"\n')),
    Kind("SD 1.5 diffusers folder", "v1-5", _sd15_folder),
    Kind("Flux schnell checkpoint", "model.safetensors", _flux_checkpoint(guided=False)),
    Kind("Flux dev checkpoint", "model.safetensors", _flux_checkpoint(guided=True)),
    Kind("Flux diffusers folder", "my flux", _flux_folder),
    Kind("Flux transformer, VAE, CLIP-L and T5 apart", _FLUX, _split(_plain, _FLUX)),
    Kind("Flux transformer alone, beside a Flux folder", "mine.safetensors", _flux_of_diffusers(
        lambda folder: write(folder / "mine.safetensors", transformer_tensors(flux().transformer)))),
    Kind("the same in the names of diffusers", "mine.safetensors", _flux_of_diffusers(
        lambda folder: write(folder / "mine.safetensors", flux().transformer.state_dict()))),
    Kind("the same in shards", "mine.safetensors.index.json", _flux_of_diffusers(_flux_shards)),
    Kind("Flux in parts, transformer in fp8 e4m3", _FLUX, _split(_float8, _FLUX)),
    Kind("the same, scaled fp8 (`scale_weight`)", _FLUX, _split(_scaled("scale_weight"), _FLUX)),
    Kind("the same, scaled fp8 (`weight_scale`)", _FLUX, _split(_scaled("weight_scale"), _FLUX)),
    Kind("the same, scaled fp8 by row", _FLUX, _split(_scaled("rows"), _FLUX)),
    Kind("the same, transformer in GGUF Q8_0", "flux.gguf", _split(_gguf, "flux.gguf")),
    Kind("the same, T5 in GGUF Q8_0", "t5.gguf", _gguf_t5),
    Kind("Flux Fill transformer, beside a Flux folder", "mine.safetensors", _flux_tool("Fill")),
    Kind("Flux Kontext transformer (spec)", "mine.safetensors", _flux_tool("Kontext", 'variant = "kontext"\n')),
)  # fmt: skip


def _damaged(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write(folder / "whole.safetensors", {"input_blocks.0.0.weight": torch.zeros(64, 4, 3, 3)})
        (folder / name).write_bytes(change((folder / "whole.safetensors").read_bytes()))
        (folder / "whole.safetensors").unlink()

    return build


def _changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: write(folder / "model.safetensors", change(sdxl_tensors(sdxl()))) and None


def _without(start: str) -> Callable[[Path], None]:
    return _changed(lambda tensors: {name: one for name, one in tensors.items() if not name.startswith(start)})


def _sd15_without(start: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tensors = sd15_tensors(sd15_pipeline(width=768))
        write(folder / "model.safetensors", {name: one for name, one in tensors.items() if not name.startswith(start)})

    return build


def _more(**more: torch.Tensor) -> Callable[[Path], None]:
    return _changed(lambda tensors: {**tensors, **{f"model.diffusion_model.{name}": t for name, t in more.items()}})


def _shaped(name: str) -> Callable[[Path], None]:
    return lambda folder: write_safetensors(folder / f"{name}.safetensors", FILES[name]) and None


def _unreadable(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(folder / "unmounted" / "model.safetensors")


def _flux_lacks(folder: Path) -> None:
    write(folder / "flux.safetensors", flux_tensors(flux()))


def _bare_lacks(folder: Path) -> None:
    write(folder / "unet.safetensors", unet_tensors(sdxl().unet))


def _truncated_gguf(folder: Path) -> None:
    _gguf(folder / "flux.gguf", transformer_tensors(flux().transformer))
    os.truncate(folder / "flux.gguf", 100_000)


def _folder_lacks(folder: Path) -> None:
    sdxl().save_pretrained(folder / "merge")
    shutil.rmtree(folder / "merge" / "vae")


def _folder_quantized(folder: Path) -> None:
    sdxl().save_pretrained(folder / "merge")
    config = folder / "merge" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "bnb"}}))


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


def _shard_lacks(folder: Path) -> None:
    _flux_shards(folder)
    max(folder.glob("mine-*.safetensors")).unlink()


def _part_of_another_class(folder: Path) -> None:
    _unet_folder(folder)
    config = folder / "merge" / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderTiny"))


def _misspelt(folder: Path) -> None:
    _checkpoint(torch.float16)(folder)
    (folder / "model.toml").write_text("stpes = 4\n")


_NVFP4 = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
BROKEN: dict[str, Callable[[Path], Any]] = {
    "zero bytes": _damaged(lambda data: b""),
    "truncated": _damaged(lambda data: data[: len(data) // 2]),
    "cut in its header": _damaged(lambda data: data[:50]),
    "pickled (`.ckpt`)": _damaged(lambda data: b"\x80\x02}q\x00.", "model.ckpt"),
    "a pickle named `.safetensors`": _damaged(lambda data: b"\x80\x02}q\x00."),
    "a web page": _damaged(lambda data: b"<!DOCTYPE html>"),
    "a pointer of git-lfs": _damaged(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
    "a link that leads nowhere": _unreadable,
    "a named pipe": _pipe,
    "a shard that is missing": _shard_lacks,
    "a part of another class in the folder beside it": _part_of_another_class,
    "SDXL checkpoint without VAE": _without("first_stage_model."),
    "SDXL checkpoint without CLIP-G": _without("conditioner.embedders.1."),
    "SDXL checkpoint that lacks a layer": _without("model.diffusion_model.middle_block.0.out_layers.3"),
    "packed integers": _more(**{"middle_block.1.proj_out.weight": torch.zeros(128, 64, dtype=torch.uint8)}),
    "a scale without a weight": _more(**{"out.2.scale_weight": torch.ones(1)}),
    "scaled fp8 of an unknown format": _more(**{"out.2.comfy_quant": _NVFP4}),
    "SDXL UNet alone, nothing beside it": _bare_lacks,
    "SD 1.5 checkpoint without CLIP-L": _sd15_without("cond_stage_model."),
    "SD 1.5 checkpoint that lacks a layer": _sd15_without("model.diffusion_model.middle_block.0.out_layers.3"),
    "Flux checkpoint without T5's tokenizer": _flux_lacks,
    "truncated GGUF": _truncated_gguf,
    **{title: _shaped(name) for title, name in (
        ("Stable Diffusion 2", "sd2"), ("SD 1.5 that edits by instruction", "sd15-pix2pix"),
        ("SDXL refiner", "sdxl-refiner"), ("Flux Fill, nothing beside it", "flux-fill"),
        ("Flux Canny or Depth", "flux-canny"), ("FLUX.2 klein, nothing beside it", "klein-4b"),
        ("Z-Image, nothing beside it", "z-image"),
        ("SDXL UNet in the names of diffusers", "sdxl-unet-diffusers"),
        ("Flux transformer, nothing beside it", "flux-dev"),
    )},
    "diffusers folder without its VAE": _folder_lacks,
    "bitsandbytes folder": _folder_quantized,
    "a misspelt key in the spec": _misspelt,
}  # fmt: skip
