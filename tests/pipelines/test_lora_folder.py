"""The LoRA folder: follows links and sub-folders, isolates invalid files, identifies files by content digest."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import lora_file

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.conditioning import lora_folder, named_files
from stable_diffusion_server.pipelines.conditioning.lora_files import digest_of, identity_of, read_header, read_lora
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder, find, names_in


def _linked_out(folder: Path, outside: Path) -> None:
    lora_file(outside / "theirs.safetensors", b"theirs")
    (folder / "linked.safetensors").symlink_to(outside / "theirs.safetensors")


def _linked_folder(folder: Path, outside: Path) -> None:
    (outside / "deeper").mkdir()
    lora_file(outside / "deeper" / "linked.safetensors", b"deeper")
    (folder / "comfy").symlink_to(outside)


def _link_in_a_sub_folder(folder: Path, outside: Path) -> None:
    lora_file(outside / "theirs.safetensors", b"theirs")
    (folder / "sub").mkdir()
    (folder / "sub" / "linked.safetensors").symlink_to(outside / "theirs.safetensors")


def _blob_of_a_hub_cache(folder: Path, outside: Path) -> None:
    lora_file(outside / "0d9f", b"blob")
    (folder / "linked.safetensors").symlink_to(outside / "0d9f")


@pytest.mark.fault(163)
@pytest.mark.parametrize("made", [_linked_out, _linked_folder, _link_in_a_sub_folder, _blob_of_a_hub_cache])
def test_links_and_sub_folders_are_followed(made: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """A ComfyUI or AUTOMATIC1111 folder, linked as a whole or file by file, is listed like local files."""
    folder, outside = tmp_path / "loras", tmp_path / "comfy"
    folder.mkdir()
    outside.mkdir()
    lora_file(folder / "own.safetensors", b"own")
    made(folder, outside)
    offered = LoraFolder(folder).available({"unet"})
    assert {"own", "linked"} <= set(offered)
    assert offered["linked"] != offered["own"] == digest_of(folder / "own.safetensors")
    assert LoraFolder(folder).read("linked").digest == offered["linked"]


def _dangling(file: Path) -> None:
    file.symlink_to(file.parent / "gone")


def _circle(file: Path) -> None:
    file.symlink_to(file)


def _folder(file: Path) -> None:
    file.mkdir()
    lora_file(file / "inside.txt")


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def _process_file(file: Path) -> None:
    file.symlink_to("/proc/self/mem")


def _endless(file: Path) -> None:
    with file.open("wb") as target:
        target.write((10**6).to_bytes(8, "little"))
        target.truncate(2**40)


def _forbidden(file: Path) -> None:
    lora_file(file).chmod(0)


def _empty(file: Path) -> None:
    file.touch()


def _pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def _torn(file: Path) -> None:
    file.write_bytes(lora_file(file).read_bytes()[:-1])


BAD: list[Any] = [
    (_dangling, "link to a file that is not there"),
    (_circle, "cannot be read"),
    (_folder, "is a folder"),
    (_pipe, "a device or a pipe"),
    (_device, "a device or a pipe"),
    (_process_file, "not a safetensors file|cannot be read"),
    (_endless, "bytes, and MAX_LORA_BYTES"),
    (_empty, "not a safetensors file"),
    (_pointer, "pointer of git-lfs"),
    (_torn, "truncated"),
    pytest.param(
        _forbidden, "cannot be read", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    ),
]


@pytest.mark.fault(163)
@pytest.mark.parametrize(("made", "said"), BAD)
def test_a_bad_file_costs_itself_alone(made: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """It is not listed, and its reason is reported; naming it gives that reason; the others are listed."""
    lora_file(tmp_path / "own.safetensors")
    made(tmp_path / "bad.safetensors")
    folder = LoraFolder(tmp_path)
    offered = folder.available({"unet"})
    assert list(offered) == ["own"] == list(names_in(tmp_path))
    assert len(offered["own"]) == 16
    assert list(folder.faults()) == ["bad"]
    for ask in (lambda: offered["bad"], lambda: folder.read("bad"), lambda: find(tmp_path, "bad")):
        with pytest.raises(InvalidInput, match=rf"^bad\.safetensors .*({said})") as refused:
            ask()
        assert refused.value.field == "lora"


@pytest.mark.fault(163)
@pytest.mark.parametrize(("made", "said"), BAD)
def test_a_mended_file_works_at_once(made: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """In the same process, with no cached state of the invalid file."""
    file, folder = tmp_path / "bad.safetensors", LoraFolder(tmp_path)
    made(file)
    with pytest.raises(InvalidInput, match=said):
        folder.digest("bad")
    assert folder.names() == ()
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink()
    lora_file(file)
    assert folder.names() == ("bad",)
    assert folder.digest("bad") == digest_of(file) == folder.read("bad").digest
    assert folder.faults() == {}


@pytest.mark.fault(163)
def test_links_in_circles_and_unreadable_places_end(tmp_path: Path) -> None:
    """A folder that contains itself through a link is scanned once, and a dangling link is ignored."""
    lora_file(tmp_path / "own.safetensors")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden").mkdir()
    lora_file(tmp_path / ".hidden" / "hidden.safetensors")
    assert names_in(tmp_path) == ("own",)


def test_of_two_files_of_one_name_the_one_near_the_top_counts(tmp_path: Path) -> None:
    """A file deeper down never replaces a name."""
    (tmp_path / "a").mkdir()
    lora_file(tmp_path / "a" / "ink.safetensors", b"deep")
    top = lora_file(tmp_path / "ink.safetensors", b"top")
    assert LoraFolder(tmp_path).digest("ink") == digest_of(top)


@pytest.mark.fault(163)
def test_what_cannot_be_used_is_reported_in_the_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often readiness is requested; unusable names are logged as well."""
    logged: list[str] = []
    monkeypatch.setattr(lora_folder._log, "warning", lambda event, **more: logged.append(more["name"]), raising=False)
    _dangling(tmp_path / "bad.safetensors")
    lora_file(tmp_path / "my, style.safetensors")
    lora_file(tmp_path / os.fsdecode(b"no text \xff.safetensors"))
    folder = LoraFolder(tmp_path)
    names = ["'my, style.safetensors'", "'no text \\udcff.safetensors'", "bad"]
    for _ in range(3):
        assert sorted(folder.faults()) == names
        assert all(sentence.encode() for sentence in folder.faults().values())
    assert sorted(logged) == names


def test_files_for_another_family_are_not_offered(tmp_path: Path) -> None:
    """As far as the tensor names show the family."""
    lora_file(tmp_path / "mine.safetensors", layer="unet.mid_block")
    lora_file(tmp_path / "theirs.safetensors", layer="transformer.single_transformer_blocks.0.attn.to_q")
    lora_file(tmp_path / "both.safetensors", layer="text_encoder.text_model.encoder.layers.0.mlp.fc1")
    folder = LoraFolder(tmp_path)
    assert folder.names({"unet"}) == ("both", "mine")
    assert folder.names({"transformer"}) == ("both", "theirs")
    assert folder.names({"unet", "transformer"}) == ("both", "mine", "theirs")


@pytest.mark.fault(162)
@pytest.mark.parametrize("settled", [False, True])
def test_the_digest_follows_every_change_of_a_file(
    settled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwritten within a clock tick, replaced by rename, its times restored: the digest is of the current bytes."""
    if settled:
        monkeypatch.setattr(named_files, "UNSETTLED_SECONDS", -1.0)
    file, folder = lora_file(tmp_path / "ink.safetensors", b"0"), LoraFolder(tmp_path)
    before = file.stat()
    for number in range(1, 40 if not settled else 2):
        lora_file(file, str(number).encode())  # as large as before
        assert folder.digest("ink") == digest_of(file)
    other = lora_file(tmp_path / "other", b"renamed over")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert folder.digest("ink") == digest_of(file)
    lora_file(file, b"times set back")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folder.digest("ink") == digest_of(file)


@pytest.mark.fault(162)
def test_a_digest_is_that_of_the_bytes_that_were_read(tmp_path: Path) -> None:
    """While another process keeps overwriting the file: reads are consistent, with the matching digest, or refused."""
    file, done = lora_file(tmp_path / "ink.safetensors", b"0"), threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            lora_file(file, str(number).encode())

    writer = threading.Thread(target=write)
    writer.start()
    read = refused = 0
    try:
        for _ in range(300):
            try:
                found = LoraFolder(tmp_path).read("ink")
            except InvalidInput:
                refused += 1
                continue
            (tmp_path / "copy").write_bytes(found.data)
            assert found.digest == digest_of(tmp_path / "copy")
            read += 1
    finally:
        done.set()
        writer.join()
    assert read + refused == 300


def test_a_settled_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identified by device, inode, size and times, which reading does not change."""
    monkeypatch.setattr(named_files, "UNSETTLED_SECONDS", -1.0)
    file, folder = lora_file(tmp_path / "ink.safetensors"), LoraFolder(tmp_path)
    first = folder.digest("ink")
    monkeypatch.setattr(lora_folder, "check_lora", lambda *given: pytest.fail("it was read again"))
    assert folder.digest("ink") == first
    assert list(folder._digests) == [identity_of(file.stat())]


def test_a_limit_of_bytes_is_exact(tmp_path: Path) -> None:
    """Accepted at the limit, refused one byte above."""
    file = lora_file(tmp_path / "ink.safetensors")
    size = file.stat().st_size
    assert read_lora(file, size).digest == LoraFolder(tmp_path, size).digest("ink")
    with pytest.raises(ModelLoadError, match="MAX_LORA_BYTES"):
        read_lora(file, size - 1)
    with pytest.raises(InvalidInput, match="MAX_LORA_BYTES"):
        LoraFolder(tmp_path, size - 1).digest("ink")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": 7, "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]}}',
        b'{"a": null}',
        b'{"a": ' + b"[" * 50_000,
    ],
)
def test_invalid_descriptions_are_reported_as_no_file_of_this_kind(header: bytes, tmp_path: Path) -> None:
    """Invalid offsets, shapes and dtypes give the same sentence as random bytes."""
    file = tmp_path / "broken.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(ModelLoadError, match=r"broken\.safetensors is not a safetensors file"):
        read_header(file)


def test_the_largest_files_that_may_fit_a_denoiser_are_added_up(tmp_path: Path) -> None:
    """What the memory of a model has to hold besides: by header, so many of them, and nothing without a folder."""
    for number in (1, 2, 3):
        lora_file(tmp_path / f"n{number}.safetensors", b"x" * number)
    sizes = sorted(file.stat().st_size for file in tmp_path.iterdir())
    folder = LoraFolder(tmp_path)
    assert folder.largest_bytes("unet", 2) == sum(sizes[1:])
    assert folder.largest_bytes("unet", 8) == sum(sizes)
    assert folder.largest_bytes("another", 8) == 0
    assert LoraFolder(None).largest_bytes("unet", 8) == 0


def test_a_name_has_many_forms(tmp_path: Path) -> None:
    """Any case, the file's ending, sub-folders, blanks and brackets; of equal names the far one has its path."""
    files = {"Ink Wash [v2] (final)": "", "a/ink": "a", "a/b/ink": "a/b", "Ｗash": "", "z/one": "z"}
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lora_file(tmp_path / f"{name}.safetensors")
    folder = LoraFolder(tmp_path)
    assert set(folder.names()) == {"Ink Wash [v2] (final)", "ink", "a/b/ink", "Ｗash", "one"}
    near, far = tmp_path / "a" / "ink.safetensors", tmp_path / "a" / "b" / "ink.safetensors"
    for asked, found in (
        ("ink wash [v2] (FINAL).safetensors", tmp_path / "Ink Wash [v2] (final).safetensors"),
        *((form, near) for form in ("ink", "INK", "ink.safetensors", "a/ink", "A/Ink.SAFETENSORS")),
        *((form, far) for form in ("a/b/ink", "A/B/INK", "a/b/ink.safetensors")),
        ("Z/One", tmp_path / "z" / "one.safetensors"),
    ):
        assert folder.file(asked) == found, asked
        assert asked in folder
    for asked in ("", ".", "..", "b/ink", "../a/ink", "a/../a/ink", "/a/ink", "ink.safetensors.safetensors", "a", "*"):
        assert asked not in folder, asked
        with pytest.raises(InvalidInput, match="is not an adapter here"):
            folder.file(asked)


@pytest.mark.parametrize("name", ["a,b", "a:1", "a<b", "x" * 101, "a\u202eb", "a\tb", "a\\b"])
def test_a_file_that_no_request_can_name_is_reported(name: str, tmp_path: Path) -> None:
    """With its name in ASCII; it is offered under no name."""
    lora_file(tmp_path / f"{name}.safetensors")
    folder = LoraFolder(tmp_path)
    assert folder.names() == ()
    ((reported, why),) = folder.faults().items()
    assert reported.isascii()
    assert "cannot be asked for" in why
