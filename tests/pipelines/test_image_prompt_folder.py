"""The folder of image prompt files: lists adapters whose encoders are there, refuses the others in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import sd15_pipeline, write
from image_prompt_files import EMBEDDED, HIDDEN, adapter_file, vision_encoder
from safetensors.torch import load_file
from single_file_specs import flux_spec, sd15_spec, sdxl_spec

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.loading.image_adapter import read_image_adapter
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.vision_encoder import load_vision_encoder

pytestmark = pytest.mark.slow

SD15, SDXL, FLUX = (make(("denoiser", "model.safetensors")) for make in (sd15_spec, sdxl_spec, flux_spec))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet() -> Any:
    """One of SD 1.5, for texts as wide as SD 1.5's."""
    return sd15_pipeline(width=768).unet


@pytest.fixture
def folder(tmp_path: Path, unet: Any) -> Path:
    """Two adapters and the encoder of both."""
    vision_encoder(tmp_path / "clip_vision" / "small")
    (tmp_path / "ipadapter").mkdir()
    adapter_file(tmp_path / "ipadapter" / "plain.safetensors", unet)
    adapter_file(tmp_path / "ipadapter" / "face-plus.safetensors", unet, "plus")
    return tmp_path


def test_adapters_are_listed_for_their_family(folder: Path) -> None:
    """By the width of the texts that they are for; Flux has none of these."""
    found = ImagePromptFolder([folder])
    assert found.usable(SD15) == ("face-plus", "plain")
    assert (found.usable(SDXL), found.usable(FLUX)) == ((), ())
    assert found.find(None, SD15).name == "face-plus"
    assert found.find("IPADAPTER/Plain.safetensors", SD15).path == folder / "ipadapter" / "plain.safetensors"
    sizes = [file.stat().st_size for file in (folder / "ipadapter").iterdir()]
    assert (found.largest_bytes(SD15), found.largest_bytes(SDXL)) == (sum(sizes), 0)


def test_the_digest_is_that_of_adapter_and_encoder(folder: Path, unet: Any) -> None:
    """Another adapter or another encoder is another digest; names play no part."""
    first = ImagePromptFolder([folder]).find("plain", SD15)
    assert first.digest == ImagePromptFolder([folder]).find("plain", SD15).digest
    shutil.rmtree(folder / "clip_vision" / "small")
    vision_encoder(folder / "clip_vision" / "small", seed=4)
    second = ImagePromptFolder([folder]).find("plain", SD15)
    adapter_file(folder / "ipadapter" / "plain.safetensors", unet, seed=6)
    third = ImagePromptFolder([folder]).find("plain", SD15)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert (first.adapter_digest, second.encoder_digest) == (second.adapter_digest, third.encoder_digest)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "'nothing' reads no image prompts for .* here; there are face-plus, plain"),
        ("../../etc/passwd", "reads no image prompts"),
        ("ip-adapter_sd15", "is pickled: loading it would run code"),
        ("faces", "reads faces that InsightFace found"),
        ("wide", "needs an image encoder whose embeddings are 1280 wide, and there is none"),
        ("torn", "is truncated|is shorter|holds"),
        ("x" * 5000, "reads no image prompts"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(folder: Path, name: str, sentence: str) -> None:
    """Pickles, adapters of another kind, without an encoder, half a file, unknown names."""
    place = folder / "ipadapter"
    (place / "ip-adapter_sd15.bin").write_bytes(b"\x80\x04")
    plain = load_file(place / "plain.safetensors")
    write(place / "faces.safetensors", {**plain, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)})
    write(place / "wide.safetensors", {**plain, "image_proj.proj.weight": torch.zeros(4 * 768, 1280)})
    (place / "torn.safetensors").write_bytes((place / "plain.safetensors").read_bytes()[:20_000])
    with pytest.raises(InvalidInput, match=sentence) as caught:
        ImagePromptFolder([folder]).find(name, SD15)
    assert str(folder) not in caught.value.detail
    assert len(caught.value.detail) < 700


def test_without_adapters_there_is_nothing_to_name(tmp_path: Path) -> None:
    """And no folder is read."""
    assert ImagePromptFolder().usable(SD15) == ()
    with pytest.raises(InvalidInput, match="has nothing here that reads image prompts"):
        ImagePromptFolder([tmp_path]).find(None, SD15)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_proj.norm.weight": None}, "lacks parts"),
        ({"image_proj.proj.bias": torch.zeros(7)}, "lacks parts"),
        ({"ip_adapter.1.to_k_ip.weight": None}, "has weights for"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(8, 768)}, "is for another model"),
        ({"ip_adapter.3.to_v_ip.weight": torch.zeros(1, 1, dtype=torch.int64)}, "holds packed integers"),
    ],
    ids=["lacking", "bias", "layer", "shape", "whole numbers"],
)
def test_a_wrong_adapter_is_refused_in_a_sentence(folder: Path, unet: Any, change: Any, sentence: str) -> None:
    """Before anything of the model is touched."""
    tensors = load_file(folder / "ipadapter" / "plain.safetensors") | change
    file = folder / "ipadapter" / "wrong.safetensors"
    write(file, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ModelLoadError, match=sentence):
        read_image_adapter(file, unet, torch.float32, CPU)


def test_encoders_in_one_file_are_those_that_were_published(folder: Path) -> None:
    """Their configuration follows from their shapes; others need a folder. Half an encoder is refused."""
    weights = load_file(folder / "clip_vision" / "small" / "model.safetensors")
    assert weights["visual_projection.weight"].shape == (EMBEDDED, HIDDEN)
    write(folder / "small.safetensors", weights)
    with pytest.raises(ModelLoadError, match="is 32 wide; as a file"):
        load_vision_encoder(folder / "small.safetensors", torch.float32, CPU)
    (folder / "clip_vision" / "small" / "config.json").write_text('{"hidden_size": 1}')
    with pytest.raises(ModelLoadError):
        load_vision_encoder(folder / "clip_vision" / "small", torch.float32, CPU)
