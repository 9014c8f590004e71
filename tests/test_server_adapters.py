"""A real server with a folder of valid and invalid LoRAs: an invalid file fails only the requests that name it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASKED: dict[str, Any] = {
    "prompt": "a red circle on a blue background",
    "width": 64,
    "height": 64,
    "num_inference_steps": 1,
}
OUTLINES = ROOT / "models" / "loras" / "outlines.safetensors"


def scaled(times: float, kind: Any = None) -> bytes:
    """The embedded LoRA, its weights multiplied by a factor."""
    from safetensors.torch import load, save

    return save(
        {
            name: (tensor.float() * times).to(kind or tensor.dtype)
            for name, tensor in load(OUTLINES.read_bytes()).items()
        }
    )


def fill(folder: Path, outside: Path) -> None:
    """Put LoRAs of all kinds into a folder."""
    import torch
    from safetensors.torch import load, save

    outside.mkdir()
    good = OUTLINES.read_bytes()
    tensors = load(good)
    (folder / "good.safetensors").write_bytes(good)
    (outside / "theirs.safetensors").write_bytes(scaled(0.5))
    (folder / "linked.safetensors").symlink_to(outside / "theirs.safetensors")
    (folder / "comfy").symlink_to(outside)
    (folder / "dangling.safetensors").symlink_to(outside / "gone")
    (folder / "place.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "torn.safetensors").write_bytes(good[:-9])
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (folder / "nan.safetensors").write_bytes(scaled(float("nan")))
    (folder / "overflow.safetensors").write_bytes(scaled(1e25, torch.float32))
    half = {
        (name.replace("attn1", "attn9") if n % 4 < 2 else name): t
        for n, (name, t) in enumerate(sorted(tensors.items()))
    }
    (folder / "half.safetensors").write_bytes(save(half))
    flux = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{w}.weight": torch.zeros(4, 4) for w in "AB"}
    (folder / "flux.safetensors").write_bytes(save(flux))
    (folder / "dora.safetensors").write_bytes(save({**tensors, "lora_unet_mid.dora_scale": torch.ones(4, 1)}))
    (folder / "first.safetensors").write_bytes(save({n: t for n, t in tensors.items() if "lora_A" in n}))


HEADERS_TELL = ["dangling", "pipe", "place", "pointer", "torn"]
REFUSED = [*HEADERS_TELL, "dora", "first", "flux", "half", "nan", "overflow"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with such a folder, `loras` in its own."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "loras").mkdir()
    fill(folder / "loras", folder / "outside")
    port = free_port()
    command = (sys.executable, "-m", "stable_diffusion_server", "serve")
    running = start_server(
        folder, port, *command, PORT=str(port), LORA_DIR=str(folder / "loras"), MODELS="embedded", seconds=280.0
    )
    yield running
    running.stop()


def asked(server: Server, **more: Any) -> httpx.Response:
    return httpx.get(server.url + CREATE, params={**ASKED, **more}, timeout=300)


def sdxl_info(server: Server) -> dict[str, Any]:
    models = httpx.get(f"{server.url}/readyz", timeout=60).json()["models"]
    found: dict[str, Any] = next(model for model in models if model["name"] == "sdxl")
    return found


@pytest.mark.fault(160, 161, 163)
def test_each_bad_file_costs_the_request_that_names_it(adapted: Server) -> None:
    """A 422 of the field with the file and the reason, some four times, and all other requests succeed."""
    plain = httpx.get(asked(adapted, seed=1, save_path="before.png").json()["path"]).content
    for name in REFUSED:
        for seed in (1, 2, 3, 4) if name in ("nan", "overflow") else (1,):
            answer = asked(adapted, lora=name, seed=seed)
            assert answer.status_code == 422, answer.text
            problem = answer.json()
            assert problem["field"] == "lora"
            assert name in problem["detail"], problem["detail"]
    for name in ("good", "linked", "theirs"):
        assert asked(adapted, lora=name, seed=1).status_code == 200
    after = httpx.get(asked(adapted, seed=1, save_path="after.png").json()["path"]).content
    assert httpx.get(f"{adapted.url}/readyz").status_code == 200
    assert pixels(after) == pixels(plain)


def pixels(file: bytes) -> bytes:
    """The image without its metadata."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


@pytest.mark.fault(163)
def test_only_what_can_be_used_is_listed_and_the_rest_has_reasons(adapted: Server) -> None:
    """In `/readyz`, in AUTOMATIC1111's list, and in the log, once."""
    model = sdxl_info(adapted)
    listed = {lora["name"] for lora in httpx.get(f"{adapted.url}/sdapi/v1/loras", timeout=60).json()}
    assert {"good", "linked", "theirs"} <= set(model["loras"]) <= listed
    assert not set(HEADERS_TELL) & listed
    for name in HEADERS_TELL:
        assert sum(sentence.startswith(f"{name}.safetensors ") for sentence in model["unusable_loras"]) == 1
    for _ in range(3):
        sdxl_info(adapted)
    text = adapted.log.read_text()
    for name in HEADERS_TELL:
        sentences = [s for s in model["unusable_loras"] if s.startswith(f"{name}.")]
        assert text.count(sentences[0]) == 1


@pytest.mark.fault(162, 164)
def test_a_replaced_file_is_another_picture_at_once_and_a_mended_one_works(adapted: Server) -> None:
    """Without a restart: no old image under the new content's name, and no stale refusal."""
    folder = adapted.folder / "loras"
    ink = folder / "ink.safetensors"
    ink.write_bytes(scaled(1.0))
    first = asked(adapted, lora="ink", seed=3)
    assert asked(adapted, lora="ink", seed=3).json()["cached"] is True
    ink.write_bytes(scaled(0.1))
    second = asked(adapted, lora="ink", seed=3)
    assert (second.status_code, second.json()["cached"]) == (200, False)
    assert second.json()["path"] != first.json()["path"]
    shown = [httpx.get(answer.json()["path"]).content for answer in (first, second)]
    assert pixels(shown[0]) != pixels(shown[1])
    ink.unlink()
    gone = asked(adapted, lora="ink", seed=3)
    assert (gone.status_code, gone.json()["field"]) == (422, "lora")
    for name in ("nan", "flux", "torn", "half"):
        assert asked(adapted, lora=name, seed=4).status_code == 422
        (folder / f"{name}.safetensors").write_bytes(OUTLINES.read_bytes())
        assert asked(adapted, lora=name, seed=4).status_code == 200
    assert {"flux", "half", "nan", "torn"} <= set(sdxl_info(adapted)["loras"])
