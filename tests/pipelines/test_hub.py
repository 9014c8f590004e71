"""MODELS=hub: which files are downloaded, of which commit, and what stops it. A real client and our own test hub."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawing import MODELS_DIR
from hub_server import HubServer, hub_server
from structlog.testing import capture_logs

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS, choose_models
from stable_diffusion_server.pipelines.loading.components import empty_pipeline, load_controlnet
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.registry import LoadOptions, load

pytestmark = pytest.mark.slow

__all__ = ["hub_server"]

CPU = torch.device("cpu")
SDXL, EDGES, FLUX = "owner/sdxl", "owner/edges", "owner/flux"
FACTS = {
    "sdxl": replace(
        MODELS["sdxl"], folder="of-the-hub", repo=SDXL, control_folder="its-edges", control_repo=EDGES, variant="fp16"
    ),
    "flux": replace(MODELS["flux"], folder="flux-of-the-hub", repo=FLUX, control_folder=None),
}


@pytest.fixture
def hub(hub_server: HubServer) -> HubServer:
    """A hub with both embedded models and a ControlNet, in their authors' layout."""
    hub_server.add(SDXL, MODELS_DIR / "embedded-sdxl")
    hub_server.add(EDGES, MODELS_DIR / "embedded-controlnet-canny-sdxl")
    hub_server.add(FLUX, MODELS_DIR / "embedded-flux")
    return hub_server


def refusal(hub: HubClient, repo: str = SDXL) -> str:
    with pytest.raises(ModelLoadError) as refused:
        hub.pipeline(repo, "fp16")
    return refused.value.detail


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.fault(168)
def test_who_wants_one_family_gets_one() -> None:
    """The family of TEXT_TO_IMAGE_MODEL, or those in HUB_MODELS by family, folder or repository, and no other."""
    base, proteus, flux = REAL_MODELS["sdxl"][1], REAL_MODELS["sdxl"][0], REAL_MODELS["flux"][0]
    assert choose_models("hub", []) == {"sdxl": proteus}
    assert choose_models("hub", [], ("flux",)) == {"flux": flux}
    assert choose_models("hub", [], ("FLUX", "sdxl")) == {"sdxl": proteus, "flux": flux}
    assert choose_models("hub", [], ("stable-diffusion-xl-base-1.0",)) == {"sdxl": base}
    assert choose_models("hub", ["ProteusV0.2"], (str(base.repo),)) == {"sdxl": base}
    with pytest.raises(ModelLoadError, match="HUB_MODELS names 'sd15'"):
        choose_models("hub", [], ("sd15",))


@pytest.mark.fault(168)
def test_one_set_of_weights_is_fetched_of_each_part(hub: HubServer) -> None:
    """fp16 if it exists, otherwise the plain weights, never both; and no file that is not read."""
    files = hub.repositories[SDXL]
    unet = files["unet/diffusion_pytorch_model.safetensors"]
    files["unet/diffusion_pytorch_model.fp16.safetensors"] = unet
    files |= {
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "sd_xl.safetensors": unet,
        "README.md": b"#",
        "a.png": b"p",
    }
    hub.repositories[EDGES]["diffusion_pytorch_model.fp16.safetensors"] = b"finer"
    source = HubClient()
    fetched = names(source.pipeline(SDXL, "fp16"))
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in fetched
    assert "vae/diffusion_pytorch_model.safetensors" in fetched
    assert not {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"} & fetched
    assert not {"sd_xl.safetensors", "README.md", "a.png"} & fetched
    assert names(source.network(EDGES, "fp16")) == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.fault(168)
def test_sharded_weights_are_fetched_whole(hub: HubServer) -> None:
    """The index and all shards of one variant, in either naming scheme."""
    files = hub.repositories[FLUX]
    whole = files.pop("transformer/diffusion_pytorch_model.safetensors")
    shards = {f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors": whole + bytes([n]) for n in (1, 2)}
    listed = {"weight_map": {str(n): name.rpartition("/")[2] for n, name in enumerate(shards)}}
    files |= {**shards, "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(listed).encode()}
    fetched = names(HubClient().pipeline(FLUX, None))
    assert {*shards, "transformer/diffusion_pytorch_model.safetensors.index.json"} <= fetched


@pytest.mark.fault(168)
def test_the_commit_that_was_fetched_first_is_kept(hub: HubServer, tmp_path: Path) -> None:
    """A new commit on main changes nothing at a restart, which does not contact the hub; HUB_REVISIONS selects it."""
    pins = tmp_path / "data" / "hub.json"
    first, commit = HubClient(pins=pins).pipeline(SDXL, "fp16"), hub.commit(SDXL)
    hub.repositories[SDXL]["scheduler/scheduler_config.json"] += b"\n"
    asked = len(hub.asked)
    again = HubClient(pins=pins)
    assert again.pipeline(SDXL, "fp16") == first
    assert (again.commit(SDXL), len(hub.asked)) == (commit, asked)
    newer = HubClient({SDXL: "main"}, pins)
    assert newer.pipeline(SDXL, "fp16") != first
    assert newer.commit(SDXL) == hub.commit(SDXL) != commit


@pytest.mark.fault(168)
@pytest.mark.parametrize("record", ["{", "[]", '{"owner/sdxl": {}}', '{"owner/sdxl": {"commit": "0", "files": []}}'])
def test_a_broken_record_of_commits_is_written_again(record: str, hub: HubServer, tmp_path: Path) -> None:
    """The error is logged, and the hub is contacted."""
    pins = tmp_path / "hub.json"
    pins.write_text(record)
    source = HubClient({SDXL: "main"}, pins)
    source.pipeline(SDXL, "fp16")
    assert json.loads(pins.read_text())[SDXL]["commit"] == hub.commit(SDXL)


@pytest.mark.fault(168)
def test_what_cannot_be_had_is_reported_with_what_to_do(hub: HubServer) -> None:
    """Gated: the licence page and HF_TOKEN. Missing, private; no such revision; no safetensors; no model."""
    hub.gated.add(SDXL)
    sentence = refusal(HubClient())
    assert f"{hub.url}/{SDXL}" in sentence
    assert "licence" in sentence
    assert "HF_TOKEN" in sentence
    assert "private" in refusal(HubClient(), "owner/nothing")
    assert "HUB_REVISIONS" in refusal(HubClient({FLUX: "v9"}), FLUX)
    del hub.repositories[FLUX]["vae/diffusion_pytorch_model.safetensors"]
    hub.repositories[FLUX]["vae/diffusion_pytorch_model.bin"] = b"pickle"
    assert "no safetensors files for vae" in refusal(HubClient(), FLUX)
    del hub.repositories[FLUX]["model_index.json"]
    assert "no model_index.json" in refusal(HubClient(), FLUX)


@pytest.mark.fault(168)
def test_a_token_opens_what_is_gated(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client reads HF_TOKEN."""
    hub.gated.add(FLUX)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    assert (HubClient().pipeline(FLUX, None) / "model_index.json").is_file()


@pytest.mark.fault(168)
def test_a_disk_that_is_too_small_is_reported_before_the_download(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has both sizes, and no weights were requested."""
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1_000_000))
    sentence = refusal(HubClient(), FLUX)
    assert "takes 0.0 GB" in sentence
    assert "HF_HOME" in sentence
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


@pytest.mark.fault(168)
def test_a_download_tells_how_far_it_is(hub: HubServer) -> None:
    """Its repository, commit and bytes, at the start, at intervals, and at the end."""
    with capture_logs() as lines:
        HubClient(every=0.01).pipeline(FLUX, None)
    entries = [line for line in lines if line.get("repo") == FLUX]
    assert entries[0]["event"] == "fetching from the hub"
    assert entries[-1]["event"] == "fetched from the hub"
    assert {line["commit"] for line in entries} == {hub.commit(FLUX)}
    assert all(0 <= line["bytes"] <= line.get("of", line["bytes"]) for line in entries)


@pytest.mark.fault(168)
def test_a_connection_that_is_cut_is_taken_up_again(hub: HubServer) -> None:
    """By the hub's own client; the cached file is complete in the end."""
    hub.cut.add("diffusion_pytorch_model.safetensors")
    folder = HubClient().pipeline(FLUX, None)
    for name in ("transformer", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (folder / file).read_bytes() == hub.repositories[FLUX][file]


@pytest.mark.fault(168)
def test_a_cache_draws_without_a_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, or a hub that is down: with our record of commits, and with another program's cache."""
    pins = tmp_path / "hub.json"
    folder = HubClient(pins=pins).pipeline(FLUX, None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert HubClient(pins=pins).pipeline(FLUX, None) == folder
    shutil.rmtree(Path(tmp_path / "hub-cache"))
    assert "cannot be had from the hub" in refusal(HubClient(pins=pins), FLUX)


@pytest.mark.fault(168)
def test_the_controlnet_of_the_hub_is_in_the_footprint(hub: HubServer, tmp_path: Path) -> None:
    """Its components equal those of the same folders on disk, and it is the one loaded."""
    source = HubClient()
    assert set(empty_pipeline(FACTS["sdxl"], tmp_path, hub=source)) == set(empty_pipeline(MODELS["sdxl"], MODELS_DIR))
    assert type(load_controlnet(FACTS["sdxl"], tmp_path, CPU, hub=source)).__name__ == "ControlNetModel"


@pytest.mark.fault(168)
@pytest.mark.parametrize("gone", [EDGES, FLUX])
def test_an_optional_or_gated_repository_stops_no_other(
    gone: str, hub: HubServer, tmp_path: Path, one_thread: None
) -> None:
    """Without the ControlNet, SDXL works without edges; a gated Flux disables Flux only. Both are reported."""
    hub.gated.add(gone)
    drawing: Any = load(tmp_path, "cpu", 1, LoadOptions(models=FACTS, hub=HubClient()))
    loaded = {model.name: model for model in drawing.loaded}
    assert loaded["sdxl"].commit == hub.commit(SDXL)
    if gone == EDGES:
        assert "licence" in loaded["sdxl"].remarks[0]
        assert not loaded["sdxl"].follows_edges
        assert set(loaded) == {"sdxl", "flux"}
    else:
        assert loaded["sdxl"].follows_edges
        assert "HF_TOKEN" in drawing.unusable["flux"]
    assert drawing.models["sdxl"].revision == MODELS["sdxl"].revision  # the same weights, from whichever source
