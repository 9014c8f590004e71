"""Each trainer's format, family by family: drawn as its weights merged by hand, and what is not used is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import TRAINED, merging
from drawing import MODELS_DIR, draw, job_for
from lora_layouts import write

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager, remarks_of
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline

pytestmark = pytest.mark.slow

# Of Stability's model at 64 × 64 little depends on a few layers.
WEIGHTS = {"sdxl": (8.0, -5.0), "flux": (1.0, -0.6)}
KINDS: dict[str, Any] = {"sdxl": Sdxl, "flux": Flux}


@dataclass(frozen=True)
class Pair:
    """A family with a LoRA folder, and one whose weights are merged by hand."""

    ours: Any
    merged: Any
    folder: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Pair]:
    """Both families."""
    made = {}
    for name, kind in KINDS.items():
        folder, spec = tmp_path_factory.mktemp(name), MODELS[name]
        own, other = (load_pipeline(spec, MODELS_DIR, torch.device("cpu")) for _ in range(2))
        # Merging is invisible to the prompt cache.
        merged = kind(other, spec, prompt_cache=PromptCache(0))
        made[name] = Pair(kind(own, spec, loras=LoraManager(own, folder)), merged, folder)
    return made


def quick(family: str, **changes: Any) -> Any:
    return job_for(family, **{"width": 64, "height": 64, "num_inference_steps": 2, **changes})


@pytest.mark.parametrize(("family", "trainer"), [(family, name) for family in TRAINED for name in TRAINED[family]])
def test_a_trainers_file_is_drawn_as_its_weights_merged_by_hand(
    family: str, trainer: str, pairs: dict[str, Pair]
) -> None:
    """At a positive and a negative weight, within one step of 255; what cannot be used is named."""
    pair, trained = pairs[family], TRAINED[family][trainer]
    tensors, layers = trained.file(pair.merged.pipeline)
    write(pair.folder / "style.safetensors", tensors)
    plain = draw(pair.merged, quick(family)).astype(int)
    effects = []
    for weight in WEIGHTS[family]:
        with merging(pair.merged.pipeline, layers, lambda *_, weight=weight: weight):
            expected = draw(pair.merged, quick(family)).astype(int)
        drawn = draw(pair.ours, quick(family, loras=(("style", weight),))).astype(int)
        assert abs(drawn - expected).max() <= 1
        effects.append(abs(drawn - plain).max())
    assert max(effects) >= 4
    remarks = remarks_of(pair.ours.loras.use((("style", 1.0),)))
    assert len(remarks) == bool(trained.beside)
    assert all(trained.said in remark for remark in remarks)
