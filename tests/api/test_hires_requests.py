"""Second passes at our routes and in AUTOMATIC1111's dialect: parameters, refusals, infotext, cancelling, batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of, lora_file, until

from stable_diffusion_server.imaging import LATENT_UPSCALERS, read_record
from stable_diffusion_server.types import LatentResize, Task

CREATE, CHANGE = "/create_and_upload_image", "/style_transfer_bytes_and_upload_image"
REPAINT = "/inpaint_and_upload_image"
TXT2IMG = "/sdapi/v1/txt2img"
SMALL = {"prompt": "a red square", "width": 64, "height": 64, "num_inference_steps": 4, "seed": 5}
OWN = {
    "hires_upscaler": "latent-bicubic",
    "hires_scheduler": "ddim",
    "hires_schedule": "trailing",
    "hires_guidance": 3.5,
    "hires_prompt": "a blue square",
    "hires_negative_prompt": "fog",
    "hires_steps": 6,
    "hires_strength": 0.5,
}
pytestmark = pytest.mark.slow


@pytest.fixture
def running(run_app: Callable[..., RunningApp]) -> RunningApp:
    """An app whose fake denoiser takes input images."""
    return run_app(FakeImageDenoiser(), max_batch=4)


def made(running: RunningApp, **parameters: Any) -> dict[str, Any]:
    answer = running.client.post(CREATE, json={**SMALL, **parameters})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def record_of(running: RunningApp, body: dict[str, Any]) -> dict[str, Any]:
    return dict(read_record(running.client.get(body["path"]).content) or {})


def asked(running: RunningApp, **parameters: Any) -> dict[str, Any]:
    sent = {"prompt": "a red square", "width": 64, "height": 64, "steps": 4, "seed": 5, "enable_hr": True, **parameters}
    answer = running.client.post(TXT2IMG, json=sent)
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = json.loads(answer.json()["info"])
    return info


def test_a_second_pass_has_everything_of_its_own(running: RunningApp) -> None:
    """One picture with one record of both passes; an equal request finds it, another one does not."""
    body = made(running, hires_scale=2, **OWN)
    first, second = running.squares.finished
    assert (body["width"], body["height"], second.width) == (128, 128, 128)
    assert (first.keeps_latents, first.scheduler, first.prompt) == (True, "euler", "a red square")
    assert second.latents is not None
    assert (second.task, second.latents.resize) == (Task.IMAGE_TO_IMAGE, LatentResize.BICUBIC)
    assert (second.scheduler, second.sampling, second.guidance_scale) == ("ddim", (("schedule", "trailing"),), 3.5)
    assert (second.prompt, second.negative_prompt, second.num_inference_steps) == ("a blue square", "fog", 6)
    record = record_of(running, body)
    assert record["hires"] == {
        "from": [64, 64],
        "to": [128, 128],
        "steps": 6,
        "strength": 0.5,
        "upscaler": "latent-bicubic",
        "scheduler": "ddim",
        "schedule": "trailing",
        "guidance_scale": 3.5,
        "prompt": "a blue square",
        "negative_prompt": "fog",
    }
    assert "keeps_latents" not in record
    assert made(running, hires_scale=2, **OWN)["cached"]
    assert made(running, hires_scale=2, **{**OWN, "hires_guidance": 4})["key"] != body["key"]


def test_an_upscaler_file_enlarges_between_the_passes(running: RunningApp) -> None:
    """The embedded network, to the size that is asked for; its time is told."""
    body = made(running, hires_width=160, hires_height=128, hires_upscaler="embedded-2x")
    _, second = running.squares.finished
    assert second.image is not None
    assert (body["width"], body["height"]) == (160, 128)
    assert body["timings"]["enlarge"] > 0
    assert record_of(running, body)["hires"]["upscaler"] == "embedded-2x"


def test_an_input_image_gets_a_second_pass_by_its_size(running: RunningApp) -> None:
    """1.5 times the image, which is known only when it is decoded; too large a result is refused by name."""
    files = {"image_file": file_of(disc(96, 80))}
    data = {"prompt": "a red square", "hires_scale": "1.5", "hires_upscaler": "latent", "canny": "false"}
    answer = running.client.post(CHANGE, files=files, data=data)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["width"], answer.json()["height"]) == (144, 120)
    large = running.client.post(CHANGE, files={"image_file": file_of(disc(1500, 64))}, data=data)
    assert (large.status_code, large.json()["field"]) == (422, "hires_scale")
    assert "2250" in large.json()["detail"]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"hires_upscaler": "latent"}, {"hires_upscaler"}),
        ({"hires_scale": 2, "hires_upscaler": "R-ESRGAN 4x+"}, {"hires_upscaler"}),
        ({"hires_scale": 2, "hires_upscaler": "../../embedded-2x"}, {"hires_upscaler"}),
        (
            {"hires_scale": 2, "hires_upscaler": "a" * 300, "hires_prompt": "a" * 40_000},
            {"hires_upscaler", "hires_prompt"},
        ),
        ({"hires_scale": True}, {"hires_scale"}),
        ({"hires_scale": "2"}, {"hires_scale"}),
        ({"hires_scale": 1e400}, {"hires_scale"}),
        ({"hires_scale": 16, "width": 256}, {"hires_scale"}),
        ({"hires_width": 128}, {"hires_height"}),
        ({"hires_width": 63, "hires_height": 2049}, {"hires_width", "hires_height"}),
        ({"hires_scale": 2, "hires_steps": 999, "hires_guidance": -1}, {"hires_steps", "hires_guidance"}),
        ({"hires_scale": 2, "hires_scheduler": "none"}, {"hires_scheduler"}),
    ],
)
def test_what_is_wrong_is_named(running: RunningApp, change: dict[str, Any], fields: set[str]) -> None:
    """Every parameter at fault, before anything is drawn, also in a job."""
    body = json.dumps({**SMALL, **change}).replace("Infinity", "1e400")
    for headers in ({}, {"prefer": "respond-async"}):
        headers |= {"content-type": "application/json"}
        answer = running.client.post(CREATE, content=body, headers=headers)
        assert answer.status_code in (400, 422), answer.text
        if answer.status_code == 422:
            assert {error["field"] for error in answer.json()["errors"]} == fields
    assert not running.squares.prepared


def test_a_mask_and_a_second_pass_exclude_each_other(running: RunningApp) -> None:
    """A second pass would change what the mask keeps."""
    files = {"image_file": file_of(disc(64, 64)), "mask_file": file_of(disc(64, 64, "white", "black"))}
    answer = running.client.post(REPAINT, files=files, data={"prompt": "a red square", "hires_scale": "2"})
    assert (answer.status_code, answer.json()["field"]) == (422, "hires_scale")


def test_openai_clients_send_them_in_the_body(running: RunningApp) -> None:
    """As `extra_body` of the client."""
    sent = {"prompt": "a red square", "size": "64x64", "hires_scale": 2, "hires_upscaler": "latent"}
    answer = running.client.post("/v1/images/generations", json=sent)
    assert answer.status_code == 200, answer.text
    assert [job.latents is not None for job in running.squares.finished] == [False, True]


def test_automatic1111_names_every_way_to_enlarge_latents(running: RunningApp) -> None:
    """Six modes by its names, and each is taken."""
    modes = [mode["name"] for mode in running.client.get("/sdapi/v1/latent-upscale-modes").json()]
    assert modes == [*LATENT_UPSCALERS.values()]
    assert [*LATENT_UPSCALERS] == [*LatentResize]
    for number, mode in enumerate(modes):
        info = asked(running, hr_upscaler=mode, seed=number)
        assert info["not_honoured"] == []
        assert f"Hires upscaler: {mode}" in info["infotexts"][0]
        latents = running.squares.finished[-1].latents
        assert latents is not None
        assert LATENT_UPSCALERS[latents.resize] == mode


def test_hires_fix_has_its_sampler_prompt_and_loras(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """As `hr_` parameters, with styles around its prompt and the LoRAs of its own tags; the infotext repeats them."""
    folder, styles = tmp_path / "loras", tmp_path / "styles.csv"
    folder.mkdir()
    for name in ("ink", "pastel"):
        lora_file(folder / f"{name}.safetensors", name.encode())
    styles.write_text("name,prompt,negative_prompt\nold,{prompt} on paper,modern\n")
    running = run_app(FakeImageDenoiser(), lora_dir=folder, styles_file=styles)
    info = asked(
        running,
        prompt="a red square <lora:ink:0.5>",
        hr_prompt="a blue square, sharp <lora:pastel:0.7>",
        hr_negative_prompt="fog",
        hr_sampler_name="DPM++ 2M",
        hr_scheduler="Karras",
        hr_cfg=4,
        hr_upscaler="Latent (nearest-exact)",
        hr_second_pass_steps=6,
        styles=["old"],
    )
    first, second = running.squares.finished
    assert info["not_honoured"] == []
    assert (first.prompt, first.loras) == ("a red square on paper", (("ink", 0.5),))
    assert (second.prompt, second.loras) == ("a blue square, sharp on paper", (("pastel", 0.7),))
    assert (second.negative_prompt, second.guidance_scale) == ("fog, modern", 4.0)
    assert (second.scheduler, second.sampling) == ("dpm_2m", (("schedule", "karras"),))
    assert len(second.lora_digests) == 1
    text = info["infotexts"][0]
    for part in (
        "Hires sampler: DPM++ 2M",
        "Hires schedule type: Karras",
        "Hires CFG Scale: 4",
        'Hires prompt: "a blue square, sharp on paper <lora:pastel:0.7>"',
        'Hires negative prompt: "fog, modern"',
        "Hires upscaler: Latent (nearest-exact)",
    ):
        assert part in text
    again = json.loads(running.client.post(TXT2IMG, json={"infotext": text}).json()["info"])
    assert (again["keys"], again["cached"]) == (info["keys"], [True])


def test_what_clients_send_always_changes_nothing(running: RunningApp) -> None:
    """Equal prompts, `Use same sampler`, Forge's cfg of 1: the key is that of a plain second pass."""
    plain = asked(running)
    usual = {"hr_prompt": "a red square", "hr_negative_prompt": "", "hr_sampler_name": "Use same sampler", "hr_cfg": 1}
    usual |= {"hr_scheduler": "Use same scheduler", "hr_checkpoint_name": "Use same checkpoint", "hr_upscaler": "None"}
    full = asked(running, **usual)
    assert (full["keys"], full["not_honoured"]) == (plain["keys"], [])
    weaker = asked(running, hr_force=True, hr_denoising_strength=0.3)
    assert running.squares.finished[-1].strength == 0.3
    assert weaker["not_honoured"] == []


@pytest.mark.parametrize("passes", [1, 2])
def test_a_job_is_cancelled_in_either_pass(run_app: Callable[..., RunningApp], passes: int) -> None:
    """Nothing is stored, and the next request is drawn."""
    running = run_app(FakeImageDenoiser(seconds_per_step=0.02), max_batch=4)
    sent = {**SMALL, "num_inference_steps": 30, "hires_scale": 2, "hires_upscaler": "latent"}
    job = running.client.post(CREATE, json=sent, headers={"prefer": "respond-async"}).json()
    until(lambda: len(running.squares.prepared) == passes)
    assert running.client.delete(f"/jobs/{job['id']}").json()["state"] == "cancelled"
    assert made(running, prompt="a blue square")["stored"]
    prompts = [job.prompt for job in running.squares.finished]
    assert prompts == ["a red square"] * (passes - 1) + ["a blue square"]
