"""Files in MODELS_DIR are models of their own names, by every dialect; what cannot be used is named."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from checkpoint_stand_ins import flux_pipeline, sdxl_pipeline, write
from fakes import settings_in, until
from fastapi.testclient import TestClient
from five_models import NAMES, WORDS, write_five_models
from original_names import flux_tensors, unet_tensors

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.model_choice import choose_from_folder
from stable_diffusion_server.errors import ModelLoadError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def five_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five models and three useless files; the specs make small images quick, and nothing else."""
    folder = tmp_path_factory.mktemp("weights")
    write_five_models(folder)
    for file in (*folder.glob("*.safetensors"), folder / "checkpoints" / "noob-v.safetensors"):
        with file.with_suffix(".toml").open("a") as spec:
            spec.write("native_size = 128\n")
    return folder


def test_the_folder_decides_names_aliases_and_reasons(five_models: Path, tmp_path: Path) -> None:
    """Before anything is loaded: each file under its name, the family's name for the first, a reason for each other."""
    models, refused, _ = choose_from_folder(settings_in(tmp_path, models_dir=five_models))
    assert tuple(models)[:5] == NAMES
    assert (models["sdxl"].name, models["flux"].name) == ("my juggernaut", "dev")
    assert models["embedded-sdxl"].folder == "embedded-sdxl"
    assert (models["my juggernaut"].default_steps, models["my juggernaut"].default_guidance) == (2, 3.5)
    assert models["noob-v"].checkpoint.prediction == "v_prediction"  # type: ignore[union-attr]  # it is set
    assert models["noob-v"].revision == "sdxl+v_prediction+zsnr+rescale0.7"
    assert models["dev"].takes_guidance
    assert not models["schnell"].takes_guidance
    assert sorted(refused) == ["half", "old", "sd15"]
    assert "pickle" in refused["old"]
    assert "truncated" in refused["half"]


def test_the_default_of_a_family_is_the_one_of_the_setting(five_models: Path, tmp_path: Path) -> None:
    """TEXT_TO_IMAGE_MODEL takes any name."""
    models, _, _ = choose_from_folder(settings_in(tmp_path, models_dir=five_models, text_to_image_model="paint"))
    assert models["sdxl"].name == "paint"


SPEC = """
steps = 8
guidance = 1.5
guidance_rescale = 0.3
scheduler = "euler_a"
schedule = "karras"
negative_prompt = "blurry"
clip_skip = 3
native_size = 768
dtype = "bfloat16"
quantization = "int8"
placement = "group"
pin = true
"""


def test_the_owners_spec_decides_the_defaults(five_models: Path, tmp_path: Path) -> None:
    """Each key acts, and one that does not is remarked on; SDXL's usual clip skip is 2."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("my juggernaut", "schnell"):
        (folder / f"{name}.safetensors").symlink_to(five_models / f"{name}.safetensors")
        (folder / f"{name}.toml").write_text(SPEC if name != "schnell" else "guidance = 2\nclip_skip = 1\n")
    (folder / "t5-tokenizer").symlink_to(WORDS)
    models, refused, remarks = choose_from_folder(settings_in(tmp_path, models_dir=folder))
    spec = models["my juggernaut"]
    assert (spec.default_steps, spec.default_guidance, spec.default_scheduler) == (8, 1.5, "euler_a")
    assert (spec.guidance_rescale, spec.default_negative_prompt, spec.clip_skip) == (0.3, "blurry", 1)
    assert (spec.native_pixels, spec.dtype, spec.cpu_dtype) == (768 * 768, "bfloat16", "bfloat16")
    assert (spec.quantize, spec.offload, spec.pinned, spec.preload) == ("int8", "group", True, False)
    assert spec.scheduler_options == (("use_karras_sigmas", True),)
    assert spec.revision == "sdxl+rescale0.3+skip1+bfloat16+use_karras_sigmas-True"
    assert not refused
    assert remarks == (
        "The spec of schnell.safetensors has keys without an effect on this model: clip_skip, guidance.",
    )


def test_parts_that_a_spec_names_must_be_there(five_models: Path, tmp_path: Path) -> None:
    """A VAE, a text encoder, a LoRA and a schedule that there is not: the model is refused, with the name."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "a.safetensors").symlink_to(five_models / "my juggernaut.safetensors")
    for line, sentence in (
        ('vae = "sharp"', "names the vae 'sharp', which is not in MODELS_DIR"),
        ('text_encoders = ["long"]', "names the text-encoder 'long'"),
        ('loras = ["detail:0.5"]', "names the lora 'detail'"),
        ('schedule = "warp"', "schedule must be one of automatic, normal, karras"),
        ('scheduler = "warp"', "names the scheduler 'warp'; there are euler"),
    ):
        (folder / "a.toml").write_text(line)
        with pytest.raises(ModelLoadError) as refused:
            choose_from_folder(settings_in(tmp_path, models_dir=folder))
        assert sentence in refused.value.detail


@pytest.mark.parametrize("source", ["auto", "local"])
def test_embedded_models_never_stand_in_for_files_that_cannot_be_used(source: str, tmp_path: Path) -> None:
    """A folder of useless files: not ready, with the reason of each."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    settings = settings_in(tmp_path, models=source, models_dir=tmp_path / "weights")
    with pytest.raises(ModelLoadError) as refused:
        choose_from_folder(settings)
    assert "old.ckpt is pickled" in refused.value.detail


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """A bare UNet without the files that it needs, and a Flux without T5's tokenizer."""
    folder = tmp_path / "weights"
    write(folder / "bare.safetensors", unet_tensors(sdxl_pipeline().unet))
    write(folder / "flux.safetensors", flux_tensors(flux_pipeline(tokenizer=WORDS)))
    with pytest.raises(ModelLoadError) as refused:
        choose_from_folder(settings_in(tmp_path, models_dir=folder))
    assert "bare.safetensors lacks a VAE and the text encoder CLIP-L" in refused.value.detail
    assert "flux.safetensors lacks T5's tokenizer: put tokenizer.json" in refused.value.detail


def test_every_model_draws_by_its_name_and_without_a_network(
    five_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five files and no further setting: each by our own route, two by OpenAI's and AUTOMATIC1111's."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    settings = settings_in(tmp_path, models_dir=five_models)
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        until(lambda: client.get("/readyz").json()["models"], seconds=300)
        ready = client.get("/readyz").json()
        assert ready["status"] == "ready"
        assert {model["name"] for model in ready["models"]} >= {*NAMES}
        assert "old.ckpt is pickled" in str(ready)
        drawn = {}
        size = {"prompt": "a red disc", "width": 128, "height": 128, "num_inference_steps": 1}
        for name in (*NAMES, "sdxl"):
            answer = client.get("/create_and_upload_image", params={**size, "model": name})
            assert answer.status_code == 200, answer.text
            drawn[name] = answer.json()
        assert drawn["sdxl"]["key"] == drawn["my juggernaut"]["key"]
        assert drawn["sdxl"]["model"] == "my juggernaut"
        assert len({answer["key"] for answer in drawn.values()}) == 5
        body = {"model": "schnell", "prompt": "a red disc", "size": "256x256"}
        assert client.post("/v1/images/generations", json=body).status_code == 200
        override = {"sd_model_checkpoint": "noob-v"}
        body = {"prompt": "a red disc", "steps": 1, "width": 128, "height": 128, "override_settings": override}
        assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200
        for name in ("My Juggernaut.safetensors", "checkpoints/noob-v", "embedded-sdxl"):
            answer = client.get("/create_and_upload_image", params={**size, "model": name})
            assert answer.status_code == 200, answer.text
        refused = client.get("/create_and_upload_image", params={**size, "model": "old"})
        assert refused.status_code == 503
