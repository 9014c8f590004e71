"""The real models' configurations at full size, without a byte of weights, on torch's meta device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR, draw, job_for

from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS, ModelFacts
from stable_diffusion_server.pipelines.components import dtype_of, footprint_of, parameters_of, skeleton, token_counter
from stable_diffusion_server.pipelines.flux import Flux
from stable_diffusion_server.pipelines.placement import Footprint, Residency, place
from stable_diffusion_server.pipelines.sdxl import Sdxl

# The published configurations, as far as they differ from the classes' defaults.
CLIP_L = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
CONTROL = {name: value for name, value in UNET.items() if name not in ("sample_size", "up_block_types")} | {
    "_class_name": "ControlNetModel"
}
FLUX_VAE = VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "flux": {"transformer": TRANSFORMER, "vae": FLUX_VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
}
SDXL, FLUX = REAL_MODELS["sdxl"][1], REAL_MODELS["flux"][0]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models' folder with the two real models' configurations; tokenizers and schedulers are the embedded ones'."""
    folder = tmp_path_factory.mktemp("models")
    for facts in (SDXL, FLUX):
        embedded = MODELS_DIR / MODELS[facts.name].folder
        shutil.copytree(embedded, folder / facts.folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for part, configuration in CONFIGURATIONS[facts.name].items():
            write_config(folder / facts.folder / part, configuration)
    assert SDXL.control_folder is not None
    write_config(folder / SDXL.control_folder, CONTROL)
    return folder


@pytest.fixture(scope="module")
def skeletons(full_size: Path) -> dict[str, dict[str, torch.nn.Module]]:
    """The parts of both by our loader, once."""
    return {facts.name: skeleton(facts, full_size) for facts in (SDXL, FLUX)}


def write_config(folder: Path, configuration: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration))


def test_the_loader_builds_sdxl_at_full_size(skeletons: dict[str, Any]) -> None:
    """Parameter counts as published: a UNet of 2.57 billion, encoders of 123 and 695 million, the ControlNet."""
    parts = skeletons["sdxl"]
    counts = {name: parameters_of(part) for name, part in parts.items()}
    show(counts)
    assert counts["unet"] == 2_567_463_684
    assert counts["text_encoder"] == 123_060_480
    assert counts["text_encoder_2"] == 694_659_840
    assert counts["vae"] == 83_653_863
    assert 1.2e9 < counts["control"] < 1.3e9
    assert {parameter.device.type for part in parts.values() for parameter in part.parameters()} == {"meta"}


def test_the_loader_builds_flux_at_full_size(skeletons: dict[str, Any]) -> None:
    """Parameter counts as published: a transformer of 11.9 billion, T5 of 4.76 billion."""
    counts = {name: parameters_of(part) for name, part in skeletons["flux"].items()}
    show(counts)
    assert round(counts["transformer"] / 1e9, 1) == 11.9
    assert round(counts["text_encoder_2"] / 1e9, 2) == 4.76
    assert counts["text_encoder"] == 123_060_480


def show(counts: dict[str, int]) -> None:
    print("".join(f"\n| {name} | {count:,} |" for name, count in counts.items()))  # noqa: T201  # the table


@pytest.mark.parametrize(
    ("facts", "gigabytes", "expected"),
    [
        (SDXL, 24, "resident none"),
        (SDXL, 16, "resident none"),
        (SDXL, 12, "model none"),
        (SDXL, 10, "resident int8"),
        (SDXL, 8, "model int8"),
        (SDXL, 4, "group none"),
        (FLUX, 48, "resident none"),
        (FLUX, 32, "model none"),
        (FLUX, 24, "resident int8"),
        (FLUX, 16, "model int8"),
        (FLUX, 12, "group none"),
    ],
)
def test_real_models_are_placed_by_their_measured_footprints(
    facts: ModelFacts, gigabytes: int, expected: str, skeletons: dict[str, Any]
) -> None:
    """What common cards would do with them, in half precision, before a weight is read."""
    footprint = footprint_on_gpu(facts, skeletons[facts.name])
    placement = place(gigabytes * 10**9, footprint, accelerated=True)
    assert f"{placement.residency} {placement.quantization}" == expected


def footprint_on_gpu(facts: ModelFacts, parts: dict[str, torch.nn.Module]) -> Footprint:
    dtype = dtype_of(facts, torch.device("cuda"))
    assert dtype in (torch.float16, torch.bfloat16)
    footprint = footprint_of(facts, parts, dtype)
    assert footprint.needed(Residency.RESIDENT) > footprint.needed(Residency.MODEL) > footprint.needed(Residency.GROUP)
    return footprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("facts", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_full_size_models_with_random_weights_run_on_a_gpu(facts: ModelFacts, full_size: Path) -> None:
    """The very path that real weights take, at their native size: noise comes out, finite and of the right size."""
    import diffusers

    cuda, dtype = torch.device("cuda"), dtype_of(facts, torch.device("cuda"))
    parts = skeleton(facts, full_size)
    parts.pop("control", None)
    for part in parts.values():
        part.to_empty(device=cuda).to(dtype)
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    stock = getattr(diffusers, facts.pipeline_class)
    embedded = stock.from_pretrained(MODELS_DIR / MODELS[facts.name].folder)
    pipeline = stock(**{**embedded.components, **parts})
    family = {"sdxl": Sdxl, "flux": Flux}[facts.name](pipeline, facts)
    assert token_counter(pipeline.tokenizer)("a cat") > 2
    side = int(facts.native_pixels**0.5)
    job = replace(job_for(facts.name, width=side, height=side, num_inference_steps=2), revision=facts.revision)
    assert draw(family, job).shape == (side, side, 3)
