"""The real models' configurations at full size, without weights, on torch's meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import draw, job_for

from benchmarks.full_size import random_pipeline, write_configurations
from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.footprint import dtype_of, footprint_of, parameters_of
from stable_diffusion_server.pipelines.loading.placement import Footprint, Residency, place
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec

pytestmark = pytest.mark.slow

SDXL, FLUX = REAL_MODELS["sdxl"][1], REAL_MODELS["flux"][0]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the two real models' configurations; tokenizers and schedulers are the embedded ones'."""
    folder = tmp_path_factory.mktemp("models")
    for facts in (SDXL, FLUX):
        write_configurations(folder, facts)
    return folder


@pytest.fixture(scope="module")
def skeletons(full_size: Path) -> dict[str, dict[str, torch.nn.Module]]:
    """The components of both, loaded once with our loader."""
    return {facts.name: empty_pipeline(facts, full_size) for facts in (SDXL, FLUX)}


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
    print("".join(f"\n| {name} | {count:,} |" for name, count in counts.items()))  # noqa: T201  # prints the table


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
    facts: ModelSpec, gigabytes: int, expected: str, skeletons: dict[str, Any]
) -> None:
    """Placement on common cards, in half precision, without reading a weight."""
    footprint = footprint_on_gpu(facts, skeletons[facts.name])
    placement = place(gigabytes * 10**9, footprint, accelerated=True)
    assert f"{placement.residency} {placement.quantization}" == expected


def footprint_on_gpu(facts: ModelSpec, parts: dict[str, torch.nn.Module]) -> Footprint:
    dtype = dtype_of(facts, torch.device("cuda"))
    assert dtype in (torch.float16, torch.bfloat16)
    footprint = footprint_of(facts, parts, dtype)
    assert footprint.needed(Residency.RESIDENT) > footprint.needed(Residency.MODEL) > footprint.needed(Residency.GROUP)
    return footprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("facts", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_full_size_models_with_random_weights_run_on_a_gpu(facts: ModelSpec, full_size: Path) -> None:
    """The same code path as for real weights, at their native size.

    The output is noise, finite and of the right size.
    """
    pipeline, _ = random_pipeline(facts, full_size, torch.device("cuda"))
    family = {"sdxl": Sdxl, "flux": Flux}[facts.name](pipeline, facts)
    assert token_counter(pipeline.tokenizer)("a cat") > 2
    side = int(facts.native_pixels**0.5)
    job = replace(job_for(facts.name, width=side, height=side, num_inference_steps=2), revision=facts.revision)
    assert draw(family, job).shape == (side, side, 3)
