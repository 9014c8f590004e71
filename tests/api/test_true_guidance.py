"""`true_cfg_scale` of OpenAI bodies, as clients of vLLM-Omni and SGLang send it: true guidance, or the only one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import RunningApp

from stable_diffusion_server.api.openai.guidance import guidance_warnings, true_guidance_faults, with_true_guidance
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.pipelines import MODELS, FileIdentity, Kind, ModelSpec
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS
from stable_diffusion_server.types import ExtraValue, GenerationRequest, Task

GENERATIONS = "/v1/images/generations"
TEXT = GenerationRequest(Task.TEXT_TO_IMAGE, "a house", width=64, height=64)


def spec_of(name: str) -> ModelSpec:
    """FLUX.1 dev, Qwen-Image and SDXL."""
    dev = family_row(FileIdentity(Kind.DENOISER, ("flux",), "dev"))
    assert dev is not None
    return {"dev": dev, "qwen": STOCK_ROWS["QwenImagePipeline"], "sdxl": MODELS["sdxl"]}[name]


@pytest.mark.parametrize(
    ("model", "guidance", "taken", "extra", "warned"),
    [
        ("dev", None, None, {"true_cfg_scale": 4.0}, ""),
        ("dev", 3.5, 3.5, {"true_cfg_scale": 4.0}, ""),
        ("qwen", None, 4.0, {}, ""),
        ("qwen", 1.0, 4.0, {}, "guidance_scale: "),
        ("sdxl", None, 4.0, {}, ""),
        ("sdxl", 7.0, 7.0, {}, "true_cfg_scale: "),
        ("sdxl", 4.0, 4.0, {}, ""),
    ],
)
def test_it_is_what_the_model_takes(
    model: str, guidance: float | None, taken: float | None, extra: dict[str, ExtraValue], warned: str
) -> None:
    """Beside dev's guidance; Qwen-Image's guidance; SDXL's unless that is sent too. What has no effect is warned of."""
    request = with_true_guidance(replace(TEXT, guidance_scale=guidance), 4.0, spec_of(model))
    assert (request.guidance_scale, dict(request.extra)) == (taken, extra)
    warnings = guidance_warnings(4.0, guidance, spec_of(model))
    assert [warning.message.startswith(warned) for warning in warnings] == [True] * bool(warned)


def test_without_it_nothing_changes() -> None:
    """Neither the request nor its warnings."""
    assert with_true_guidance(TEXT, None, spec_of("dev")) is TEXT
    assert guidance_warnings(None, 3.0, spec_of("sdxl")) == true_guidance_faults(None, {}, None, RequestLimits()) == []


@pytest.mark.parametrize(("model", "scale", "right"), [("dev", 20, 1), ("dev", 21, 0), ("dev", 0.5, 0), ("sdxl", 0, 1)])
def test_its_range_is_the_models(model: str, scale: float, right: int) -> None:
    """1 to 20 beside dev's guidance, that of guidance elsewhere; another value in `extra` is refused by name."""
    faults = true_guidance_faults(scale, {"true_cfg_scale": scale}, spec_of(model), RequestLimits())
    assert [name for name, _ in faults] == ["true_cfg_scale"] * (not right)
    (differs,) = true_guidance_faults(scale, {"true_cfg_scale": 3}, spec_of(model), RequestLimits())
    assert "differ" in differs[1]


@pytest.mark.parametrize("value", [True, "5", "x", float("1e999"), -1, 1e6, [1], {}])
def test_what_is_no_number_in_range_is_refused_by_name(running_app: RunningApp, value: Any) -> None:
    """400, naming the parameter that was sent."""
    body = {"prompt": "a red square", "model": "sdxl", "true_cfg_scale": value if value != float("1e999") else "1e999"}
    answer = running_app.client.post(GENERATIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "true_cfg_scale"), answer.text


def test_both_guidances_are_taken_and_the_unused_one_named(running_app: RunningApp) -> None:
    """Bodies of vLLM-Omni's clients have both: SDXL draws with guidance_scale, and says so."""
    body = {"prompt": "a red square", "model": "sdxl", "size": "64x64", "guidance_scale": 3.0, "true_cfg_scale": 5.0}
    answer = running_app.client.post(GENERATIONS, json=body)
    assert answer.status_code == 200, answer.text
    (job,) = running_app.squares.finished
    assert (job.guidance_scale, job.extra) == (3.0, ())
    (warning,) = [one for one in answer.json()["warnings"] if one["code"] == "not-honoured"]
    assert warning["message"].startswith("true_cfg_scale:")
