"""The embedded models' own ControlNets are units too: by name or kind, and equal to `canny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drawing import MODELS_DIR, draw, job_for, largest_difference, outline

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFolder
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.registry import load
from stable_diffusion_server.types import ControlImage, ControlKind

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ControlNetFolder:
    """The ControlNets of the embedded models."""
    return ControlNetFolder([MODELS_DIR], WeightDigests(tmp_path_factory.mktemp("digests") / "digests.json"))


@pytest.fixture(scope="module")
def family(folder: ControlNetFolder) -> Any:
    """The embedded models with these ControlNets."""
    return load(MODELS_DIR, "cpu", 1, LoadOptions(controlnets=folder))


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_model_has_its_own_network_and_not_the_other_s(folder: ControlNetFolder, model: str) -> None:
    """Found by its kind, by its name, and by AUTOMATIC1111's form of it."""
    spec = MODELS[model]
    name = Path(spec.control_folder or "").name
    assert [*folder.usable(spec)] == [name]
    found = folder.find(None, ControlKind.CANNY, spec)
    assert (found.name, found.default_weight) == (name, spec.control_scale)
    assert folder.find(f"{name} [{found.digest[:8]}]", None, spec) == found


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_a_unit_of_the_model_s_own_network_draws_as_its_edges_do(
    family: Any, folder: ControlNetFolder, model: str
) -> None:
    """With the same control image and weight."""
    edges = outline()
    found = folder.find(None, ControlKind.CANNY, MODELS[model])
    unit = ControlImage(found.name, found.digest, ControlKind.CANNY, edges, weight=0.8)
    by_edges = draw(family, job_for(model, control=edges, control_scale=0.8))
    assert largest_difference(draw(family, job_for(model, controls=(unit,))), by_edges) <= 1
    assert largest_difference(draw(family, job_for(model)), by_edges) > 2
