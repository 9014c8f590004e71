"""The folder of embeddings: layouts, and hostile, damaged and many files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from embedding_makers import embedding_file, vectors

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines import EmbeddingFolder
from stable_diffusion_server.pipelines.conditioning import named_files
from stable_diffusion_server.pipelines.conditioning.lora_files import digest_of

ONE, LARGE = vectors(3, 8), vectors(3, 16, 2)


@pytest.mark.parametrize(
    ("tensors", "widths"),
    [
        ({"emb_params": ONE}, {"clip_l": 8}),
        ({"string_to_param.*": ONE, "string_to_token": vectors(1, 1)}, {"clip_l": 8}),
        ({"<cat>": ONE}, {"clip_l": 8}),
        ({"clip_l": ONE}, {"clip_l": 8}),
        ({"clip_l": ONE, "clip_g": LARGE}, {"clip_l": 8, "clip_g": 16}),
        ({"text_encoders_0": ONE, "text_encoders_1": LARGE}, {"clip_l": 8, "clip_g": 16}),
    ],
)
def test_layouts_are_read(tensors: dict[str, np.ndarray], widths: dict[str, int], tmp_path: Path) -> None:
    """AUTOMATIC1111's, diffusers', kohya's, and pairs for SDXL."""
    file = embedding_file(tmp_path / "cat.safetensors", tensors)
    found = EmbeddingFolder(tmp_path).read("cat")
    assert (found.widths, found.count, found.digest) == (widths, 3, digest_of(file))
    assert np.array_equal(found.vectors["clip_l"], ONE)


@pytest.mark.parametrize(("kind", "stored"), [("F16", "<f2"), ("F64", "<f8"), ("BF16", "")])
def test_other_precisions_are_read(kind: str, stored: str, tmp_path: Path) -> None:
    """One vector without a first axis, as diffusers writes it."""
    row = ONE[0]
    data = row.astype(stored).tobytes() if stored else (row.view(np.uint32) >> 16).astype("<u2").tobytes()
    header = json.dumps({"<cat>": {"dtype": kind, "shape": [8], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "cat.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    found = EmbeddingFolder(tmp_path).read("cat")
    assert found.count == 1
    assert np.abs(found.vectors["clip_l"] - row).max() < 0.02


def _pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({"string_to_param": {"*": [1.0] * 768}}))


def _huge_header(file: Path) -> None:
    with file.open("wb") as target:
        target.write((10 * 2**30).to_bytes(8, "little") + b"{")
        target.truncate(2**20)


def _long_header(file: Path) -> None:
    file.write_bytes((2**21).to_bytes(8, "little") + b" " * (2**21 + 100))


def _nested(file: Path) -> None:
    file.write_bytes((900_000).to_bytes(8, "little") + b"[" * 900_000)


def _not_finite(file: Path) -> None:
    embedding_file(file, {"emb_params": np.full((1, 8), np.nan, np.float32)})


def _infinite_as_float(file: Path) -> None:
    data = np.full((1, 8), 1e300).tobytes()
    header = json.dumps({"a": {"dtype": "F64", "shape": [1, 8], "data_offsets": [0, 64]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def _many_vectors(file: Path) -> None:
    embedding_file(file, {"emb_params": vectors(76, 8)})


def _no_vectors(file: Path) -> None:
    embedding_file(file, {"emb_params": vectors(0, 8)})


def _lying_shape(file: Path) -> None:
    embedding_file(file, {"emb_params": vectors(3, 8)}, [75, 8192])


def _cube(file: Path) -> None:
    embedding_file(file, {"emb_params": vectors(4, 8)}, [2, 2, 8])


def _a_lora(file: Path) -> None:
    embedding_file(file, {"unet.a.lora_A.weight": ONE, "unet.a.lora_B.weight": ONE})


def _unequal(file: Path) -> None:
    embedding_file(file, {"clip_l": vectors(2, 8), "clip_g": vectors(3, 16)})


def _large(file: Path) -> None:
    with file.open("wb") as target:
        target.truncate(2**40)


def _device(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (_pickled, "not a safetensors file"),
        (_huge_header, "not a safetensors file"),
        (_long_header, "has a header of 2097152 bytes"),
        (_nested, "not a safetensors file"),
        (_not_finite, "not finite"),
        (_infinite_as_float, "not finite"),
        (_many_vectors, "1 to 75 vectors"),
        (_no_vectors, "1 to 75 vectors"),
        (_lying_shape, "truncated|not a safetensors file"),
        (_cube, "1 to 75 vectors"),
        (_a_lora, "holds no embedding"),
        (_unequal, "another number of vectors"),
        (_large, "an embedding at most"),
        (_device, "a device or a pipe"),
    ],
)
def test_a_bad_file_costs_itself_alone(made: Callable[[Path], None], why: str, tmp_path: Path) -> None:
    """It is listed with the reason, and others are read."""
    made(tmp_path / "bad.safetensors")
    embedding_file(tmp_path / "good.safetensors", {"emb_params": ONE})
    folder = EmbeddingFolder(tmp_path)
    with pytest.raises(ModelLoadError, match=why):
        folder.read("bad")
    assert list(folder.list().usable) == ["good"]
    assert list(folder.list().faults) == ["bad"]


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_a_pickle_is_never_read(ending: str, tmp_path: Path) -> None:
    """Unpickling runs what the file says; the reason tells what to do."""
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> object:
            return Path.touch, (marker,)

    (tmp_path / f"evil{ending}").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ModelLoadError, match=r"convert it to \.safetensors"):
        EmbeddingFolder(tmp_path).read("evil")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\x00b", "", "nothing"])
def test_a_name_never_leaves_the_folder(name: str, tmp_path: Path) -> None:
    """Names are compared with the files found, and never joined into a path."""
    inside = tmp_path / "inside"
    inside.mkdir()
    embedding_file(tmp_path / "secret.safetensors", {"emb_params": ONE})
    with pytest.raises(ModelLoadError):
        EmbeddingFolder(inside).read(name)
    assert len(EmbeddingFolder(inside).index()) == 0


def test_names_with_control_characters_are_reported(tmp_path: Path) -> None:
    """They have no name that a request could write."""
    embedding_file(tmp_path / "a\nb.safetensors", {"emb_params": ONE})
    listed = EmbeddingFolder(tmp_path).list()
    assert (len(listed.usable), len(listed.faults)) == (0, 1)


def test_a_large_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are found in up to 50,000 entries; a list reads 2000 files."""
    for number in range(3000):
        (tmp_path / f"e{number}.safetensors").touch()
    folder = EmbeddingFolder(tmp_path)
    assert len(folder.index()) == 3000
    assert len(folder.list().faults) == 2000
    monkeypatch.setattr("stable_diffusion_server.files.folder_walk._MAX_ENTRIES", 100)
    assert len(EmbeddingFolder(tmp_path).index()) == 3000, "the first folder is listed as a whole"
    (tmp_path / "sub").mkdir()
    embedding_file(tmp_path / "sub" / "later.safetensors", {"emb_params": ONE})
    assert EmbeddingFolder(tmp_path).index().split("later")[0].name == ""


def test_a_replaced_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are kept by a file's identity; names are a second old at most."""
    monkeypatch.setattr(named_files, "UNSETTLED_SECONDS", -1.0)
    monkeypatch.setattr("stable_diffusion_server.pipelines.conditioning.embedding_folder._FRESH_SECONDS", 0.0)
    folder = EmbeddingFolder(tmp_path)
    assert len(folder.index()) == 0
    file = embedding_file(tmp_path / "cat.safetensors", {"emb_params": ONE})
    first = folder.read("cat")
    assert folder.read("cat") is first
    embedding_file(file, {"emb_params": ONE + 1})
    assert folder.read("cat").digest == digest_of(file) != first.digest
    file.unlink()
    with pytest.raises(ModelLoadError, match="no embedding here"):
        folder.read("cat")
