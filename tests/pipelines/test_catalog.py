"""The catalogue: which weights a name selects, their defaults, and how strength becomes steps."""

from __future__ import annotations

import pytest

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.catalog import (
    MODELS,
    REAL_MODELS,
    SCHEDULERS,
    Source,
    check_strength,
    choose_models,
    refine_steps_skipped,
    spec_of,
    steps_skipped,
    with_lcm,
    with_quantization,
)
from stable_diffusion_server.pipelines.model_spec import ModelSpec

EVERY = [*MODELS.values(), *(facts for candidates in REAL_MODELS.values() for facts in candidates)]


@pytest.mark.parametrize(
    ("source", "present", "sdxl", "flux"),
    [
        ("embedded", {"ProteusV0.2", "FLUX.1-schnell"}, "embedded-sdxl", "embedded-flux"),
        ("auto", set(), "embedded-sdxl", "embedded-flux"),
        ("auto", {"ProteusV0.2"}, "ProteusV0.2", "embedded-flux"),
        ("auto", {"stable-diffusion-xl-base-1.0"}, "stable-diffusion-xl-base-1.0", "embedded-flux"),
        ("auto", {"ProteusV0.2", "stable-diffusion-xl-base-1.0"}, "ProteusV0.2", "embedded-flux"),
        ("auto", {"FLUX.1-schnell", "something-else"}, "embedded-sdxl", "FLUX.1-schnell"),
        ("local", {"ProteusV0.2"}, "ProteusV0.2", None),
        ("local", {"FLUX.1-schnell", "ProteusV0.2"}, "ProteusV0.2", "FLUX.1-schnell"),
        ("hub", set(), "ProteusV0.2", None),
        ("hub", {"stable-diffusion-xl-base-1.0"}, "stable-diffusion-xl-base-1.0", None),
        ("hub", {"FLUX.1-schnell"}, "ProteusV0.2", "FLUX.1-schnell"),
    ],
)
def test_the_source_and_the_folders_say_which_weights_draw(
    source: Source, present: set[str], sdxl: str | None, flux: str | None
) -> None:
    """MODELS=embedded|auto|local|hub, as a table of folders found and models selected."""
    chosen = choose_models(source, present)
    assert (chosen["sdxl"].folder if "sdxl" in chosen else None) == sdxl
    assert (chosen["flux"].folder if "flux" in chosen else None) == flux


def test_local_models_that_are_not_there_are_reported() -> None:
    """The sentence lists the folders that were searched."""
    with pytest.raises(ModelLoadError, match=r"none of ProteusV0\.2, stable-diffusion-xl-base-1\.0, FLUX\.1-schnell"):
        choose_models("local", {"embedded-sdxl"})


def test_a_name_is_looked_up_among_the_models_at_hand() -> None:
    """With MODELS=local and one family, the other one's name is refused with a list of the available ones."""
    local = choose_models("local", {"ProteusV0.2"})
    assert spec_of("sdxl", local).folder == "ProteusV0.2"
    with pytest.raises(InvalidInput, match="there are sdxl"):
        spec_of("flux", local)


@pytest.mark.parametrize("facts", EVERY, ids=lambda facts: facts.folder)
def test_the_defaults_of_every_model_are_within_its_own_bounds(facts: ModelSpec) -> None:
    """A request without parameters is never refused."""
    assert facts.default_scheduler in facts.schedulers
    bounds = SCHEDULERS[facts.default_scheduler]
    assert bounds.min_steps <= facts.default_steps <= bounds.max_steps
    assert set(facts.schedulers) <= set(SCHEDULERS)
    assert facts.min_side**2 <= facts.native_pixels
    assert facts.min_side % 64 == 0


def test_real_models_have_the_defaults_of_their_authors() -> None:
    """SDXL 7 and 20–30 steps, with LCM 1–2 and 4–8; Flux Schnell 0.0, 4 steps and 256 tokens; 1024² each."""
    for facts in REAL_MODELS["sdxl"]:
        assert facts.default_guidance >= 7
        assert 20 <= facts.default_steps <= 30
        fast = with_lcm(facts)
        assert 1 <= fast.default_guidance <= 2
        assert 4 <= fast.default_steps <= 8
        assert fast.builtin_loras == (("lcm-lora-sdxl", 1.0),)
    (schnell,) = REAL_MODELS["flux"]
    assert (schnell.default_guidance, schnell.default_steps, schnell.text_tokens) == (0.0, 4, 256)
    assert {facts.native_pixels for candidates in REAL_MODELS.values() for facts in candidates} == {1024 * 1024}


def test_revisions_tell_pictures_of_other_weights_apart() -> None:
    """LCM and quantized weights give other images; a model without an LCM LoRA keeps its revision."""
    sdxl = REAL_MODELS["sdxl"][0]
    revisions = {f.revision for f in (sdxl, with_lcm(sdxl), with_quantization(sdxl, "int8"), *REAL_MODELS["sdxl"][1:])}
    assert len(revisions) == 4
    assert with_quantization(sdxl, "none") is with_quantization(sdxl, "auto") is sdxl
    assert with_lcm(MODELS["flux"]) is MODELS["flux"]


@pytest.mark.parametrize(
    ("model", "steps", "strength", "drawn"),
    [("sdxl", 4, 0.6, 2), ("sdxl", 20, 0.55, 11), ("sdxl", 4, 1.0, 4), ("flux", 4, 0.6, 3), ("flux", 4, 0.1, 1)],
)
def test_strength_becomes_steps_as_diffusers_rounds_them(model: str, steps: int, strength: float, drawn: int) -> None:
    """SDXL rounds the number of steps down, Flux up."""
    assert steps - steps_skipped(MODELS[model], steps, strength) == drawn


@pytest.mark.parametrize(("model", "steps", "strength"), [("sdxl", 4, 0.2), ("sdxl", 1, 0.9), ("flux", 4, 0.0)])
def test_a_strength_that_leaves_no_step_names_both_parameters(model: str, steps: int, strength: float) -> None:
    """Increasing either of them helps, so the error names both."""
    with pytest.raises(InvalidInput) as refused:
        check_strength(MODELS[model], steps, strength)
    assert [field for field, _ in refused.value.faults] == ["strength", "num_inference_steps"]


@pytest.mark.parametrize(("model", "steps", "strength"), [("sdxl", 4, 0.2), ("sdxl", 1, 0.0), ("flux", 4, 0.0)])
def test_at_least_one_step_is_drawn(model: str, steps: int, strength: float) -> None:
    """Where the caller wants it so, as AUTOMATIC1111 does, also for strength 0."""
    assert steps - steps_skipped(MODELS[model], steps, strength) == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("steps", "drawn"), [(1, 1), (2, 1), (3, 1), (4, 1), (10, 3), (40, 12)])
def test_refining_draws_at_least_one_step(model: str, steps: int, drawn: int) -> None:
    """About three tenths of the steps, and never none."""
    refined = steps - refine_steps_skipped(MODELS[model], steps)
    assert drawn <= refined <= drawn + 1
