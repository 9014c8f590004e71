"""FLUX.1 Redux: images as prompts, what the prior's and the drawing pipeline's stock calls draw together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
import torch
import transformers
from checkpoint_stand_ins import write
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from drawing import Pixels, draw, draw_together, largest_difference, psnr
from PIL import Image
from tiny_oracles import OTHER, PICTURE, WIDE, WRONG, request_for

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.family_rows import family_row, prompted_by_images
from stable_diffusion_server.pipelines.library import Kind, identify
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.pipelines.loading.added_parts import added_files
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import LoadOptions, load
from stable_diffusion_server.types import DiffusionRequest, Task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DEV = family_row(FileIdentity(Kind.PIPELINE, ("flux",), "dev"))
assert DEV is not None
SPEC = replace(prompted_by_images(DEV, "redux"), control_folder=None)


def redux() -> Any:
    """A tiny prior: SigLIP of 64 tokens, and Redux."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vision = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=112,
                patch_size=14,
            )
        )
        parts = {"image_encoder": vision, "image_embedder": ReduxImageEncoder(redux_dim=32, txt_in_features=32)}
        for part in parts.values():
            tiny_families.enliven(part.eval().requires_grad_(False))
    processor = transformers.SiglipImageProcessor(size={"height": 112, "width": 112})
    return diffusers.FluxPriorReduxPipeline(**parts, feature_extractor=processor)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dev and a Redux folder, and the owner's spec."""
    folder = tmp_path_factory.mktemp("models")
    tiny_families.build("flux-dev").save_pretrained(folder / "dev")
    redux().save_pretrained(folder / "redux")
    (folder / "dev.toml").write_text('image_prompt = "redux"\n')
    return folder


@pytest.fixture(scope="module")
def family(models: Path) -> Any:
    """The tiny dev with Redux, as it is loaded from these folders."""
    found = find_owned_models(models, (models,))
    assert (dict(found.refused), found.remarks) == ({}, [])
    spec = found.specs["dev"]
    assert (Task.EDIT in spec.tasks, spec.max_references) == (True, 4)
    spec = replace(spec, dtype="float32", cpu_dtype="float32", measured_dtype=False)
    registry = load(models, "cpu", 1, LoadOptions(models={"dev": spec}))
    return registry.residents["dev"].family


def stock(family: Any, request: DiffusionRequest) -> Pixels:
    """The two stock calls."""
    pipe = family.pipeline
    texts = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    prior = diffusers.FluxPriorReduxPipeline(**redux().components | texts)
    images = [Image.fromarray(image.pixels) for image in request.references]
    found = prior(images, prompt=[request.prompt] * len(images))
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    drawing = diffusers.FluxPipeline(**parts)
    drawing.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": request.num_inference_steps, "guidance_scale": request.guidance_scale}
    size = {"height": request.height, "width": request.width}
    seed = torch.Generator().manual_seed(request.seed)
    return np.asarray(drawing(**found, **given, **size, generator=seed).images[0])


@pytest.mark.parametrize("references", [(PICTURE,), (PICTURE, WIDE)], ids=["one", "two"])
def test_images_prompt_as_in_the_two_stock_calls(references: Any, family: Any) -> None:
    """Images of any size after the text's tokens, summed; another image or prompt gives another picture."""
    request = request_for(SPEC, references=references)
    expected, drawn = stock(family, request), draw(family, request)
    wrong = [replace(request, prompt=WRONG), replace(request, references=(OTHER, *references[1:]))]
    furthest = min(largest_difference(draw(family, other), expected) for other in wrong)
    print(f"| flux-dev | redux, {len(references)} | {largest_difference(drawn, expected)} | {furthest} |")  # noqa: T201  # the table
    assert largest_difference(drawn, expected) <= 2 < furthest


def test_image_prompts_share_their_passes(family: Any) -> None:
    """Of unlike steps and guidance, and as drawn alone."""
    requests = [
        request_for(SPEC, references=(PICTURE,), num_inference_steps=3),
        request_for(SPEC, references=(OTHER,), guidance_scale=7.0, prompt=WRONG, seed=8),
    ]
    alone = [draw(family, request) for request in requests]
    together = draw_together(family, requests)
    assert min(psnr(one, other) for one, other in zip(alone, together, strict=True)) >= 45


def test_a_negative_prompt_is_refused_beside_images(family: Any) -> None:
    """Its row would have other tokens."""
    request = request_for(SPEC, references=(PICTURE,), negative_prompt="sea", extra=(("true_cfg_scale", 2.0),))
    with pytest.raises(InvalidInput, match="no negative prompt"):
        family.prepare(request)


def test_redux_is_known_and_counts_to_the_model(models: Path, family: Any, tmp_path: Path) -> None:
    """A part and no model; its files decide pixels; a file in its place, or half of it, is refused by a sentence."""
    found = identify(models / "redux")
    assert (found.kind, found.families, found.variant) == (Kind.IMAGE_PROMPT, ("flux",), "redux")
    spec = replace(SPEC, added_parts=(("image_encoder", "redux"),))
    assert len(added_files(spec, models)) == 5
    assert "image_encoder" in family.pipeline.components
    tiny_families.build("flux-dev").save_pretrained(tmp_path / "dev")
    (tmp_path / "dev.toml").write_text('image_prompt = "redux"\n')
    redux().save_pretrained(tmp_path / "redux")
    weights = tmp_path / "redux" / "image_embedder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    specs = find_owned_models(tmp_path, (tmp_path,)).specs
    with pytest.raises(ModelLoadError, match="is truncated"):
        load(tmp_path, "cpu", 1, LoadOptions(models=specs))
    write(
        tmp_path / "flat.safetensors",
        {"redux_up.weight": torch.zeros(96, 32), "redux_down.weight": torch.zeros(32, 96)},
    )
    (tmp_path / "dev.toml").write_text('image_prompt = "flat"\n')
    with pytest.raises(ModelLoadError, match=r"is not a folder of FLUX.1 Redux"):
        load(tmp_path, "cpu", 1, LoadOptions(models=find_owned_models(tmp_path, (tmp_path,)).specs))
