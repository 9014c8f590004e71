"""Folders of FLUX.2 klein and Z-Image in MODELS_DIR: found, told apart, loaded, placed; and refused when damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_families
from drawing import draw, largest_difference
from tiny_qwen3 import by_stock, klein, order, z_image

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import Registry, load
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAMES = ("flux2-klein", "flux2-klein-base", "z-image-turbo", "z-image")
SMALL = 'native_size = 128\ndtype = "float32"\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each variant; the specs beside them make images small and the numbers fp32."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        tiny_families.build(name).save_pretrained(folder / name)
        (folder / f"{name}.toml").write_text(SMALL)
    return folder


def loaded(folder: Path, **specs: ModelSpec) -> Registry:
    """The models of a folder on the CPU."""
    return load(folder, "cpu", 1, LoadOptions(models=specs or find_owned_models(folder, [folder]).specs))


def test_each_folder_is_found_with_the_defaults_of_its_card(models: Path) -> None:
    """The distilled ones take no guidance; klein edits with up to four references."""
    found = find_owned_models(models, [models])
    assert not found.refused
    assert not found.remarks
    specs = found.specs
    defaults = {name: (spec.default_steps, spec.default_guidance, spec.takes_guidance) for name, spec in specs.items()}
    assert defaults == {
        "flux2-klein": (4, 1.0, False),
        "flux2-klein-base": (50, 4.0, True),
        "z-image-turbo": (8, 0.0, False),
        "z-image": (50, 4.0, True),
    }
    assert [(Task.EDIT in specs[name].tasks, specs[name].max_references) for name in NAMES[1:3]] == [
        (True, 4),
        (False, 0),
    ]
    assert all(spec.source for spec in specs.values())


def test_a_spec_says_what_a_file_does_not_and_which_keys_have_no_effect(models: Path, tmp_path: Path) -> None:
    """Z-Image whose schedule was changed is Turbo if its owner says so; clip skip is SDXL's."""
    shutil.copytree(models / "z-image", tmp_path / "z-image")
    (tmp_path / "z-image.toml").write_text('variant = "turbo"\nclip_skip = 1\nnegative_prompt = "blurry"\n')
    found = find_owned_models(tmp_path, [tmp_path])
    assert found.specs["z-image"].default_steps == 8
    assert list(found.remarks) == [
        "The spec of z-image has keys without an effect on this model: clip_skip, negative_prompt."
    ]


def test_loaded_models_draw_as_the_stock_pipelines(models: Path) -> None:
    """Through the registry, in the placement it chose, each one of both families."""
    specs = find_owned_models(models, [models]).specs
    registry = loaded(models, **{name: specs[name] for name in ("flux2-klein", "z-image")})
    for name, tiny in (("flux2-klein", klein()), ("z-image", z_image("base"))):
        request = order(tiny, num_inference_steps=2)
        drawn = draw(registry.residents[name].family, request)
        assert largest_difference(drawn, by_stock(tiny, request)) <= 2
        assert registry.residents[name].placement is not None
        assert registry.count_tokens(name, "a red circle") == tiny.count_tokens("a red circle")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_truncated_or_missing_part_is_refused_by_a_sentence(part: str, models: Path, tmp_path: Path) -> None:
    """Which file it is; nothing is drawn with random weights."""
    shutil.copytree(models / "flux2-klein", tmp_path / "flux2-klein")
    spec = find_owned_models(tmp_path, [tmp_path]).specs["flux2-klein"]
    weights = next((tmp_path / "flux2-klein" / part).glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(ModelLoadError, match=f"{part}.*{weights.name}|{weights.name}.*{part}"):
        loaded(tmp_path, **{"flux2-klein": spec})
    weights.unlink()
    with pytest.raises(ModelLoadError, match=part):
        loaded(tmp_path, **{"flux2-klein": spec})


@pytest.mark.parametrize(
    ("name", "donor", "part", "sentence"),
    [
        ("flux2-klein", "z-image", "vae", "holds a AutoencoderKL, and FLUX.2's is needed"),
        ("flux2-klein", "z-image", "text_encoder", "3 layers, and 27 are read"),
        ("z-image", "flux2-klein", "vae", "in_channels of 16, and the VAE gives 32"),
    ],
)
def test_parts_of_another_model_are_refused(
    name: str, donor: str, part: str, sentence: str, models: Path, tmp_path: Path
) -> None:
    """Otherwise each picture would fail halfway, or be noise."""
    folder = tmp_path / name
    shutil.copytree(models / name, folder)
    shutil.rmtree(folder / part)
    shutil.copytree(models / donor / part, folder / part)
    index, other = (json.loads((models / each / "model_index.json").read_text()) for each in (name, donor))
    (folder / "model_index.json").write_text(json.dumps({**index, part: other[part]}))
    spec = find_owned_models(tmp_path, [tmp_path]).specs[name]
    with pytest.raises(ModelLoadError, match=sentence):
        loaded(tmp_path, **{name: spec})
