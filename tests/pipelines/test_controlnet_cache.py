"""Named ControlNets are loaded at their first use, unloaded for others, and refused if they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from drawing import draw, largest_difference
from guided_families import BLOCKS, Guided, alive, guided
from safetensors.torch import load_file, save_file
from tiny_oracles import request_for

from stable_diffusion_server.errors import InvalidInput, OutOfMemory
from stable_diffusion_server.pipelines import ControlNetFolder, WeightDigests, controlnet_cache
from stable_diffusion_server.pipelines.controlnet_cache import ControlNetCache
from stable_diffusion_server.types import ControlImage, ControlKind

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CANNY, DEPTH = ControlKind.CANNY, ControlKind.DEPTH


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODELS_DIR of a small SD 1.5."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(models_dir: Path) -> Guided:
    """A small SD 1.5 whose networks are not loaded."""
    built = guided("sd15", models_dir)
    built.family.__dict__.pop("controlnets", None)
    return built


def both(model: Guided) -> tuple[ControlImage, ...]:
    return model.unit("canny-sd15", CANNY), model.unit("depth-sd15", DEPTH, BLOCKS)


def test_networks_are_loaded_once_and_the_oldest_is_unloaded_for_another(
    model: Guided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that still holds the unloaded one is drawn with it."""
    canny, depth = both(model)
    cache = model.family.controlnets
    assert not cache.networks
    request = request_for(model.family.spec, controls=(canny, depth))
    drawn = draw(model.family, request)
    loaded = [*cache.networks]
    assert len(loaded) == 2
    assert cache.use(canny) is loaded[0]
    monkeypatch.setattr(controlnet_cache, "_MOST", 1)
    assert largest_difference(draw(model.family, request), drawn) == 0
    assert [*cache.networks] == [cache.use(depth)]
    assert cache.use(canny) is not loaded[0]


def test_memory_that_runs_out_unloads_others_and_tries_again(model: Guided, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to unload the request fails, with a sentence, as one that may be repeated."""
    canny, depth = both(model)
    cache = model.family.controlnets
    move, left = diffusers.ControlNetModel.to, [1]

    def moved(network: torch.nn.Module, *where: object) -> torch.nn.Module:
        if left and left.pop():
            raise torch.OutOfMemoryError
        return move(network, *where)

    monkeypatch.setattr(diffusers.ControlNetModel, "to", moved)
    with pytest.raises(OutOfMemory, match="no memory left for canny-sd15"):
        cache.use(canny)
    cache.use(canny)
    left.append(1)
    assert [*cache.networks] != [cache.use(depth)]
    assert len(cache.networks) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), "cannot be loaded"),
        (lambda tensors: tensors.update({"conv_in.weight": torch.ones(3, 4)}), "bad-canny"),
        (lambda tensors: tensors.update({"extra.weight": torch.ones(3, 4)}), "cannot be loaded"),
    ],
    ids=["a weight lacks", "another shape", "one too many"],
)
def test_a_damaged_file_is_refused_in_a_sentence(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, model: Guided, models_dir: Path, tmp_path: Path
) -> None:
    """When it is drawn with, at the field `controls`; the server goes on."""
    tensors = load_file(models_dir / "controlnet" / "canny-sd15" / "diffusion_pytorch_model.safetensors")
    change(tensors)
    (tmp_path / "controlnet").mkdir()
    save_file(tensors, tmp_path / "controlnet" / "bad-canny.safetensors")
    _refused(model, tmp_path, "bad-canny", words)


def test_networks_for_other_models_are_refused_in_a_sentence(model: Guided, tmp_path: Path) -> None:
    """Of the family but another width, and with further channels."""
    config = {name: one for name, one in model.networks["canny-sd15"].config.items() if not name.startswith("_")}
    for name, own, words in (
        ("narrow-canny", {"block_out_channels": (32, 32, 64, 64)}, "was made for another model"),
        ("five-canny", {"conditioning_channels": 5}, "more than the colours"),
    ):
        network = alive(diffusers.ControlNetModel.from_config({**config, **own}), 0)
        network.save_pretrained(tmp_path / "controlnet" / name)
        _refused(model, tmp_path, name, words)


def _refused(model: Guided, folder: Path, name: str, words: str) -> None:
    family = model.family
    found = ControlNetFolder([folder], WeightDigests())
    cache = ControlNetCache(found, family.spec, family.pipeline, family.device)
    facts = found.find(name, CANNY, family.spec)
    with pytest.raises(InvalidInput, match=words) as refused:
        cache.use(ControlImage(facts.name, facts.digest, CANNY, BLOCKS))
    assert refused.value.faults[0][0] == "controls"
    assert str(folder) not in refused.value.detail
    assert not cache.networks
