"""`models list`, `inspect` and `verify`: what they print, as a table and as JSON, and their exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from model_files import FILES, flux, write_safetensors

from stable_diffusion_server.cli import main
from stable_diffusion_server.pipelines.loading import weight_digest
from stable_diffusion_server.settings import read_settings

SMALL = flux(double=1, single=1, width=256)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODELS_DIR with one usable model, one truncated, one pickled, and a spec with a misspelt key."""
    folder = tmp_path / "models"
    write_safetensors(folder / "checkpoints" / "my flux.safetensors", SMALL)
    write_safetensors(folder / "checkpoints" / "half.safetensors", SMALL)
    os.truncate(folder / "checkpoints" / "half.safetensors", 40_000)
    (folder / "checkpoints" / "old.ckpt").write_bytes(b"pickled")
    write_safetensors(folder / "vae" / "sdxl.safetensors", FILES["taesd"])
    (folder / "checkpoints" / "half.toml").write_text("stpes = 4")
    monkeypatch.setenv("MODELS_DIR", str(folder))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    status = 0
    try:
        main(["models", *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_list_prints_every_model_file_with_what_is_wrong(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """A table, and 1 since none of them can be used; without an action it is the same."""
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert "my flux.safetensors lacks a VAE" in err
    assert "embedded-sdxl" not in out
    assert "Model files in MODELS_DIR: 4" in out
    (row,) = [line.split() for line in out.splitlines() if line.strip().startswith("my flux")]
    assert row == ["my", "flux", "denoiser", "flux", "dev", "fp16", f"{row[-2]}", "MB"]
    assert "half.safetensors is truncated" in out
    assert "half.toml: stpes is not a key; did you mean steps?" in out
    assert "old.ckpt is pickled" in out


def test_list_prints_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the same names, and the faults of each."""
    status, out, _ = run(capsys, "list", "--json")
    listed = {model["name"]: model for model in json.loads(out)["models"]}
    assert (status, set(listed)) == (1, {"my flux", "half", "old", "sdxl"})
    assert listed["my flux"]["families"] == ["flux"]
    assert (listed["my flux"]["faults"], len(listed["half"]["faults"])) == ([], 2)
    assert json.loads(out)["selected"] == []


def test_inspect_says_what_a_file_is(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By path or by name; 1 for a file that cannot be used, 2 for one that is not there."""
    status, out, _ = run(capsys, "inspect", str(models / "vae" / "sdxl.safetensors"))
    assert (status, "tiny-vae" in out, "sd15, sd2, sdxl" in out) == (0, True, True)
    status, out, _ = run(capsys, "inspect", "My Flux.safetensors", "--json")
    assert (status, json.loads(out)["variant"]) == (0, "dev")
    status, out, _ = run(capsys, "inspect", "half")
    assert (status, "FAULT       half.safetensors is truncated" in out) == (1, True)
    status, _, err = run(capsys, "inspect", "my flx")
    assert (status, "did you mean my flux?" in err) == (2, True)


def test_verify_reads_files_and_prints_their_hashes(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards the list shows the hashes too; a file that cannot be used ends it with 1."""
    monkeypatch.setattr(weight_digest, "_SETTLED", -1.0)  # as if the files were older
    status, out, _ = run(capsys, "verify", "my flux")
    assert (status, out.startswith("  ok    my flux [")) == (0, True)
    title = out.split("ok")[1].strip()
    assert title in run(capsys, "list")[1]
    assert run(capsys, "inspect", title)[0] == 0
    status, out, _ = run(capsys, "verify", "--json")
    assert (status, sum(bool(model["faults"]) for model in json.loads(out)["models"])) == (1, 2)
    assert run(capsys, "verify", "nobody")[0] == 2


def test_names_cannot_write_to_the_terminal(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in names of files, in metadata and in names that a caller gives."""
    write_safetensors(models / "a\x1b[2Jb\u202e.safetensors", SMALL, metadata={"modelspec.title": "\x1b[31m"})
    for arguments in (
        (),
        ("verify",),
        ("inspect", str(models / "a\x1b[2Jb\u202e.safetensors")),
        ("inspect", "\x1b[2J"),
    ):
        _, out, err = run(capsys, *arguments)
        assert not {"\x1b", "\u202e"} & set(out + err)


def test_several_folders_may_be_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Separated by commas or as in PATH; the first keeps a name that both have."""
    write_safetensors(tmp_path / "more" / "my flux.safetensors", SMALL)
    write_safetensors(tmp_path / "more" / "second.safetensors", SMALL)
    for separator in (",", os.pathsep, " , "):
        monkeypatch.setenv("MODELS_DIR", f"{models}{separator}{tmp_path / 'more'}")
        assert read_settings().models_dir == (models, tmp_path / "more")
        names = {model["name"] for model in json.loads(run(capsys, "list", "--json")[1])["models"]}
        assert {"my flux", "my flux.safetensors", "second"} <= names
