"""Damaged DATA_DIR/spool: invalid entries are quarantined with a log line, valid ones are uploaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunningApp
from fakes import until
from storage_servers import KEYS, StorageServer, make_s3_bucket

from stable_diffusion_server.app import commands
from stable_diffusion_server.storage.dead_letters import DeadLetters
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.storage.spool import UploadSpool
from stable_diffusion_server.storage.write_behind import WriteBehindBucket
from stable_diffusion_server.types import StoredObject


def whole(folder: Path, number: int) -> Path:
    """A file as a server writes it."""
    data = b"picture %d" % number
    stored = StoredObject(f"k{number}", len(data), hashlib.sha256(data).hexdigest(), "image/webp", {"seed": "7"})
    return UploadSpool(folder, 10**9).put(data, stored, overwrite=False).path


def folder_of_that_name(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("not empty")


def link_to_a_secret(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def cut(path: Path) -> None:
    path.write_bytes(whole(path.parent, 90).read_bytes()[:-3])


def empty(path: Path) -> None:
    path.touch()


def of_other_facts(**facts: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        right = {"key": "k", "content_type": "image/webp", "record": {}, "sha256": "0" * 64, "overwrite": False}
        path.write_bytes(json.dumps({**right, **facts}).encode() + b"\ndata")

    return make


def no_facts(path: Path) -> None:
    path.write_bytes(b"[" * 100_000 + b"\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 1000)


def unreadable(path: Path) -> None:
    path.write_bytes(whole(path.parent, 91).read_bytes())
    path.chmod(0)


ODD: dict[str, Callable[[Path], None]] = {
    "a folder": folder_of_that_name,
    "a link to another file": link_to_a_secret,
    "a link to nothing": link_to_nothing,
    "a pipe, which no one writes to": pipe,
    "a file that was cut": cut,
    "an empty file": empty,
    "a forged digest": of_other_facts(),
    "a key that is a number": of_other_facts(key=7),
    "a record that is a list": of_other_facts(record=[1]),
    "a record of numbers": of_other_facts(record={"seed": 7}),
    "deep brackets": no_facts,
    "bytes of something else": binary,
    "a file without rights": unreadable,
}


@pytest.mark.fault(138)
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_entry_is_quarantined_and_the_rest_is_uploaded(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It sorts first; the three after it are uploaded, and the invalid one can be listed and dropped."""
    folder, store = tmp_path / "spool", MemoryBucket()
    folder.mkdir()
    (folder / "an old one.part").mkdir()
    ODD[kind](folder / "00.spool")
    for path in folder.glob("0*-*.spool"):
        path.unlink()
    for number in range(3):
        whole(folder, number)
    spooling = WriteBehindBucket(store, UploadSpool(folder, 10**9), 20.0, poll_seconds=0.02)
    spooling.open()
    until(lambda: set(store.list()) >= {"k0", "k1", "k2"})
    until(lambda: not list(folder.glob("*.spool")))
    spooling.close()
    if kind == "a file without rights" and os.geteuid() == 0:
        return  # root can read every file: it was uploaded
    letters = DeadLetters(tmp_path / "dead-letters", 10**9)
    [letter] = letters.list_all()
    assert (letter.id, letter.reason.startswith("It could not be read")) == ("00", True)
    assert "it is moved to the dead letters" in "".join(capfd.readouterr())
    if kind != "a folder":
        letters.drop(letter)
        assert letters.list_all() == []
    assert Path("/etc/passwd").exists()


@pytest.mark.fault(138)
def test_a_server_over_a_spool_of_oddities_draws(
    run_app: Callable[..., RunningApp], tmp_path: Path, s3_server: StorageServer
) -> None:
    """All of them at once, in DATA_DIR of a whole server, which becomes ready all the same."""
    folder = tmp_path / "data" / "spool"
    folder.mkdir(parents=True)
    for number, make in enumerate(ODD.values()):
        make(folder / f"{number:02}.spool")
    keys = {key: value.get_secret_value() for key, value in KEYS.items()}
    name = make_s3_bucket(s3_server)
    running_app = run_app(storage_provider="r2", bucket_name=name, r2_endpoint_url=s3_server.url, **keys)
    assert running_app.draw(prompt="a red square", save_path="a.webp").json()["stored"]


@pytest.mark.fault(138)
def test_dead_letters_are_bounded_and_the_reported_ones_go_first(tmp_path: Path) -> None:
    """Five of nine stay: entries whose callers know of the refusal go first, then the oldest."""
    letters = DeadLetters(tmp_path / "dead-letters", 10**9, most=5)
    (tmp_path / "spool").mkdir()
    paths = [whole(tmp_path / "spool", number) for number in range(9)]
    for number, path in enumerate(paths):
        letters.add(path, "refused", caller_informed=number % 3 == 0)
    assert [letter.key for letter in letters.list_all()] == ["k2", "k4", "k5", "k7", "k8"]
    size = letters.list_all()[0].size
    few = DeadLetters(tmp_path / "dead-letters", 3 * size)
    few.add(whole(tmp_path / "spool", 9), "refused")
    assert [letter.key for letter in few.list_all()] == ["k7", "k8", "k9"], "their bytes are bounded too"


@pytest.mark.fault(133)
def test_the_command_lists_retries_and_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By id or all; an unknown id is reported, and an entry truncated meanwhile is not retried."""
    letters = DeadLetters(tmp_path / "dead-letters", 10**9)
    (tmp_path / "spool").mkdir()
    for number in range(3):
        letters.add(whole(tmp_path / "spool", number), "KeyTooLongError")
    commands.manage_dead_letters(tmp_path, "list", [])
    listed = capsys.readouterr().out.splitlines()
    assert [("KeyTooLongError" in line, f"'k{n}'" in line) for n, line in enumerate(listed)] == [(True, True)] * 3
    ids = [line.split()[0] for line in listed]

    def status(*arguments: str) -> object:
        with pytest.raises(SystemExit) as ended:
            commands.manage_dead_letters(tmp_path, arguments[0], list(arguments[1:]))
        return ended.value.code

    assert (status("retry", ids[0]), status("drop", ids[1]), status("drop", "none"), status("retry")) == (0, 0, 2, 2)
    left = tmp_path / "dead-letters" / f"{ids[2]}.spool"
    left.write_bytes(left.read_bytes()[:-1])
    assert status("retry", "all") == 1
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [f"{ids[0]}.retry"]
    store = MemoryBucket()
    spooling = WriteBehindBucket(store, UploadSpool(tmp_path / "spool", 10**9), 20.0, poll_seconds=0.02)
    spooling.open()
    until(lambda: list(store.list()) == ["k0"])
    spooling.close()


@pytest.mark.parametrize("action", ["retry", "drop"])
def test_all_of_no_dead_letters_is_no_mistake(tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script may run `spool retry all` each night; an id that is not there stays an error."""
    commands.manage_dead_letters(tmp_path, action, ["all"])
    assert capsys.readouterr().out == "There are no dead letters.\n"
    with pytest.raises(SystemExit) as ended:
        commands.manage_dead_letters(tmp_path, action, ["none"])
    assert ended.value.code == 2


def deep(path: Path) -> None:
    path.write_text("[" * 50_000)


def no_list_of_pairs(path: Path) -> None:
    path.write_text(json.dumps([["reason", {"a": 1}]]))


def escapes(path: Path) -> None:
    path.write_text(json.dumps({"reason": "\x1b]0;own\x07\nanother line\u202e\ud800"}))


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


REASONS = [pipe, deep, no_list_of_pairs, escapes, huge, link_to_a_secret, binary]


@pytest.mark.fault(176)
@pytest.mark.parametrize("make", REASONS)
def test_an_odd_reason_beside_a_dead_letter_holds_up_nothing(
    tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Listed on one printable line, found by a starting server, counted, and dropped."""
    letters, folder = DeadLetters(tmp_path / "dead-letters", 10**9), tmp_path / "spool"
    folder.mkdir()
    letter = letters.add(whole(folder, 0), "refused")
    assert letter is not None
    reason = letter.with_name(f"{letter.name}.reason")
    reason.unlink()
    make(reason)
    commands.manage_dead_letters(tmp_path, "list", [])
    [line] = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert "'k0'" in line
    UploadSpool(folder, 10**9).open()
    assert letters.add(whole(folder, 1), "refused") is not None
    for one in letters.list_all():
        letters.drop(one)
    assert letters.list_all() == []


@pytest.mark.fault(176)
@pytest.mark.parametrize("name", ["0\x1b[2J", "0\nfake  7 bytes", "0\udcff\udcfe", "0\u202e", "0 'x'", "--help"])
def test_the_command_tells_and_takes_odd_names(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An id is one printable word in the list and works as listed; invalid objects are reported."""
    letters = DeadLetters(tmp_path / "dead-letters", 10**9)
    (tmp_path / "spool").mkdir()
    letters.add(whole(tmp_path / "spool", 0), "refused")
    whole(tmp_path / "spool", 1).rename(tmp_path / "dead-letters" / f"{name}.spool")
    no_facts(tmp_path / "dead-letters" / "deep.spool")
    commands.manage_dead_letters(tmp_path, "list", [])
    lines = capsys.readouterr().out.splitlines()
    assert (len(lines), all(line.isprintable() and line.isascii() for line in lines)) == (3, True)
    listed = next(line.partition("  ")[0] for line in lines if "'k1'" in line)
    for action, ids, status in (("retry", ["all"], 1), ("drop", ["deep", "deep"], 0), ("drop", [listed], 2)):
        with pytest.raises(SystemExit) as ended:
            commands.manage_dead_letters(tmp_path, action, ids)
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert (
        printed.out.count("  ok    retry"),
        printed.out.count("FAIL  retry deep"),
        printed.err.isascii(),
    ) == (2, 1, True)
    assert len(list((tmp_path / "spool").glob("*.retry"))) == 2


@pytest.mark.fault(176)
def test_a_retry_that_cannot_be_taken_up_holds_up_no_other(tmp_path: Path) -> None:
    """A folder blocks the place of the first; the second is queued for upload."""
    folder = tmp_path / "spool"
    folder.mkdir()
    whole(folder, 0).rename(folder / "00.retry")
    whole(folder, 1).rename(folder / "01.retry")
    spool = UploadSpool(folder, 10**9)
    folder_of_that_name(folder / "00.spool")  # created while the spool is open, since opening quarantines such entries
    spool.enqueue_retried()
    assert [kept.stored.key for kept in spool.waiting()] == ["k1"]
