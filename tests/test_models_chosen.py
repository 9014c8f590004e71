"""Which weights the settings select, and what users see of them: selected, replaced, missing, reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, RunningApp
from fakes import FakeDenoiser, lora_file, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.settings import Settings, SettingsError

pytestmark = pytest.mark.slow

Making = Callable[..., RunningApp]


@pytest.mark.parametrize(
    ("models", "present", "folders"),
    [
        ("auto", [], {"sdxl": "embedded-sdxl", "flux": "embedded-flux"}),
        (
            "auto",
            ["ProteusV0.2"],
            {"sdxl": "ProteusV0.2", **{name: name for name in ("embedded-sdxl", "embedded-flux")}},
        ),
        ("embedded", ["ProteusV0.2"], {"sdxl": "embedded-sdxl", "flux": "embedded-flux"}),
        ("local", ["stable-diffusion-xl-base-1.0"], {"sdxl": "stable-diffusion-xl-base-1.0"}),
        ("hub", [], {"sdxl": "ProteusV0.2"}),
        ("hub", ["FLUX.1-schnell"], {"sdxl": "ProteusV0.2", "flux": "FLUX.1-schnell"}),
    ],
)
def test_the_models_folder_and_the_setting_decide(
    models: str, present: list[str], folders: dict[str, str], tmp_path: Path
) -> None:
    """MODELS × content of MODELS_DIR, before anything is loaded."""
    for folder in present:
        (tmp_path / "weights" / folder).mkdir(parents=True)
    loaded = ModelState.of(settings_in(tmp_path, models=models, models_dir=tmp_path / "weights"))
    assert {name: facts.folder for name, facts in loaded.facts.items()} == folders
    assert loaded.fault is None


def test_the_lcm_lora_and_finer_weights_are_other_models(tmp_path: Path) -> None:
    """LOAD_LCM_LORA and QUANTIZE change the revision, so images of one are never returned for the other."""
    (tmp_path / "weights" / "ProteusV0.2").mkdir(parents=True)
    settings = settings_in(tmp_path, models_dir=tmp_path / "weights", load_lcm_lora=True, quantize="int8")
    facts = ModelState.of(settings).facts
    assert facts["sdxl"].revision == "proteus-0.2+lcm+int8-unread"  # until the digest of its files replaces it
    assert facts["sdxl"].default_scheduler == "lcm"
    assert facts["embedded-flux"].revision.endswith("+int8")


def test_without_any_weights_the_server_says_so_and_answers_what_is_stored(tmp_path: Path) -> None:
    """MODELS=local and an empty folder: one sentence in /readyz, 503 for generations, and a live process."""
    (tmp_path / "empty").mkdir()
    settings = settings_in(tmp_path, models="local", models_dir=tmp_path / "empty")
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        until(lambda: "MODELS=local" in client.get("/readyz").text)
        answer = client.get("/create_and_upload_image", params={"prompt": "a red disc"})
        assert (answer.status_code, client.get("/healthz").status_code) == (503, 200)
        assert "MODELS=local" in answer.json()["detail"]
        assert client.get("/readyz").json()["models"] == []


BASE = "stable-diffusion-xl-base-1.0"


def drawn(settings: Settings, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small image from a separate server, started and stopped: its result, and `/readyz` at that time."""
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 5)) as client:
        until(lambda: client.get("/readyz").json()["models"], seconds=200)
        answer = client.get(
            "/create_and_upload_image",
            params={"prompt": "a red disc", "width": 64, "height": 64, "num_inference_steps": 1, **parameters},
        )
        return answer.json(), client.get("/readyz").json()


@pytest.mark.fault(167)
def test_other_weights_under_the_same_name_are_other_pictures(tmp_path: Path) -> None:
    """After a restart, stored images are found with the same weights only; the record names the weights."""
    folder = Path(shutil.copytree(ROOT / "models" / "embedded-sdxl", tmp_path / "weights" / BASE))
    settings = settings_in(tmp_path, models="local", models_dir=tmp_path / "weights", min_side=64)
    first, before = drawn(settings)
    again, _ = drawn(settings)
    assert (first["cached"], again["cached"], again["key"]) == (False, True, first["key"])
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    other, after = drawn(settings)
    assert not other["cached"]
    assert other["key"] != first["key"]
    (was,), (now,) = before["models"], after["models"]
    assert was["revision"] != now["revision"]
    assert was["revision"].startswith("sdxl-base-1.0-")


@pytest.mark.fault(165)
def test_a_default_model_that_cannot_be_used_is_not_replaced(tmp_path: Path) -> None:
    """`/readyz` names file and reason with 503, and requests for it get 503; the embedded models work by name."""
    folder = Path(shutil.copytree(ROOT / "models" / "embedded-sdxl", tmp_path / "weights" / BASE))
    shutil.copytree(ROOT / "models" / "embedded-flux", tmp_path / "weights" / "embedded-flux")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    settings = settings_in(tmp_path, models_dir=tmp_path / "weights")
    refused, ready = drawn(settings)
    assert "vae/diffusion_pytorch_model.safetensors is a pointer of git-lfs" in " ".join(ready["missing"])
    assert ready["status"] == "not ready"
    assert refused["status"] == 503
    assert "sdxl" in refused["detail"]
    assert drawn(settings, model="embedded-flux")[0]["model"] == "embedded-flux"


@pytest.mark.fault(165)
def test_a_link_that_leads_nowhere_is_a_model_that_is_reported(tmp_path: Path) -> None:
    """MODELS=auto reports it, and does not fall back to the embedded models."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / BASE).symlink_to(tmp_path / "unmounted")
    assert ModelState.of(settings_in(tmp_path, models_dir=tmp_path / "weights")).facts["sdxl"].folder == BASE


def test_an_adapter_is_known_by_the_name_of_its_file(run_app: Making, tmp_path: Path) -> None:
    """Files of LORA_DIR may be named; others, and paths, are refused by the parameter's name."""
    folder = tmp_path / "loras"
    folder.mkdir()
    lora_file(folder / "pastel.safetensors")
    running_app = run_app(FakeDenoiser(), lora_dir=folder)
    assert running_app.draw(prompt="a red disc", lora="pastel:0.8").status_code == 200
    (job,) = running_app.squares.prepared
    assert job.loras == (("pastel", 0.8),)
    assert len(job.lora_digests) == 1
    # The same under another form of its name.
    for form in ("PASTEL", "pastel.safetensors", "Pastel.Safetensors:0.8"):
        assert running_app.draw(prompt="a red disc", lora=form).status_code == 200
    for name in ("other", "../loras/pastel", "loras/pastel", "pastel.gguf", "..", "/etc/pastel"):
        refused: Any = running_app.draw(prompt="a red disc", lora=name)
        assert (refused.status_code, refused.json()["field"]) == (422, "lora")


@pytest.mark.parametrize(
    ("shares", "default", "order"),
    [
        ("", "sdxl", ["sdxl", "flux"]),
        ("", "flux", ["flux", "sdxl"]),
        ("flux=0.7,sdxl=0.3", "sdxl", ["flux", "sdxl"]),
        ("embedded-flux", "sdxl", ["flux", "sdxl"]),
    ],
)
def test_the_order_in_which_models_are_placed_is_a_setting(
    shares: str, default: str, order: list[str], tmp_path: Path
) -> None:
    """MODEL_SHARES, by name or alias, comes before the default, and this before the others."""
    names = tuple(shares.split(",")) if shares else ()
    settings = settings_in(tmp_path, models="embedded", model_shares=names, text_to_image_model=default)
    state = ModelState.of(settings)
    assert list(state.in_order(settings)) == order
    assert [*state.shares(settings)] == (order if "sdxl" in shares else order[:1] if shares else [])


def test_a_share_for_a_model_that_is_not_there_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    """The sentence has the names; those of the families are allowed, as everywhere."""
    with pytest.raises(SettingsError, match=r"MODEL_SHARES names 'fluxx', which is not one of .*flux"):
        ModelState.of(settings_in(tmp_path, models="embedded", model_shares=("fluxx=0.5",)))
