"""An SDXL refiner as a second model: what the two stock calls draw, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoint_stand_ins import refiner_unet, sdxl_pipeline, write
from drawing import PROMPT, Pixels, disc_mask, draw, draw_together, job_for, largest_difference, psnr, scene
from original_names import sdxl_tensors, unet_tensors
from PIL import Image

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.family_rows import family_row, refined
from stable_diffusion_server.pipelines.library import Kind
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.pipelines.loading.added_parts import added_files, load_added, with_added
from stable_diffusion_server.pipelines.loading.components import empty_pipeline, load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import USUAL_WORK, architecture_of, footprint_of
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.types import DiffusionRequest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROW = family_row(FileIdentity(Kind.CHECKPOINT, ("sdxl",)))
assert ROW is not None
SPEC = replace(refined(ROW, "refiner.safetensors"), control_folder=None)
STEPS = {"num_inference_steps": 5, "guidance_scale": 5.0, "scheduler": "euler", "height": 64, "width": 64}


@pytest.fixture(scope="module")
def family() -> Any:
    """A small SDXL with a small refiner."""
    return Sdxl(with_added(sdxl_pipeline(), {"refiner": refiner_unet()}, SPEC), SPEC)


def stock(family: Any, job: DiffusionRequest) -> Pixels:
    """The two stock calls; the second one gets the latents of the first one."""
    parts = {name: part for name, part in family.pipeline.components.items() if name != "refiner"}
    scheduler = {"euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler"}[job.scheduler]

    def again() -> Any:
        return getattr(diffusers, scheduler).from_config(family.pipeline.scheduler.config)

    given: dict[str, Any] = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
    }
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if job.image else diffusers.StableDiffusionXLPipeline
    base = kind(**{**parts, "scheduler": again()}, add_watermarker=False)
    size = {"height": 64, "width": 64}
    start = {"image": Image.fromarray(job.image.pixels), "strength": job.strength} if job.image else size
    latents = base(
        **given, **start, denoising_end=0.8, output_type="latent", generator=torch.Generator().manual_seed(job.seed)
    ).images
    second = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**parts, "unet": family.pipeline.refiner, "scheduler": again(), "text_encoder": None, "tokenizer": None},
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    seed = torch.Generator().manual_seed(job.seed + 1)
    return np.asarray(second(**given, image=latents, denoising_start=0.8, generator=seed).images[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": "green", "scheduler": "euler_a"},
        {"guidance_scale": 1.0},
        {"image": scene(64, 64), "strength": 0.6},
    ],
    ids=["text", "ancestral, negative prompt", "no guidance", "image"],
)
def test_a_refined_picture_is_that_of_the_two_stock_calls(changes: dict[str, Any], family: Any) -> None:
    """The base up to 0.8 of the schedule, the refiner's UNet from there, with its own conditioning."""
    job = job_for("sdxl", refine=True, **{**STEPS, **changes})
    expected, drawn = stock(family, job), draw(family, job)
    print(f"| sdxl | refiner, {changes} | {largest_difference(drawn, expected)} |")  # noqa: T201  # the table
    assert expected.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(drawn, expected) <= 2
    assert largest_difference(draw(family, replace(job, prompt="sea")), expected) > 2
    assert largest_difference(draw(family, replace(job, refine=False)), expected) > 2


def test_base_and_refiner_share_passes_with_their_like(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unlike steps: at each step one pass of each UNet that is needed, and pictures as drawn alone."""
    jobs = [
        job_for("sdxl", refine=True, **STEPS),
        job_for("sdxl", refine=True, **{**STEPS, "num_inference_steps": 4, "seed": 8, "guidance_scale": 1.0}),
        job_for("sdxl", **{**STEPS, "num_inference_steps": 6}),
    ]
    alone = [draw(family, job) for job in jobs]
    calls: list[tuple[str, int]] = []
    for name in ("unet", "refiner"):
        forward = getattr(family.pipeline, name).forward

        def counted(*given: Any, name: str = name, forward: Any = forward, **named: Any) -> Any:
            calls.append((name, len(named["sample"])))
            return forward(*given, **named)

        monkeypatch.setattr(getattr(family.pipeline, name), "forward", counted)
    together = draw_together(family, jobs)
    assert calls[0] == ("unet", 5)
    steps = [name for name, _ in calls]
    assert (steps.count("unet"), steps.count("refiner") <= 2) == (6, True)
    assert min(psnr(one, other) for one, other in zip(alone, together, strict=True)) >= 45


def test_a_masked_picture_gets_the_usual_second_pass(family: Any) -> None:
    """The refiner has no part in it."""
    job = job_for("sdxl", refine=True, image=scene(64, 64), mask=disc_mask(64, 64), **STEPS)
    parts = {name: part for name, part in family.pipeline.components.items() if name != "refiner"}
    plain = Sdxl(diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False), SPEC)
    assert np.array_equal(draw(family, job), draw(plain, job))


def test_the_owners_spec_names_the_refiner(family: Any, tmp_path: Path) -> None:
    """A file beside the model; it is counted, is part of the revision's files, and is no model by itself."""
    write(tmp_path / "base.safetensors", sdxl_tensors(family.pipeline))
    write(tmp_path / "refiner.safetensors", unet_tensors(family.pipeline.refiner))
    (tmp_path / "base.toml").write_text('refiner = "refiner"\n')
    found = find_owned_models(tmp_path, (tmp_path,))
    assert "is a refiner: name it in a model's spec, as refiner = 'refiner'" in found.refused["refiner"]
    spec = replace(found.specs["base"], cpu_dtype="float32")
    assert ([*added_files(spec, tmp_path)], found.remarks) == ([f"refiner/{tmp_path.name}/refiner.safetensors"], [])
    parts = empty_pipeline(spec, tmp_path)
    plain = {name: part for name, part in parts.items() if name != "refiner"}
    needed, without = (
        footprint_of(spec, architecture_of(spec, some, torch.float32), USUAL_WORK) for some in (parts, plain)
    )
    weights = sum(parameter.numel() for parameter in family.pipeline.refiner.parameters())
    assert sum(needed.parts.values()) - sum(without.parts.values()) == 4 * weights
    assert needed.working["refiner"] > 5e7
    pipeline = load_pipeline(spec, tmp_path, torch.device("cpu"))
    job = job_for("sdxl", refine=True, prompt=PROMPT, **STEPS)
    assert np.array_equal(draw(Sdxl(pipeline, spec), job), draw(family, job))


def test_a_refiners_folder_gives_its_unet(family: Any, tmp_path: Path) -> None:
    """As `stable-diffusion-xl-refiner-1.0`; a folder without weights is refused by a sentence."""
    family.pipeline.refiner.save_pretrained(tmp_path / "refiner" / "unet")
    spec = replace(SPEC, added_parts=(("refiner", "refiner"),))
    loaded = load_added(spec, tmp_path, torch.float32)["refiner"].state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in family.pipeline.refiner.state_dict().items())
    assert len(added_files(spec, tmp_path)) == 2
    (tmp_path / "refiner" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="holds no weights"):
        load_added(spec, tmp_path, torch.float32)


def test_another_model_is_no_refiner(family: Any, tmp_path: Path) -> None:
    """By its kind when the folder is read, by its widths when it is loaded."""
    write(tmp_path / "base.safetensors", sdxl_tensors(family.pipeline))
    (tmp_path / "base.toml").write_text('refiner = "base"\n')
    assert "which is no refiner" in find_owned_models(tmp_path, (tmp_path,)).refused["base"]
    (tmp_path / "base.toml").write_text('refiner = "gone"\n')
    assert "is not in MODELS_DIR" in find_owned_models(tmp_path, (tmp_path,)).refused["base"]
    pipeline = family.pipeline
    with pytest.raises(ModelLoadError, match=r"refiner.safetensors/unet has a cross_attention_dim of 192"):
        with_added(pipeline, {"refiner": pipeline.unet}, SPEC)
