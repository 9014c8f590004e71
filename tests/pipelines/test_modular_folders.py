"""Folders of modular pipelines: drawn by their blocks, from their own files, and never by code that they bring."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_stock
from drawing import draw, largest_difference
from stock_families import request_of
from test_any_class import whole_call
from tiny_parts import SIDE

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.families.stock import Stock
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

INDEX = "modular_model_index.json"
SPEC = f'native_size = {SIDE * 2}\ndtype = "float32"\n'


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Anima, as diffusers saves it: its index names the place where it was saved."""
    made = tmp_path_factory.mktemp("whole") / "anima"
    tiny_stock.build("anima").save_pretrained(str(made), overwrite_modular_index=True)
    return made


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage, whose index names a repository of the hub, as published folders do."""
    shutil.copytree(whole, tmp_path / "mine")
    _change(tmp_path / "mine", lambda name, entry: entry[2].update(pretrained_model_name_or_path="someone/anima"))
    (tmp_path / "mine.toml").write_text(SPEC)
    return tmp_path / "mine"


def _change(folder: Path, change: Callable[[str, Any], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, entry in index.items():
        if isinstance(entry, list):
            change(name, entry)
    (folder / INDEX).write_text(json.dumps(index))


def _refusal(folder: Path) -> str:
    """What is said of a folder, when it is found or when it is loaded."""
    owned = find_owned_models(folder.parent, [folder.parent])
    if "mine" in owned.refused:
        return owned.refused["mine"]
    with pytest.raises(ModelLoadError) as refused:
        load(folder.parent, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
    return refused.value.detail


def test_a_folder_is_drawn_by_its_blocks(folder: Path) -> None:
    """Equal to the pipeline's own call; nothing is looked for in the repository that the index names."""
    owned = find_owned_models(folder.parent, [folder.parent])
    assert not owned.refused
    registry = load(folder.parent, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
    loaded = registry.residents["mine"]
    assert isinstance(loaded.family, Stock)
    request = request_of(loaded.family, revision=loaded.spec.revision)
    assert largest_difference(draw(registry, request), whole_call("anima", request)) == 0
    assert registry.count_tokens("mine", "a red circle") > 1
    assert "-" in loaded.spec.revision, "the digest of the files is part of the revision"
    assert loaded.info.bytes > 100_000


@pytest.mark.parametrize("name", ["pipeline.py", "block.py", "modular_blocks_mine.PY"])
def test_code_in_a_folder_is_refused_and_not_run(name: str, folder: Path) -> None:
    """With or without a configuration that names it."""
    ran = folder.parent / "ran"
    (folder / name).write_text(f"open({str(ran)!r}, 'w').close()\nclass Blocks: ...\n")
    said = _refusal(folder)
    assert "code of models is never run here" in said
    assert name in said
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config.json", "modular_config.json"])
def test_a_configuration_that_names_code_is_refused(name: str, folder: Path) -> None:
    """Code of a repository would be fetched and run by diffusers, where it is trusted."""
    (folder / name).write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "someone/evil--block.Blocks"}}))
    assert "code of models is never run here" in _refusal(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda name, entry: name == "transformer" and entry.__setitem__(slice(0, 2), ["os", "PathLike"]), "of os"),
        (lambda name, entry: name == "tokenizer" and entry.__setitem__(slice(0, 2), ["subprocess", "Popen"]), "Popen"),
        (lambda name, entry: name == "vae" and entry.__setitem__(slice(0, 2), ["diffusers", "DiffusionPipeline"]),
         "no network"),
        (lambda name, entry: name == "vae" and entry.__setitem__(slice(0, 2), ["diffusers_modules.evil", "X"]),
         "not known here"),
    ],
)  # fmt: skip
def test_parts_of_other_libraries_are_refused(damage: Any, sentence: str, folder: Path) -> None:
    """Nothing that an index names is imported."""
    _change(folder, damage)
    assert sentence in _refusal(folder)


def test_the_blocks_are_those_of_the_class_whatever_the_index_says(folder: Path) -> None:
    """Other names in the index, of blocks and of code, change nothing."""
    index = json.loads((folder / INDEX).read_text())
    index |= {"_blocks_class_name": "WanBlocks", "auto_map": {"x": "evil.X"}, "vae_path": "../../etc"}
    (folder / INDEX).write_text(json.dumps(index))
    owned = find_owned_models(folder.parent, [folder.parent])
    registry = load(folder.parent, "cpu", 1, LoadOptions(models={"mine": owned.specs["mine"]}))
    family = registry.residents["mine"].family
    assert isinstance(family, Stock)
    assert type(family.pipeline.blocks).__name__ == "AnimaAutoBlocks"


def test_a_part_that_only_the_hub_has_is_missing(folder: Path) -> None:
    """Nothing is fetched; the sentence names the part."""
    shutil.rmtree(folder / "text_conditioner")
    said = _refusal(folder)
    assert "text_conditioner" in said
    assert "must be in its folder" in said


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"_class_name": 7}', '{"_class_name": "AuraFlowPipeline"}', "{" * 9999]
)
def test_an_odd_index_is_refused(text: str, folder: Path) -> None:
    """By a sentence, whatever it holds."""
    (folder / INDEX).write_text(text)
    owned = find_owned_models(folder.parent, [folder.parent])
    assert not owned.specs
