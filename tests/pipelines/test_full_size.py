"""The real models' configurations at full size, without weights, on torch's meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import draw, job_for

from benchmarks.full_size import random_pipeline, skeleton, write_configurations
from scripts.memory_tables import (
    CARDS,
    FAMILIES,
    PAGE,
    README,
    START_FAMILIES,
    WORK,
    cards,
    families,
    page_with,
    placed,
    tables,
)
from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.counted_work import counter_of
from stable_diffusion_server.pipelines.loading.footprint import architecture_of, dtype_of, parameters_of
from stable_diffusion_server.pipelines.loading.measurement import MeasuredModel
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.loading.working_memory import TABLE, Architecture
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


@pytest.fixture(scope="module")
def architectures(skeletons: dict[str, Any]) -> dict[str, Architecture]:
    """Both as they compute on an accelerator."""
    cuda = torch.device("cuda")
    return {facts.name: architecture_of(facts, skeletons[facts.name], dtype_of(facts, cuda)) for facts in (SDXL, FLUX)}


def test_the_pages_hold_the_tables_that_are_computed_now(architectures: dict[str, Architecture]) -> None:
    """docs/models.md and README equal the output of `python -m scripts.memory_tables`."""
    assert PAGE.read_text() == page_with(tables(architectures))
    assert PAGE.read_text() == page_with(families(), start=START_FAMILIES)
    assert README.read_text() == page_with(cards(architectures), README)


@pytest.mark.parametrize(
    ("facts", "gigabytes", "expected"),
    [
        (SDXL, 80, "resident none"),
        (SDXL, 48, "resident none"),
        (SDXL, 40, "resident none"),
        (SDXL, 32, "resident none"),
        (SDXL, 24, "resident none"),
        (SDXL, 16, "resident none"),
        (SDXL, 12, "model none"),
        (SDXL, 10, "model int8"),
        (SDXL, 8, "model int8"),
        (SDXL, 4, "group none"),
        (FLUX, 80, "resident none"),
        (FLUX, 48, "resident none"),
        (FLUX, 40, "model none"),
        (FLUX, 32, "model none"),
        (FLUX, 24, "resident int8"),
        (FLUX, 16, "group none"),
        (FLUX, 12, "group none"),
        (FLUX, 8, "group none"),
    ],
)
def test_real_models_are_placed_by_what_is_counted(
    facts: ModelSpec, gigabytes: int, expected: str, architectures: dict[str, Architecture]
) -> None:
    """With ControlNet, 2048² and as many images at a time as fit: on common cards, without reading a weight."""
    placement = placed(facts, architectures[facts.name], gigabytes)
    assert placement is not None
    assert f"{placement.residency} {placement.quantization}" == expected
    assert placement.needed <= 0.9 * gigabytes * 10**9


@pytest.mark.parametrize("gigabytes", CARDS)
@pytest.mark.parametrize("order", [(SDXL, FLUX), (FLUX, SDXL)], ids=["sdxl first", "flux first"])
def test_both_models_fit_on_a_card_together(
    gigabytes: int, order: tuple[ModelSpec, ModelSpec], architectures: dict[str, Architecture]
) -> None:
    """The second leaves room for the first one's turn: nine tenths of what the first one's weights left."""
    first = placed(order[0], architectures[order[0].name], gigabytes)
    assert first is not None
    second = placed(order[1], architectures[order[1].name], gigabytes, beside=first)
    assert second is not None
    left = gigabytes * 10**9 - (first.needed - first.turn)
    assert second.needed - second.turn + max(first.turn, second.turn) <= 0.9 * left


def test_a_card_of_24_with_32_of_ram_gets_no_flux_that_the_kernel_would_end(
    architectures: dict[str, Architecture],
) -> None:
    """Behind SDXL, Flux would be offloaded in groups, with 35 GB in RAM; the sentence has the numbers."""
    first = placed(SDXL, architectures["sdxl"], 24)
    assert placed(FLUX, architectures["flux"], 24, beside=first, ram=64 * 10**9) is not None
    assert placed(FLUX, architectures["flux"], 24, beside=first, ram=32 * 10**9) is None


@pytest.mark.parametrize(("name", "part"), [("sdxl", "vae"), ("sdxl", "unet"), ("flux", "transformer")])
def test_the_stored_figures_are_counted_again(name: str, part: str, architectures: dict[str, Architecture]) -> None:
    """One size that the table was not made from, on the meta device: equal within a thousandth."""
    model = architectures[name]
    counter = counter_of(part, model.parts[part])
    assert counter is not None
    assert model.key(part) in TABLE.read_text()
    assert model.working_bytes[part].of(768 * 768) == pytest.approx(counter(model, part, 768), rel=1e-3)


@pytest.mark.parametrize(("title", "billions"), [("FLUX.2 klein 4B", 3.88), ("Z-Image-Turbo", 6.15)])
def test_new_families_are_counted_at_full_size(title: str, billions: float) -> None:
    """Parameters as published, both with the 4.02 billion of Qwen3-4B; the stored figures are counted again."""
    spec = FAMILIES[title]
    parts = skeleton(spec.name)
    assert round(parameters_of(parts["transformer"]) / 1e9, 2) == billions
    assert round(parameters_of(parts["text_encoder"]) / 1e9, 2) == 4.02
    model = architecture_of(spec, parts, torch.bfloat16)
    counter = counter_of("transformer", parts["transformer"])
    assert counter is not None
    assert all(model.key(part) in TABLE.read_text() for part in parts)
    counted = counter(model, "transformer", 768)
    assert model.working_bytes["transformer"].of(768 * 768) == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize(
    ("title", "billions"),
    [
        ("SD 1.5", 0.86),
        ("SDXL", 2.57),
        ("FLUX.1 dev, Krea", 11.90),
        ("FLUX.1 Fill", 11.90),
        ("FLUX.1 Kontext", 11.90),
        ("Stable Diffusion 3 medium", 2.03),
        ("Qwen-Image (stock)", 20.43),
        ("Chroma (stock)", 8.90),
        ("PixArt-Σ (stock)", 0.61),
    ],
)
def test_other_families_have_their_published_sizes(title: str, billions: float) -> None:
    """Parameters of the denoiser; its work, the VAE's and that of encoders that can be counted are in the table."""
    spec = FAMILIES[title]
    parts = skeleton(spec.name)
    assert parameters_of(parts[spec.denoiser_part]) / 1e9 == pytest.approx(billions, abs=0.006)
    model = architecture_of(spec, parts, dtype_of(spec, torch.device("cuda")))
    assert all(model.key(part) in TABLE.read_text() for part in parts if not model.working_bytes[part].estimated)


def test_references_count_in_the_memory_of_a_step() -> None:
    """Four of 1024² take four times the patches of one, whatever the size of the picture."""
    klein, parts = FAMILIES["FLUX.2 klein 4B"], skeleton("flux2")
    without, with_four = (
        architecture_of(replace(klein, max_references=count), parts, torch.bfloat16).count("transformer")
        for count in (0, 4)
    )
    assert with_four.per_pixel == pytest.approx(without.per_pixel, rel=1e-3)
    # An image and its input image have 2 patches for every 256 pixels, a reference 1.
    assert with_four.fixed - without.fixed == pytest.approx(without.per_pixel / 2 * 4 * 1024**2, rel=0.02)


def test_the_published_figures_of_sdxl_are_met(architectures: dict[str, Architecture]) -> None:
    """Its fp32 VAE takes 3.2 GB at 1024² and 12.9 GB at 2048²."""
    vae = architectures["sdxl"].working_bytes["vae"]
    assert [round(vae.of(side * side) / 1e9, 1) for side in (1024, 2048)] == [3.2, 12.9]


def test_tiles_follow_from_the_card_and_not_from_what_is_free(architectures: dict[str, Architecture]) -> None:
    """Native images are whole from 8 GB on, larger ones as far as that changes no placement, 2048² from 32 GB on."""
    whole = []
    for card in (4, 8, 16, 24, 32, 80):
        measured = MeasuredModel(SDXL, architectures["sdxl"]).tiled(card * 10**9, WORK, accelerated=True)
        assert measured.tiling.side**2 <= measured.tiling.whole_pixels
        whole.append(measured.tiling.whole_pixels)
    assert whole[0] < 1024**2 <= whole[1]
    assert whole[3] < 2048**2 <= whole[4]


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
