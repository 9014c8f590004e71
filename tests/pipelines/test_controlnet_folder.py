"""ControlNets of a folder by name and kind, and what strangers' files in it do: each is refused in a sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from model_files import write_safetensors

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import MODELS, ControlNetFolder, WeightDigests
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind
from stable_diffusion_server.types import ControlKind

CANNY, DEPTH = ControlKind.CANNY, ControlKind.DEPTH
SDXL = replace(MODELS["sdxl"], control_folder=None)
FLUX = replace(MODELS["flux"], control_folder=None)
# Names and shapes of first tensors, which say what a file is.
OF_SDXL = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "add_embedding.linear_1.weight": (8, 8)}
OF_UNION = {**OF_SDXL, "task_embedding": (8, 320)}
OF_FLUX = {"controlnet_x_embedder.weight": (8, 64)}


def put(folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file with these tensors."""
    file = folder / "controlnet" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, shapes)
    return file


def folder_of(tmp_path: Path) -> ControlNetFolder:
    return ControlNetFolder([tmp_path], WeightDigests())


def test_networks_are_listed_by_family_and_found_by_name_and_kind(tmp_path: Path) -> None:
    """With and without the ending, in any case, as AUTOMATIC1111 writes them; one of a kind alone before a union."""
    for name, shapes in (
        ("sdxl-depth.safetensors", OF_SDXL),
        ("a-promax.safetensors", OF_UNION),
        ("sdxl-canny.safetensors", OF_SDXL),
        ("flux-canny.safetensors", OF_FLUX),
    ):
        put(tmp_path, name, shapes)
    folder = folder_of(tmp_path)
    usable = folder.usable(SDXL)
    assert {*usable} == {"sdxl-depth", "a-promax", "sdxl-canny"}
    assert {*folder.usable(FLUX)} == {"flux-canny"}
    assert usable["sdxl-depth"].kinds == (DEPTH,)
    assert usable["a-promax"].union
    assert {CANNY, DEPTH, ControlKind.TILE} <= {*usable["a-promax"].kinds}
    assert not usable["sdxl-depth"].digest
    found = folder.find("SDXL-depth.safetensors", None, SDXL)
    assert len(found.digest) == 64
    assert folder.find(f"sdxl-depth [{found.digest[:8]}]", DEPTH, SDXL) == found
    assert folder.usable(SDXL)["sdxl-depth"].digest == found.digest
    assert folder.find(None, CANNY, SDXL).name == "sdxl-canny"
    assert folder.find(None, ControlKind.OPENPOSE, SDXL).name == "a-promax"
    for name, kind in (("flux-canny", None), ("none", None), (None, ControlKind.GRAY), ("../x", None), ("", None)):
        with pytest.raises(InvalidInput, match="sdxl-canny"):
            folder.find(name, kind, SDXL)


def test_the_models_own_network_comes_first_with_its_weight_and_is_no_other_models(tmp_path: Path) -> None:
    """Embedded networks are too small for models of files."""
    embedded = MODELS["sdxl"]
    assert embedded.control_folder is not None
    put(tmp_path, "another-canny.safetensors", OF_SDXL)
    own = tmp_path / embedded.control_folder
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    write_safetensors(own / "diffusion_pytorch_model.safetensors", OF_SDXL)
    folder = folder_of(tmp_path)
    assert folder.find(None, CANNY, embedded).name == embedded.control_folder
    assert next(iter(folder.usable(embedded).values())).default_weight == embedded.control_scale
    assert {*folder.usable(SDXL)} == {"another-canny"}


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    """So a request that was accepted with the old one is refused when it is drawn."""
    put(tmp_path, "canny.safetensors", OF_SDXL)
    folder = folder_of(tmp_path)
    before = folder.find("canny", CANNY, SDXL)
    put(tmp_path, "canny.safetensors", {**OF_SDXL, "more.weight": (4, 4)})
    assert folder.find("canny", CANNY, SDXL).digest != before.digest


def test_a_digest_being_read_holds_up_no_request_with_another_network(tmp_path: Path) -> None:
    """The list and the digests known answer while a large new file is read."""
    put(tmp_path, "known-canny.safetensors", OF_SDXL)
    put(tmp_path, "new-depth.safetensors", OF_SDXL)
    reading, go_on = threading.Event(), threading.Event()

    class Slow(WeightDigests):
        def of(self, files: Mapping[str, Path], *more: object) -> str:
            if "new-depth.safetensors" in files and not go_on.is_set():
                reading.set()
                assert go_on.wait(60)
            return super().of(files)

    folder = ControlNetFolder([tmp_path], Slow())
    known = folder.find("known-canny", None, SDXL)
    worker = threading.Thread(target=folder.find, args=("new-depth", None, SDXL))
    worker.start()
    try:
        assert reading.wait(60)
        assert folder.find("known-canny", None, SDXL) == known
        assert len(folder.usable(SDXL)) == 2
    finally:
        go_on.set()
        worker.join()


def test_hostile_files_are_listed_nowhere_and_refused_in_a_sentence(tmp_path: Path) -> None:
    """Pickles, a header of 10 GB, half a header, text, adapters that are not read; no path of this machine is told."""
    put(tmp_path, "good-canny.safetensors", OF_SDXL)
    place = tmp_path / "controlnet"
    (place / "pickle.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    (place / "huge.safetensors").write_bytes((10 * 2**30).to_bytes(8, "little") + b"{" * 100)
    (place / "half.safetensors").write_bytes((500).to_bytes(8, "little") + b'{"a": ')
    (place / "text.safetensors").write_text("no weights " * 40)
    put(tmp_path, "t2i.safetensors", {"body.0.block1.weight": (4, 4), "conv_in.weight": (4, 4)})
    put(tmp_path, "lllite.safetensors", {"lllite_unet_input.weight": (4, 4)})
    put(tmp_path, "lora.safetensors", {"lora_controlnet": (1,), "label_emb.0.0.up": (4, 4)})
    folder = folder_of(tmp_path)
    assert {*folder.usable(SDXL)} == {"good-canny"}
    for name in ("pickle", "huge", "half", "text", "t2i", "lllite", "lora"):
        with pytest.raises(InvalidInput) as refused:
            folder.find(name, CANNY, SDXL)
        assert name in refused.value.detail
        assert str(tmp_path) not in refused.value.detail
        assert len(refused.value.detail) < 500
    assert not Path("owned").exists()


def test_a_family_without_networks_has_none(tmp_path: Path) -> None:
    """FLUX.2 draws without, whatever lies in the folder."""
    put(tmp_path, "canny.safetensors", OF_SDXL)
    spec = family_row(FileIdentity(Kind.PIPELINE, ("flux2",), variant="klein"))
    assert spec is not None
    assert not folder_of(tmp_path).usable(spec)
    with pytest.raises(InvalidInput, match="has no ControlNet that follows canny here; there is none"):
        folder_of(tmp_path).find(None, CANNY, spec)
