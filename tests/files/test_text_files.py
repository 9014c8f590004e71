"""Text files of the operator's: bounded, followed through links, read again when they change."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stable_diffusion_server.files import TextFiles, UnreadableText, walk_files


def test_a_file_is_parsed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its identity: content of the same size, a replaced file and a link to another one are seen."""
    parsed: list[str] = []

    def parse(text: str) -> str:
        parsed.append(text)
        return text.upper()

    files, file = TextFiles(parse, 100), tmp_path / "a.txt"
    monkeypatch.setattr("stable_diffusion_server.files.text_files._UNSETTLED_SECONDS", -1.0)
    file.write_text("one")
    assert [files.read(file) for _ in range(3)] == ["ONE"] * 3
    assert parsed == ["one"]
    time.sleep(0.02)
    file.write_text("two")
    assert files.read(file) == "TWO"
    (tmp_path / "b.txt").write_text("six")
    os.replace(tmp_path / "b.txt", file)
    assert files.read(file) == "SIX"


def test_what_is_kept_has_a_total_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MiB of files: of three of 3 MiB two are kept, however many are read."""
    read: list[int] = []
    files = TextFiles(lambda text: read.append(len(text)), 4_000_000)
    monkeypatch.setattr("stable_diffusion_server.files.text_files._UNSETTLED_SECONDS", -1.0)
    for name in "abc":
        (tmp_path / name).write_text("a" * 3_000_000)
    for name in ("a", "b", "a", "b", "c", "b", "c", "a"):
        files.read(tmp_path / name)
    assert len(read) == 4


def test_a_file_that_was_just_written_is_not_kept(tmp_path: Path) -> None:
    """It may change again within the same tick of its clock."""
    files, file = TextFiles(str, 100), tmp_path / "a.txt"
    file.write_text("one")
    facts = file.stat()
    assert files.read(file) == "one"
    file.write_text("two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert files.read(file) == "two"


@pytest.mark.parametrize("size", [99, 100])
def test_a_file_may_have_as_many_bytes_as_is_said(tmp_path: Path, size: int) -> None:
    """100 bytes of at most 100 are read."""
    (tmp_path / "a.txt").write_text("a" * size)
    assert len(TextFiles(str, 100).read(tmp_path / "a.txt")) == size


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    """Too long, other encodings, zero bytes, folders, pipes that nobody writes to, dangling links."""
    files = TextFiles(str, 100)
    (tmp_path / "long").write_text("a" * 101)
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "wide").write_bytes("caf\u00e9".encode("utf-16"))
    (tmp_path / "zero").write_bytes(b"a\0b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "long": "more than 100 bytes",
        "latin": "not UTF-8, at byte 3",
        "wide": "not UTF-8",
        "zero": "zero byte",
        "folder": "not a file",
        "link": "No such file",
        "pipe": "not a file",
    }
    for name, why in reasons.items():
        with pytest.raises(UnreadableText, match=why):
            files.read(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """Excel writes one before a CSV file."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert TextFiles(str, 100).read(tmp_path / "a.txt") == "a"


def test_a_walk_enters_each_folder_once_and_skips_hidden_names(tmp_path: Path) -> None:
    """Links in a circle end; files of other kinds are left out; those nearer to the top come first."""
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/deep.txt", "b/near.txt", "top.txt", "b/other.csv", ".hidden.txt"):
        (tmp_path / name).write_text("a")
    (tmp_path / "b" / "c" / "again").symlink_to(tmp_path)
    found = [file.relative_to(tmp_path).as_posix() for file in walk_files(tmp_path, ".txt")]
    assert found == ["top.txt", "b/near.txt", "b/c/deep.txt"]
    assert list(walk_files(tmp_path / "gone", ".txt")) == []
