"""AUTOMATIC1111's samplers and schedules: names of three programs, and each option applied, inert or rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser

from stable_diffusion_server.api.automatic1111.sampler_names import SAMPLERS, sampler_for
from stable_diffusion_server.imaging import SAMPLER_NAMES
from stable_diffusion_server.pipelines import MODELS, SCHEDULERS

SDXL, FLUX = MODELS["sdxl"], MODELS["flux"]
# Sampler and schedule as sent → scheduler, schedule, whether something is said; of AUTOMATIC1111, ComfyUI, InvokeAI.
NAMES = [
    ("Euler", "", "euler", "", False),
    ("Euler", "Automatic", "euler", "", False),
    ("Euler", "Normal", "euler", "normal", False),
    ("Euler a", "SGM Uniform", "euler_a", "trailing", False),
    ("DPM++ 2M", "", "dpm_2m", "karras", False),
    ("DPM++ 2M", "Automatic", "dpm_2m", "karras", False),
    ("DPM++ 2M", "Exponential", "dpm_2m", "exponential", False),
    ("DPM++ 2M Karras", "", "dpm_2m", "karras", False),
    ("DPM++ 2M SDE", "", "dpm", "", False),
    ("DPM++ 2M SDE Karras", "", "dpm", "karras", False),
    ("DPM++ 3M SDE Exponential", "", "dpm_3m_sde", "exponential", False),
    ("DPM++ SDE", "Beta", "dpm_sde", "beta", False),
    ("DPM++ 2S a Karras", "", "dpm_2s_a", "karras", False),
    ("DPM2 a", "Uniform", "kdpm2_a", "normal", False),
    ("Heun", "Align Your Steps", "heun", "ays", False),
    ("LMS Karras", "", "lms", "karras", False),
    ("PLMS", "", "pndm", "", False),
    ("DDIM", "Karras", "ddim", "", True),
    ("Euler", "KL Optimal", "euler", "exponential", True),
    ("Restart", "", "dpm_2s_a", "", True),
    ("dpmpp_2m_sde", "karras", "dpm", "karras", False),
    ("dpmpp_sde_gpu", "simple", "dpm_sde", "trailing", False),
    ("euler_ancestral", "normal", "euler_a", "normal", False),
    ("uni_pc", "ddim_uniform", "unipc", "ddim_uniform", False),
    ("dpm_2_ancestral", "exponential", "kdpm2_a", "exponential", False),
    ("er_sde", "beta", "er_sde", "beta", False),
    ("res_multistep", "normal", "dpm_2m", "normal", True),
    ("dpmpp_2m_k", "", "dpm_2m", "karras", False),
    ("heun_k", "", "heun", "karras", False),
    ("kdpm_2_a", "", "kdpm2_a", "karras", False),
    ("deis", "", "deis", "", False),
    ("lcm", "", "lcm", "", False),
    ("k_euler_a", "", "euler_a", "", False),
    ("k_dpmpp_2m_sde", "", "dpm", "", False),
    ("", "karras", None, "karras", False),
    ("euler_a", "karras", "euler_a", "karras", False),
]
# Options with a value that is no default, and the samplers that apply it.
OPTIONS: dict[str, tuple[object, set[str]]] = {
    "eta": (0.5, {name for name, row in SCHEDULERS.items() if "eta" in row.takes}),
    "s_churn": (3, {"euler"}),
    "s_noise": (0.5, {name for name, row in SCHEDULERS.items() if "s_noise" in row.takes} - {"euler"}),
    "guidance_rescale": (0.4, set(SDXL.schedulers)),
    "zero_snr": (True, {name for name in SDXL.schedulers if SCHEDULERS[name].start_pure}),
    "scheduler": ("Beta", {name for name, row in SCHEDULERS.items() if "beta" in row.schedules}),
}


@pytest.fixture
def running(run_app: Callable[..., RunningApp]) -> RunningApp:
    """An app whose fake denoiser records its requests."""
    return run_app(FakeImageDenoiser())


def asked(running: RunningApp, **parameters: Any) -> dict[str, Any]:
    """The `info` of an image."""
    sent = {"prompt": "a red square", "width": 64, "height": 64, "seed": 7, **parameters}
    answer = running.client.post("/sdapi/v1/txt2img", json=sent)
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.json()["info"])
    return info


@pytest.mark.parametrize(("sampler", "schedule", "ours", "spaced", "reported"), NAMES)
def test_names_mean_a_sampler_and_a_schedule(
    sampler: str, schedule: str, ours: str | None, spaced: str, reported: bool
) -> None:
    """What is not drawn by its own sampler and schedule is said."""
    chosen = sampler_for(sampler, schedule, SDXL)
    assert (chosen.scheduler, chosen.schedule, bool(chosen.ignored)) == (ours, spaced, reported)


def test_a_flow_has_two_samplers_and_its_own_spacing() -> None:
    """Names that clients send to every model are nothing to report; other samplers are."""
    assert sampler_for("Euler", "Simple", FLUX).ignored == []
    assert sampler_for("Heun", "Normal", FLUX).scheduler == "flow_heun"
    assert sampler_for("Euler", "Beta", FLUX).schedule == "beta"
    assert sampler_for("DPM++ 2M Karras", "", FLUX).ignored == ["DPM++ 2M Karras is drawn by flow_euler."]


def test_every_scheduler_has_a_name_that_leads_back_to_it() -> None:
    """`info` names what was drawn, so that the same can be asked for again."""
    for name in SCHEDULERS:
        if name == "own":
            continue
        assert name in SAMPLERS[SAMPLER_NAMES[name]]
        model = FLUX if name.startswith("flow_") else SDXL
        assert sampler_for(SAMPLER_NAMES[name], "automatic", model).scheduler == name


def test_each_option_is_applied_or_rejected_by_name(running: RunningApp) -> None:
    """As SD.Next's sampler check classes them: none is dropped in silence, and a default changes nothing."""
    listed = [item["name"] for item in running.client.get("/sdapi/v1/samplers").json()]
    assert len(listed) >= 20
    for sampler in listed:
        plain = asked(running, sampler_name=sampler, scheduler="automatic")
        scheduler = running.squares.finished[-1].scheduler
        assert plain["not_honoured"] == []
        assert plain["sampler_name"] == sampler
        if scheduler.startswith("flow_"):
            continue
        for option, (value, takers) in OPTIONS.items():
            info = asked(running, **{"sampler_name": sampler, option: value})
            applied, said = info["keys"] != plain["keys"], " ".join(info["not_honoured"])
            ours = "schedule" if option == "scheduler" else option
            assert applied == (scheduler in takers), (sampler, option)
            assert (f"{option}: " in said) == (not applied), (sampler, option, said)
            assert (ours in dict(running.squares.finished[-1].sampling)) or not applied


def test_every_listed_schedule_is_applied(running: RunningApp) -> None:
    """Each gives another key than the sampler's own, and is in the infotext by AUTOMATIC1111's name."""
    names = [item["label"] for item in running.client.get("/sdapi/v1/schedulers").json()]
    keys = set()
    for name in names:
        info = asked(running, sampler_name="Euler", scheduler=name)
        assert info["not_honoured"] == []
        assert (f"Schedule type: {name}" in info["infotexts"][0]) == (name != "Automatic")
        keys.add(info["keys"][0])
    assert len(keys) == len(names) == 8


def test_an_infotext_with_options_is_the_same_request_again(running: RunningApp) -> None:
    """Schedule and options are read back from AUTOMATIC1111's text."""
    first = asked(running, sampler_name="Euler a", scheduler="Karras", eta=0.5, s_noise=0.9)
    again = running.client.post("/sdapi/v1/txt2img", json={"infotext": first["infotexts"][0]}).json()
    assert json.loads(again["info"])["keys"] == first["keys"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("eta", 7), ("eta", "much"), ("eta", "nan"), ("eta", {"a": 1}), ("s_noise", "1e999"), ("zero_snr", "maybe")],
)
def test_a_wrong_value_is_said_and_left_out(running: RunningApp, option: str, value: object) -> None:
    """Never 422: a client cannot leave out what it always sends."""
    info = asked(running, sampler_name="Euler a", **{option: value})
    assert f"{option}: " in " ".join(info["not_honoured"])
    assert running.squares.finished[-1].sampling == ()


@pytest.mark.parametrize("name", ["karras " * 60_000, "[" * 400_000, "a_k" * 100_000, " karras" * 50_000])
def test_a_long_name_takes_linear_time(name: str) -> None:
    """Any text is a name; it falls back to the default."""
    assert sampler_for(name, name, SDXL).schedule == ""


def test_a_receipt_has_a_large_seed_as_text(running: RunningApp) -> None:
    """Above 2⁵³ only, for readers that hold numbers as floats; also when the image is found stored."""
    sent = {"prompt": "a red square", "width": 64, "height": 64, "seed": 2**63 + 1}
    for cached in (False, True):
        receipt = running.client.get("/create_and_upload_image", params={**sent, "save_path": "large.webp"}).json()
        assert (receipt["cached"], receipt["seed"], receipt["seed_text"]) == (cached, 2**63 + 1, str(2**63 + 1))
    small = running.client.get("/create_and_upload_image", params={**sent, "seed": 7, "save_path": "small.webp"}).json()
    assert "seed_text" not in small


@pytest.mark.parametrize(
    ("source", "option"), [("NV", "gpu"), ("GPU", "gpu"), ("CPU", None), ("moon", None), (7, None)]
)
def test_the_random_source_is_a_setting(running: RunningApp, source: object, option: str | None) -> None:
    """Of AUTOMATIC1111's two sources of a card's noise; all else is the CPU's."""
    info = asked(running, override_settings={"randn_source": source})
    assert dict(running.squares.finished[-1].sampling).get("noise_source") == option
    assert info["not_honoured"] == []


@pytest.mark.parametrize(("value", "status"), [("gpu", 200), ("cpu", 200), ("GPU", 422), ("", 422), ("moon", 422)])
def test_the_source_of_noise_is_a_parameter(running: RunningApp, value: str, status: int) -> None:
    """It is part of the key unless it is the default."""
    plain = {"prompt": "a red square", "width": 64, "height": 64, "seed": 7}
    sent = running.client.get("/create_and_upload_image", params={**plain, "noise_source": value})
    assert sent.status_code == status, sent.text
    if status == 200:
        other = running.client.get("/create_and_upload_image", params=plain).json()
        assert (sent.json()["key"] == other["key"]) == (value == "cpu")
