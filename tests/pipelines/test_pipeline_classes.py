"""The table of diffusers' pipeline classes: what is drawn, what is not and why, and what their calls take."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.pipeline_classes import pipeline_classes
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.permissions import check_extra
from stable_diffusion_server.pipelines.call_parameters import simple_types
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.stock_classes import TABLE, stock_class, why_not_drawn
from stable_diffusion_server.pipelines.stock_rows import stock_row
from stable_diffusion_server.types import Task

READ = json.loads(TABLE.read_text())
DRAWN = READ["drawn"]
# By diffusers' own names and our families: of each kind some.
SOME = (
    "StableDiffusionPipeline", "StableDiffusionXLPAGInpaintPipeline", "KandinskyV22CombinedPipeline", "IFPipeline",
    "AmusedPipeline", "StableCascadeCombinedPipeline", "CogView4Pipeline", "PixArtSigmaPAGPipeline", "Flux2Pipeline",
    "Krea2Pipeline", "QwenImageEditPlusPipeline", "LatentConsistencyModelPipeline", "Cosmos2TextToImagePipeline",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_that_of_the_pinned_diffusers() -> None:
    """`python -m scripts.pipeline_classes` writes it."""
    assert pipeline_classes() == READ


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SOME)
def test_what_was_read_from_the_source_is_what_inspection_finds(name: str) -> None:
    """Names, simple types and the defaults that rows have."""
    import diffusers  # with torch, which the other tests here do without

    call: Any = getattr(diffusers, name).__call__
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    listed = {key: one for key, one in inspect.signature(call).parameters.items() if one.kind not in variable}
    listed.pop("self")
    hints = typing.get_type_hints(call)
    types = {key: "|".join(sorted(one.__name__ for one in simple_types(hints.get(key)))) for key in listed}
    assert DRAWN[name]["parameters"] == types
    for key, value in DRAWN[name]["defaults"].items():
        assert listed[key].default == value


def test_every_drawn_class_has_a_row_that_requests_can_use() -> None:
    """Steps, a denoiser, tasks whose classes are in the table and take what the task has."""
    needed = {
        Task.TEXT_TO_IMAGE: {"prompt"},
        Task.IMAGE_TO_IMAGE: {"prompt", "image", "strength"},
        Task.INPAINT: {"prompt", "image", "mask_image"},
        Task.EDIT: {"prompt"},
    }
    for name in DRAWN:
        row, known = stock_row(name), stock_class(name)
        assert row is not None
        assert known is not None
        assert row.denoiser_part, name
        assert row.tasks, name
        assert row.default_steps >= 1, name
        assert row.native_pixels >= row.min_side**2 >= 64**2, name
        assert (row.max_references > 0) == (Task.EDIT in row.tasks), name
        for task in row.tasks:
            drawing = stock_class(known.tasks[task])
            assert drawing is not None, (name, task)
            assert drawing.parameters.names >= needed[task], (name, task)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("WanPipeline", "videos"),
        ("StableVideoDiffusionPipeline", "videos"),
        ("LTX2Pipeline", "videos"),
        ("WanModularPipeline", "videos"),
        ("AnimateDiffPipeline", "videos"),
        ("TextToVideoZeroPipeline", "videos"),
        ("AudioLDM2Pipeline", "sound"),
        ("StableAudioPipeline", "sound"),
        ("ShapEPipeline", "shapes"),
        ("LLaDA2Pipeline", "text"),
        ("MarigoldDepthPipeline", "measures"),
        ("DDPMPipeline", "does not call back"),
        ("LongCatImagePipeline", "does not call back"),
        ("StableCascadeDecoderPipeline", "combined class"),
        ("KandinskyV22PriorPipeline", "combined class"),
        ("StableDiffusionControlNetPipeline", "control image"),
        ("StableDiffusionUpscalePipeline", "enlarges"),
        ("StableDiffusionAttendAndExcitePipeline", "token_indices"),
        ("OnnxStableDiffusionPipeline", "ONNX"),
        ("QwenImageLayeredPipeline", "several images"),
        ("ChromaInpaintPipeline", "this version of diffusers"),
        ("SomePipeline", "is not known"),
    ],
)
def test_a_class_that_is_not_drawn_is_refused_with_the_reason(name: str, why: str, tmp_path: Path) -> None:
    """A sentence with its name, of any folder."""
    index = "modular_model_index.json" if "Modular" in name else "model_index.json"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / index).write_text(json.dumps({"_class_name": name, "unet": ["diffusers", "X"]}))
    (tmp_path / "mine" / "unet").mkdir()
    assert stock_class(name) is None
    owned = find_owned_models(tmp_path, [tmp_path])
    assert not owned.specs
    said = owned.refused["mine"] if owned.refused else ""
    if why == "is not known":
        assert not why_not_drawn(name)
        return
    assert why_not_drawn(name) in said
    assert name in said
    assert why in said
    assert said.endswith(".")


def test_native_families_come_before_the_table() -> None:
    """What is drawn by them is not drawn by its own call, and denoisers for inpainting are not drawn from text."""

    def row(family: str, kind: str, task: ModelTask = ModelTask.NORMAL, variant: str = "") -> Any:
        return family_row(FileIdentity(Kind.PIPELINE, (family,), variant=variant, task=task, pipeline_class=kind))

    assert row("sd15", "StableDiffusionPipeline").batches
    assert row("sd3", "StableDiffusion3Pipeline").batches
    assert not row("sd2", "StableDiffusionPipeline").batches
    assert not row("sd15", "StableDiffusionPAGPipeline").batches
    assert row("sdxl", "StableDiffusionXLImg2ImgPipeline", ModelTask.REFINER, "refiner") is None
    assert row("sd2", "StableDiffusionPipeline", ModelTask.INPAINT).tasks == (Task.INPAINT,)
    assert row("sd2", "StableDiffusionLatentUpscalePipeline", ModelTask.INPAINT) is None
    assert row("sd2", "StableDiffusionInpaintPipeline", ModelTask.INPAINT).tasks == (Task.INPAINT,)


def test_parameters_that_a_class_does_not_take_are_refused_before_a_job_is_accepted() -> None:
    """By the class of the task, with types and bounds, without loading anything."""
    spec = stock_row("StableDiffusionPAGPipeline")
    assert spec is not None
    spec = replace(spec, name="mine")
    check_extra((("pag_scale", 2), ("clip_skip", 1)), spec, Task.TEXT_TO_IMAGE)
    wrong: list[tuple[str, Any]] = [
        ("cfg_trunc_ratio", 0.5), ("pag_scale", "a"), ("pag_scale", float("nan")), ("clip_skip", True),
        ("prompt", "x"), ("negative_prompt", "x"), ("callback_on_step_end", "x"), ("num_images_per_prompt", 9),
        ("x" * 5000, 1), ("__class__", "x"), ("latents", 1.0), ("pag_scale", 1e300),
    ]  # fmt: skip
    for name, value in wrong:
        with pytest.raises(InvalidInput) as refused:
            check_extra(((name, value),), spec, Task.TEXT_TO_IMAGE)
        assert str(refused.value.field).startswith("extra.")
        assert len(refused.value.detail) < 1000
    with pytest.raises(InvalidInput):  # its class for images has no such parameter, as its one for text has
        check_extra((("pag_adaptive_scale", 1.0), ("eta", 1.0), ("guidance", 1)), spec, Task.IMAGE_TO_IMAGE)
    combined = stock_row("KandinskyV22CombinedPipeline")
    assert combined is not None
    check_extra((("prior_num_inference_steps", 10),), combined)
    with pytest.raises(InvalidInput):
        check_extra((("prior_num_inference_steps", 100_000),), combined)


def test_the_size_of_a_folder_is_that_of_its_denoiser(tmp_path: Path) -> None:
    """96 latents of 8 pixels; without latents as many pixels; what is odd changes nothing."""

    def size(denoiser: dict[str, Any] | None, vae: dict[str, Any] | None, kind: str = "StableDiffusionPipeline") -> int:
        from stable_diffusion_server.pipelines.stock_sizes import with_folder_size

        for name, config in (("unet", denoiser), ("vae", vae)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").unlink(missing_ok=True)
            if config is not None:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
        spec = stock_row(kind)
        assert spec is not None
        return with_folder_size(spec, tmp_path).native_pixels

    four = {"block_out_channels": [1, 2, 3, 4]}
    assert size({"sample_size": 96}, four) == 768**2
    assert size({"sample_size": 64}, None, "IFPipeline") == 64**2
    for odd in ({}, {"sample_size": "x"}, {"sample_size": -5}, {"sample_size": 10**9}, {"sample_size": True}, None):
        assert size(odd, four) == 1024**2
    for odd in ({"block_out_channels": []}, {"block_out_channels": [1] * 500}, {}, {"block_out_channels": 3}):
        assert size({"sample_size": 64}, odd) == 1024**2


def test_nothing_here_imports_torch() -> None:
    """The library and the catalogue answer without it."""
    code = (
        "import sys; from stable_diffusion_server.pipelines.stock_rows import stock_row; stock_row('IFPipeline'); "
        "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603  # the code above
