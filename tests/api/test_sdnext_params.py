"""SD.Next's parameters of a scheduler: each is applied, without effect and told, or refused, as its client asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser

STRICT, LOOSE = {"schedulers_fallback": False}, {"schedulers_fallback": True}
# What SD.Next's own sampler check sends with each request.
BASELINE = {
    "schedulers_sigma": "default",
    "schedulers_prediction_type": "default",
    "schedulers_timestep_spacing": "default",
    "schedulers_beta_schedule": "default",
    "schedulers_solver_order": 0,
    "schedulers_shift": 3,
    "schedulers_dynamic_shift": False,
    "schedulers_base_shift": 0.5,
    "schedulers_max_shift": 1.15,
    "schedulers_use_loworder": True,
    "schedulers_use_thresholding": False,
    "schedulers_rescale_betas": False,
    "schedulers_beta_start": 0,
    "schedulers_beta_end": 0,
    "schedulers_timesteps_range": 1000,
    "schedulers_timesteps": "",
    "uni_pc_variant": "bh2",
}
# Model, sampler, parameter and value → the option that it is here.
APPLIED = [
    ("sdxl", "Euler", {"schedulers_sigma": "karras"}, ("schedule", "karras")),
    ("sdxl", "Euler", {"schedulers_sigma": "betas"}, ("schedule", "beta")),
    ("sdxl", "DPM++ 2M", {"schedulers_sigma": "exponential"}, ("schedule", "exponential")),
    ("sdxl", "Euler", {"schedulers_timestep_spacing": "leading"}, ("schedule", "ddim_uniform")),
    ("sdxl", "DDIM", {"schedulers_timestep_spacing": "trailing"}, ("schedule", "trailing")),
    ("sdxl", "DPM++ 2M", {"schedulers_solver_order": 3}, ("solver_order", 3)),
    ("sdxl", "UniPC", {"schedulers_solver_order": "1"}, ("solver_order", 1)),
    ("sdxl", "Euler", {"schedulers_rescale_betas": True}, ("zero_snr", True)),
    ("flux", "Euler", {"schedulers_shift": 6}, ("shift", 6)),
    ("flux", "Heun", {"schedulers_shift": 1.5}, ("shift", 1.5)),
    ("flux", "Euler", {"schedulers_sigma": "betas"}, ("schedule", "beta")),
]
REFUSED = [
    ("sdxl", "Euler", {"schedulers_sigma": "lambdas"}),
    ("sdxl", "Euler", {"schedulers_sigma": ["karras"]}),
    ("sdxl", "DDIM", {"schedulers_sigma": "karras"}),
    ("sdxl", "Euler", {"schedulers_prediction_type": "sample"}),
    ("sdxl", "Euler", {"schedulers_prediction_type": "flow_prediction"}),
    ("flux", "Euler", {"schedulers_prediction_type": "epsilon"}),
    ("sdxl", "Euler", {"schedulers_beta_schedule": "sigmoid"}),
    ("sdxl", "Euler", {"schedulers_solver_order": 2}),
    ("sdxl", "DPM++ 2M", {"schedulers_solver_order": 4}),
    ("sdxl", "DPM++ 2M", {"schedulers_solver_order": 2.5}),
    ("sdxl", "DPM++ 2M", {"schedulers_solver_order": "many"}),
    ("sdxl", "Euler", {"schedulers_shift": 6}),
    ("flux", "Euler", {"schedulers_shift": 101}),
    ("flux", "Euler", {"schedulers_shift": -1}),
    ("flux", "DPM++ 2M", {}),
    ("sdxl", "Heun", {"schedulers_rescale_betas": True}),
    ("sdxl", "Euler", {"schedulers_use_loworder": False}),
    ("sdxl", "Euler", {"schedulers_timesteps": "999,500,1"}),
    ("sdxl", "Euler", {"schedulers_unheard_of": 1}),
    ("sdxl", "UniPC", {"uni_pc_variant": "bh1"}),
    ("sdxl", "DPM adaptive", {}),
]


@pytest.fixture
def running(run_app: Callable[..., RunningApp]) -> RunningApp:
    """An app whose fake denoiser records its requests."""
    return run_app(FakeImageDenoiser())


def send(running: RunningApp, model: str = "sdxl", settings: dict[str, Any] | None = None, **parameters: Any) -> Any:
    """The answer to a request with SD.Next's usual values."""
    sent = {"prompt": "a red square", "width": 64, "height": 64, "seed": 7, **BASELINE, **parameters}
    override = {"sd_model_checkpoint": model, **(settings or {})}
    return running.client.post("/sdapi/v1/txt2img", json={**sent, "override_settings": override})


def info_of(answer: Any) -> dict[str, Any]:
    """The `info` of an image."""
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.json()["info"])
    return info


@pytest.mark.parametrize("settings", [STRICT, LOOSE, {}])
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_usual_values_say_nothing(running: RunningApp, model: str, settings: dict[str, Any]) -> None:
    """But that a flow has the shift which is sent: SD.Next's clients send 3."""
    assert info_of(send(running, model, settings, sampler_name="Euler"))["not_honoured"] == []
    assert running.squares.finished[-1].sampling == ((("shift", 3),) if model == "flux" else ())


@pytest.mark.parametrize("settings", [STRICT, LOOSE, {}])
@pytest.mark.parametrize(("model", "sampler", "changed", "option"), APPLIED)
def test_what_has_an_equal_is_applied(
    running: RunningApp, model: str, sampler: str, changed: Any, option: Any, settings: dict[str, Any]
) -> None:
    """In every mode, and nothing is said."""
    assert info_of(send(running, model, settings, sampler_name=sampler, **changed))["not_honoured"] == []
    assert option in running.squares.finished[-1].sampling


@pytest.mark.parametrize(("model", "sampler", "changed"), REFUSED)
def test_what_has_none_is_refused_or_told(running: RunningApp, model: str, sampler: str, changed: Any) -> None:
    """Refused by name where the client asks for that, else drawn without it and told."""
    field = next(iter(changed), "sampler_name")
    answer = send(running, model, STRICT, sampler_name=sampler, **changed)
    assert answer.status_code == 422, answer.text
    assert field in answer.text or "sampler_name" in answer.text
    assert not running.squares.finished
    for settings in (LOOSE, {}):
        told = " ".join(info_of(send(running, model, settings, sampler_name=sampler, **changed))["not_honoured"])
        assert (field in told) or "Karras" in told or "drawn by" in told, told


@pytest.mark.parametrize(
    ("settings", "status"), [(STRICT, 422), (LOOSE, 422), ({}, 200), ({"schedulers_fallback": "no"}, 200)]
)
def test_an_unknown_sampler(running: RunningApp, settings: dict[str, Any], status: int) -> None:
    """SD.Next refuses it whether or not it may fall back; AUTOMATIC1111's clients get the closest."""
    assert send(running, settings=settings, sampler_name="__no_such_sampler__").status_code == status


@pytest.mark.parametrize("name", ["Default", "default", "", None, "Automatic"])
def test_the_models_own_sampler_has_names(running: RunningApp, name: str | None) -> None:
    """They are no unknown samplers."""
    assert send(running, settings=STRICT, sampler_name=name).status_code == 200


def test_the_size_decides_where_the_client_asks_for_that(running: RunningApp) -> None:
    """`schedulers_dynamic_shift` leaves a flow its own shift."""
    assert info_of(send(running, "flux", STRICT, sampler_name="Euler", schedulers_dynamic_shift=True))
    assert running.squares.finished[-1].sampling == ()


def test_many_unknown_parameters_make_a_short_answer(running: RunningApp) -> None:
    """20 are named; the values are not repeated whole."""
    answer = send(running, settings=STRICT, **{f"schedulers_{number}": "x" * 4000 for number in range(70)})
    assert answer.status_code == 422, answer.text
    assert len(answer.content) < 10_000
    wide = [["karras"] * 40, {"a": 1}]
    assert send(running, settings=STRICT, schedulers_sigma=wide, schedulers_solver_order=wide).status_code == 422
