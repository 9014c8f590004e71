"""Folders in MODELS_DIR whose class only diffusers draws: found, loaded, placed, drawn; odd ones refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from drawing import draw, largest_difference
from stock_families import direct_call, request_of
from tiny_parts import SIDE

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.families.stock import Stock
from stable_diffusion_server.pipelines.library import FileIdentity, Kind
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load
from stable_diffusion_server.pipelines.stock_classes import stock_class
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

DRAWN: dict[str, dict[str, Any]] = {
    "lumina2": {"guidance_scale": 4.0},
    "sana": {"guidance_scale": 4.5, "use_resolution_binning": False},
    "qwen-image": {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "pixart-sigma": {"guidance_scale": 4.5, "use_resolution_binning": False},
}
SPEC = f'native_size = {SIDE * 2}\ndtype = "float32"\nguidance = GUIDANCE\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the drawn names, with its owner's spec beside it."""
    models = tmp_path_factory.mktemp("models")
    for name, arguments in DRAWN.items():
        tiny_families.build(name).save_pretrained(models / name)
        guidance = arguments.get("guidance_scale") or arguments["true_cfg_scale"]
        (models / f"{name}.toml").write_text(SPEC.replace("GUIDANCE", str(guidance)))
    return models


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy and damage."""
    made = tmp_path_factory.mktemp("whole") / "mine"
    tiny_families.build("aura-flow").save_pretrained(made)
    return made


@pytest.mark.parametrize("name", DRAWN)
def test_a_folder_is_drawn_as_its_class_draws_it(name: str, folder: Path) -> None:
    """Through the library and the registry, whose info says where and how large it is."""
    owned = find_owned_models(folder, [folder])
    assert not owned.refused
    registry = load(folder, "cpu", 1, LoadOptions(models={name: owned.specs[name]}))
    loaded = registry.residents[name]
    assert isinstance(loaded.family, Stock)
    request = request_of(loaded.family, revision=loaded.spec.revision)
    class_name = owned.specs[name].pipeline_class
    pipeline = getattr(diffusers, class_name).from_pretrained(folder / name)
    ours, stock = draw(registry, request), direct_call(pipeline, request, **DRAWN[name])
    assert largest_difference(ours, stock) <= 2
    other = replace(request, prompt="a small house by the sea")
    assert largest_difference(ours, draw(registry, other)) > 4
    assert registry.batch_limit(request) == 1
    assert registry.count_tokens(name, "a red circle") > 1
    assert loaded.info.bytes > 100_000
    assert "-" in loaded.spec.revision, "the digest of the files is part of the revision"
    estimated = [remark for remark in loaded.info.remarks if "estimated" in remark]
    assert bool(estimated) == (name == "lumina2"), estimated  # a class without a counter


def test_int8_is_another_revision_and_another_picture(folder: Path) -> None:
    """QUANTIZE=int8 packs the transformer's layers as it does those of other families."""
    spec = replace(find_owned_models(folder, [folder]).specs["lumina2"], quantize="int8")
    registry = load(folder, "cpu", 1, LoadOptions(models={"lumina2": spec}))
    loaded = registry.residents["lumina2"]
    assert loaded.info.quantization == "int8"
    assert isinstance(loaded.family, Stock)
    drawn = draw(registry, request_of(loaded.family, revision=loaded.spec.revision))
    assert drawn.std() > 5


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda files: _cut(files / "transformer" / "diffusion_pytorch_model.safetensors"), "truncated"),
        (lambda files: (files / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "holds no weights"),
        (lambda files: _relist(files, text_encoder=["os", "PathLike"]), "lists PathLike of os as text_encoder"),
        (lambda files: _relist(files, tokenizer=["subprocess", "Popen"]), "lists Popen of subprocess as tokenizer"),
        (lambda files: _relist(files, transformer=["diffusers", "DiffusionPipeline"]), "which is no network"),
        (lambda files: _relist(files, transformer=["diffusers", "utils"]), "which is no network"),
        (lambda files: _relist(files, text_encoder=["transformers", "AutoModel"]), "which is no network"),
    ],
)
def test_what_is_broken_is_refused_by_a_sentence(damage: Any, sentence: str, whole: Path, tmp_path: Path) -> None:
    """Before anything is read in whole, and without importing what an index names."""
    shutil.copytree(whole, tmp_path / "mine")
    damage(tmp_path / "mine")
    owned = find_owned_models(tmp_path, [tmp_path])
    said = owned.refused.get("mine", "")
    if not said:
        with pytest.raises(ModelLoadError) as refused:
            load(tmp_path, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
        said = refused.value.detail
    assert sentence in said


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _relist(folder: Path, **parts: list[str]) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **parts}))


@pytest.mark.parametrize(
    "class_name",
    [
        "../x", "os.path", "subprocess.Popen", "__class__", "DiffusionPipeline", "FluxModularPipeline",
        "AutoencoderKL", "StableDiffusion3Pipeline2", "AuraFlowPipeline\u0000", "", "WanPipeline", "AudioLDM2Pipeline",
        "QwenImageLayeredPipeline", "StableDiffusion3ControlNetPipeline", "SanaVideoPipeline", "x" * 5000, 7, None,
        ["AuraFlowPipeline"], {"a": 1},
    ],
)  # fmt: skip
def test_a_folder_of_an_odd_class_is_refused_by_a_sentence(class_name: Any, whole: Path, tmp_path: Path) -> None:
    """Classes of other modules, modular ones, video ones and no classes at all."""
    shutil.copytree(whole, tmp_path / "mine")
    _relist(tmp_path / "mine", _class_name=class_name)
    owned = find_owned_models(tmp_path, [tmp_path])
    said = owned.refused.get("mine", "")
    if not said and owned.specs:  # of a family that is drawn, so that the class is read when it is loaded
        with pytest.raises(ModelLoadError) as refused:
            load(tmp_path, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
        said = refused.value.detail
    assert said.endswith("."), said
    assert len(said) <= 1001


@pytest.mark.parametrize("row", STOCK_ROWS.values(), ids=lambda row: row.pipeline_class)
def test_rows_agree_with_the_pinned_diffusers(row: Any) -> None:
    """Each class is there, calls back, and has a class for each task of its row."""
    known = stock_class(row.pipeline_class)
    assert known is not None
    assert {"callback_on_step_end", "callback"} & known.parameters.names
    assert set(row.tasks) <= known.tasks.keys()
    assert bool(row.takes_guidance) == bool(known.parameters.guidance)
    assert not known.parameters.guidance or row.guidance_name == known.parameters.guidance
    assert not row.takes_negative_prompt or "negative_prompt" in known.parameters.names
    assert row.source
    assert row.any_extra
    assert not row.batches


def test_classes_of_native_families_keep_their_rows() -> None:
    """An SDXL or FLUX.1 folder is not drawn by its stock call."""
    for family, variant, kind in (("sdxl", "", "StableDiffusionXLPipeline"), ("flux", "dev", "FluxPipeline")):
        from stable_diffusion_server.pipelines.family_rows import family_row

        row = family_row(FileIdentity(Kind.PIPELINE, (family,), variant=variant, pipeline_class=kind))
        assert row is not None
        assert row.pipeline_class == kind
        assert row.batches


def test_the_tiny_transformers_are_counted() -> None:
    """Memory of the classes with a counter is not estimated."""
    from stable_diffusion_server.pipelines.loading.working_memory import Architecture

    for name in ("sd3", "chroma", "sana", "aura-flow", "pixart-sigma", "qwen-image"):
        pipeline = tiny_families.build(name)
        if name == "sd3":  # with positions for 1024 × 1024
            config = {**pipeline.transformer.config, "pos_embed_max_size": 64}
            pipeline.transformer = diffusers.SD3Transformer2DModel.from_config(config)
        parts = {"transformer": pipeline.transformer.to("meta"), "vae": pipeline.vae.to("meta")}
        model = Architecture(parts, dict.fromkeys(parts, torch.float32), 64)
        counted = {part: model.count(part) for part in parts}
        assert not any(need.estimated for need in counted.values()), (name, counted)
        assert all(need.of(SIDE**2) > 0 for need in counted.values())
