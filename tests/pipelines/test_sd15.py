"""Stable Diffusion 1.5 from folders and files: what the stock pipeline draws from the same ones, without a socket."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from checkpoint_stand_ins import sd15_pipeline, write
from drawing import draw, largest_difference
from lora_layouts import encoder_pairs, kohya, unet_pairs
from model_files import FILES, write_safetensors
from original_names import clip_tensors, sd15_tensors, unet_tensors, vae_tensors
from PIL import Image
from single_file_specs import sd15_spec
from stock_pictures import no_network
from tiny_oracles import MASKED, PICTURE, TinyCase, request_for, stock_picture

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.library import ModelTask
from stable_diffusion_server.pipelines.loading.compatibility import check_controlnet
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import Workload, architecture_of, footprint_of
from stable_diffusion_server.pipelines.loading.placement import Residency, place
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint, load_checkpoint
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
__all__ = ["no_network"]  # pytest uses it for every test here

FP32 = torch.float32
CHANGED, NO_CHECKER = ("unet", "text_encoder"), {"requires_safety_checker": False}
TEXT = TinyCase("text", "sd15", "StableDiffusionPipeline")


@pytest.fixture(scope="module")
def small() -> Any:
    """A small SD 1.5."""
    return sd15_pipeline()


def stock_of(file: Path, pipeline: Any, folder: Path) -> Any:
    """The stock pipeline of a file, with the configurations of a pipeline."""
    pipeline.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    kind = type(pipeline)
    return kind.from_single_file(str(file), config=str(folder), local_files_only=True, torch_dtype=FP32)


def test_a_checkpoint_draws_as_stock(small: Any, tmp_path: Path) -> None:
    """One file with UNet, VAE and CLIP under the names of CompVis; its EMA and schedule are left out."""
    file = write(tmp_path / "dreamshaper_8.safetensors", sd15_tensors(small))
    spec = sd15_spec(("denoiser", file.name))
    family, stock = Sd15(load_checkpoint(spec, tmp_path, FP32), spec), stock_of(file, small, tmp_path / "config")
    request = request_for(spec, negative_prompt="sea")
    assert largest_difference(draw(family, request), stock_picture(Sd15(stock, spec), TEXT, request)) <= 2
    parts = empty_checkpoint(spec, tmp_path)
    for name, part in parts.items():
        assert {n: p.shape for n, p in part.named_parameters()} == {
            n: p.shape for n, p in getattr(stock, name).named_parameters()
        }


def test_a_nine_channel_checkpoint_draws_as_stock(tmp_path: Path) -> None:
    """As `sd-v1-5-inpainting.safetensors`."""
    small = sd15_pipeline(3, in_channels=9)
    file = write(tmp_path / "inpainting.safetensors", sd15_tensors(small))
    spec = sd15_spec(("denoiser", file.name), task=ModelTask.INPAINT)
    family, stock = Sd15(load_checkpoint(spec, tmp_path, FP32), spec), stock_of(file, small, tmp_path / "config")
    request = request_for(spec, **MASKED)
    case = TinyCase("inpaint", "sd15", "StableDiffusionInpaintPipeline")
    assert largest_difference(draw(family, request), stock_picture(Sd15(stock, spec), case, request)) <= 2


def test_parts_apart_and_v_prediction_draw_as_stock(small: Any, tmp_path: Path) -> None:
    """UNet, VAE and CLIP-L in a file each; the prediction is the owner's word, with and without zero terminal SNR."""
    write(tmp_path / "unet.safetensors", unet_tensors(small.unet))
    write(tmp_path / "vae.safetensors", vae_tensors(small.vae))
    write(tmp_path / "clip_l.safetensors", clip_tensors(small.text_encoder))
    parts = tuple(
        (part, f"{name}.safetensors") for part, name in (("denoiser", "unet"), ("vae", "vae"), ("clip_l",) * 2)
    )
    for zero_snr, kind in ((False, "PNDMScheduler"), (True, "EulerDiscreteScheduler")):
        spec = sd15_spec(*parts, prediction="v_prediction", zero_snr=zero_snr)
        drawn = draw(Sd15(load_checkpoint(spec, tmp_path, FP32), spec), request_for(spec))
        options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
        scheduler = getattr(diffusers, kind).from_config(
            small.scheduler.config, prediction_type="v_prediction", **options
        )
        stock = Sd15(type(small)(**{**small.components, "scheduler": scheduler}, **NO_CHECKER), spec)
        assert largest_difference(drawn, stock_picture(stock, TEXT, request_for(spec))) <= 2
        plain = stock_picture(Sd15(small, spec), TEXT, request_for(spec))
        assert largest_difference(drawn, plain) > 20, "another prediction gives another picture"


def test_clip_skip_leaves_out_layers_as_stock(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipeline's arithmetic; it looks for a level of CLIP that transformers has no more."""
    spec = replace(sd15_spec(("denoiser", "model.safetensors")), clip_skip=1)
    request = request_for(spec, negative_prompt="sea")
    drawn = draw(Sd15(small, spec), request)
    monkeypatch.setattr(type(small.text_encoder), "text_model", property(lambda encoder: encoder), raising=False)
    case = TinyCase("text", "sd15", TEXT.stock, arguments={"clip_skip": 1})
    assert largest_difference(drawn, stock_picture(Sd15(small, spec), case, request)) <= 2
    assert largest_difference(drawn, stock_picture(Sd15(small, spec), TEXT, request)) > 2


def test_a_lora_of_kohya_changes_what_stock_changes(small: Any, tmp_path: Path) -> None:
    """UNet and text encoder; an SDXL LoRA has other widths and is refused by `tests/pipelines/test_lora_fit.py`."""
    tensors = kohya("lora_unet", unet_pairs(small)) | kohya("lora_te", encoder_pairs(small.text_encoder))
    write(tmp_path / "ink.safetensors", tensors, None)
    folder = LoraFolder(tmp_path)
    pipeline, stock = (
        type(small)(
            **{**small.components, **{part: copy.deepcopy(getattr(small, part)) for part in CHANGED}}, **NO_CHECKER
        )
        for _ in range(2)
    )
    spec = sd15_spec(("denoiser", "model.safetensors"))
    family = Sd15(pipeline, spec, loras=LoraManager(pipeline, folder))
    chosen = request_for(spec, loras=(("ink", 1.0),), lora_digests=(folder.digest("ink"),))
    drawn, without = draw(family, chosen), draw(family, request_for(spec))
    stock.load_lora_weights(str(tmp_path), weight_name="ink.safetensors")
    assert largest_difference(drawn, stock_picture(Sd15(stock, spec), TEXT, chosen)) <= 2
    assert largest_difference(drawn, without) > 20


def test_a_controlnet_draws_as_stock(small: Any) -> None:
    """The owner's spec names one for edges, as for SDXL."""
    controlnet = diffusers.ControlNetModel.from_unet(small.unet)
    for name, weight in controlnet.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(1))
    spec = sd15_spec(("denoiser", "model.safetensors"))
    check_controlnet("canny", small, controlnet)
    family = Sd15(small, spec, controlnet.eval().requires_grad_(False))
    request = request_for(spec, control=PICTURE, control_scale=0.7)
    arguments = {"image": Image.fromarray(PICTURE.pixels), "controlnet_conditioning_scale": 0.7}
    case = TinyCase("edges", "sd15", "StableDiffusionControlNetPipeline", arguments=arguments)
    drawn = draw(family, request)
    assert largest_difference(drawn, stock_picture(family, case, request)) <= 2
    assert largest_difference(drawn, draw(family, replace(request, control=None))) > 2


def _lists_a_safety_checker(folder: Path) -> None:
    """As `stable-diffusion-v1-5` has it; its weights need not be there."""
    index = folder / "model_index.json"
    listed = json.loads(index.read_text())
    listed["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    listed["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    listed["requires_safety_checker"] = True
    index.write_text(json.dumps(listed))


def test_a_folder_is_found_and_drawn(tmp_path: Path) -> None:
    """By what the library says of it: row, own scheduler, placement; a safety checker is not loaded."""
    tiny_families.sd15(768).save_pretrained(tmp_path / "v1-5")
    _lists_a_safety_checker(tmp_path / "v1-5")
    found = find_owned_models(tmp_path, (tmp_path,))
    assert (dict(found.refused), found.remarks) == ({}, [])
    assert found.specs["v1-5"].default_scheduler == "own"
    registry = load(tmp_path, "cpu", 1, LoadOptions(models=found.specs))
    spec = registry.models["v1-5"]
    states = [registry.prepare(request_for(spec, num_inference_steps=steps)) for steps in (1, 2)]
    while left := [state for state in states if not state.done]:
        registry.step(left)
    assert registry.finish(states[0]).pixels.std() > 1
    assert registry.batch_limit(states[0].request) >= 1


def test_a_file_is_found_with_its_owners_values(tmp_path: Path) -> None:
    """A checkpoint of full size, by its header; clip skip counts as AUTOMATIC1111 does: 1 is the last layer."""
    write_safetensors(tmp_path / "dream.safetensors", FILES["sd15"])
    write_safetensors(tmp_path / "paint.safetensors", FILES["sd15-inpaint"])
    (tmp_path / "dream.toml").write_text('clip_skip = 2\nprediction_type = "v_prediction"\nrefiner = "paint"\n')
    found = find_owned_models(tmp_path, (tmp_path,))
    dream, paint = found.specs["dream"], found.specs["paint"]
    assert (dream.clip_skip, dream.checkpoint.prediction) == (1, "v_prediction")  # type: ignore[union-attr]  # it has files
    assert (dream.native_pixels, dream.default_steps, paint.clip_skip) == (512 * 512, 50, 0)
    assert (dream.pipeline_class, paint.pipeline_class) == ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    assert found.remarks == ["The spec of dream.safetensors has keys without an effect on this model: refiner."]
    parts = empty_checkpoint(dream, tmp_path)
    assert sum(parameter.numel() for parameter in parts["unet"].parameters()) == 859_520_964
    model = architecture_of(dream, parts, torch.float16)
    footprint = footprint_of(dream, model, Workload(512 * 512))
    assert 1.7e9 < model.bytes["unet"] < 1.8e9
    assert place(int(3.7e9), footprint, accelerated=True).residency is Residency.RESIDENT, "on a card of 4 GB"


def _without_its_vae(folder: Path) -> None:
    for file in (folder / "v1-5" / "vae").iterdir():
        file.unlink()


def _truncated(folder: Path) -> None:
    file = folder / "v1-5" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def _with_sizes(folder: Path) -> None:
    config = folder / "v1-5" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(_without_its_vae, "vae"), (_truncated, "is truncated"), (_with_sizes, "(?i)shape|size|Inpaint|channels")],
)
def test_a_damaged_folder_is_refused_by_a_sentence(
    damage: Callable[[Path], None], sentence: str, small: Any, tmp_path: Path
) -> None:
    """When it is looked at or loaded, never drawn with random weights."""
    small.save_pretrained(tmp_path / "v1-5")
    damage(tmp_path)
    spec = replace(sd15_spec(("denoiser", "")), folder="v1-5", checkpoint=None)
    with pytest.raises(ModelLoadError, match=sentence) as refused:
        load_pipeline(spec, tmp_path, torch.device("cpu"))
    assert str(tmp_path) not in refused.value.detail
