"""Downloads of large files against a real server on loopback: resumed, checked, bounded, and never led astray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_server import FileServer, ServedFile, file_server, serve_files

from stable_diffusion_server.files import MIN_FREE_BYTES
from stable_diffusion_server.net import (
    AllowedTarget,
    DownloadFailed,
    FileDownloader,
    RemoteFile,
    file_downloader,
    finish,
)
from stable_diffusion_server.net.answer_headers import MAX_NAME_BYTES, safe_name

pytestmark = pytest.mark.slow

__all__ = ["file_server"]

DATA = bytes(range(256)) * 4096
OTHER = DATA[::-1]
ETAG = {"ETag": '"one"'}


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Where a partial file will be."""
    return tmp_path / ".model.part.safetensors"


def remote(server: FileServer, path: str = "/model", digest: str = "", size: int | None = None) -> RemoteFile:
    return RemoteFile(f"{server.url}{path}", "the file", digest=digest, size=size)


def fetch(file: RemoteFile, partial: Path, *allowed: str, pauses: tuple[float, ...] = (0.0, 0.0)) -> str:
    entries = [AllowedTarget.parse(entry) for entry in allowed]
    return asyncio.run(FileDownloader(entries, pauses=pauses).download(file, partial))


def refusal(file: RemoteFile, partial: Path, *allowed: str) -> str:
    with pytest.raises(DownloadFailed) as failed:
        fetch(file, partial, *allowed)
    return str(failed.value)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("length", [None, 0], ids=["length", "chunked"])
def test_a_file_arrives_whole_and_only_under_its_last_name(
    file_server: FileServer, partial: Path, length: int | None
) -> None:
    """With a length and in chunks; progress never goes back, and nothing else is left in the folder."""
    file_server.files["/model"] = ServedFile(DATA, size=length)
    seen: list[int] = []
    downloader = FileDownloader(report=lambda done, size: seen.append(done))
    assert asyncio.run(downloader.download(remote(file_server), partial)) == sha256(DATA)
    assert seen == sorted(seen)
    finish(partial, partial.with_name("model"))
    assert [path.name for path in partial.parent.iterdir()] == ["model"]
    assert partial.with_name("model").read_bytes() == DATA


@pytest.mark.parametrize(
    "headers", [ETAG, {"Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}], ids=["etag", "last-modified"]
)
def test_a_connection_that_breaks_is_resumed(file_server: FileServer, partial: Path, headers: dict[str, str]) -> None:
    """Each byte is sent once, with `If-Range`, so that a changed file is not continued."""
    file_server.files["/model"] = ServedFile(DATA, headers, cuts=[300_000, 300_000])
    assert fetch(remote(file_server), partial) == sha256(DATA)
    assert file_server.sent["/model"] == len(DATA)
    asked = [{name: sent.get(name) for name in ("range", "if-range")} for _, sent in file_server.asked]
    (validator,) = headers.values()
    assert asked == [
        {"range": None, "if-range": None},
        {"range": "bytes=300000-", "if-range": validator},
        {"range": "bytes=600000-", "if-range": validator},
    ]


def test_another_process_resumes(file_server: FileServer, partial: Path) -> None:
    """By the note beside the partial file: only the rest is sent, and the digest is of the whole."""
    file_server.files["/model"] = ServedFile(DATA, ETAG)
    file_server.files["/model"].cuts = [400_000]
    with pytest.raises(DownloadFailed, match=r"broke off at 0\.4 MB: the answer broke off"):
        fetch(remote(file_server), partial, pauses=())
    assert partial.stat().st_size == 400_000
    assert fetch(remote(file_server), partial) == sha256(DATA)
    assert file_server.sent["/model"] == len(DATA)


@pytest.mark.parametrize(
    ("new", "whole"),
    [
        (ServedFile(OTHER, {"ETag": '"two"'}), True),
        (ServedFile(OTHER, {"ETag": '"two"'}, careless=True), True),
        (ServedFile(OTHER[:-5], {"ETag": '"two"'}), True),
        (ServedFile(OTHER[:1000], {"ETag": '"two"'}, careless=True), True),
        (ServedFile(DATA, ETAG, ranges=False), True),
        (ServedFile(DATA, ETAG), False),
    ],
    ids=["changed", "changed, If-Range ignored", "changed in length", "shorter", "without ranges", "the same"],
)
def test_a_file_that_changed_starts_anew(file_server: FileServer, partial: Path, new: ServedFile, whole: bool) -> None:
    """Also where the server knows no ranges, or ignores `If-Range`; never are halves of two files put together."""
    file_server.files["/model"] = ServedFile(DATA, ETAG, cuts=[len(DATA) // 2])
    with pytest.raises(DownloadFailed):
        fetch(remote(file_server), partial, pauses=())
    file_server.files["/model"], file_server.sent = new, {}
    assert fetch(remote(file_server), partial) == sha256(new.data)
    assert partial.read_bytes() == new.data
    if not new.careless:
        assert file_server.sent["/model"] == (len(new.data) if whole else len(DATA) // 2)


def test_without_a_validator_only_a_known_digest_resumes(file_server: FileServer, partial: Path) -> None:
    """Otherwise nothing could tell a changed file."""
    for digest, sent in (("", len(DATA)), (sha256(DATA), len(DATA) // 2)):
        file_server.files["/model"] = ServedFile(DATA, cuts=[len(DATA) // 2])
        with pytest.raises(DownloadFailed):
            fetch(remote(file_server, digest=digest), partial, pauses=())
        file_server.sent.clear()
        assert fetch(remote(file_server, digest=digest), partial) == sha256(DATA)
        assert file_server.sent["/model"] == sent
        partial.unlink()


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"[]",
        b"{",
        b'{"source": 1}',
        b"\xff",
        b"[" * 100_000,
        b'{"source":"x","size":1,"validator":"y","digest":""}',
    ],
)
def test_a_note_that_is_damaged_or_of_another_file_is_not_followed(
    file_server: FileServer, partial: Path, note: bytes
) -> None:
    """The download starts anew."""
    file_server.files["/model"] = ServedFile(DATA, ETAG)
    partial.write_bytes(OTHER[:1000])
    partial.with_name(f"{partial.name}.json").write_bytes(note)
    assert fetch(remote(file_server), partial) == sha256(DATA)


def test_the_note_holds_no_token_of_the_address(file_server: FileServer, partial: Path) -> None:
    """Only a digest of the address."""
    file_server.files["/model"] = ServedFile(DATA, ETAG, cuts=[1000])
    with pytest.raises(DownloadFailed) as failed:
        fetch(remote(file_server, "/model?token=secret"), partial, pauses=())
    note = partial.with_name(f"{partial.name}.json").read_text()
    assert "secret" not in note + str(failed.value)
    assert json.loads(note)["size"] == len(DATA)


def test_a_wrong_digest_is_told_and_the_file_deleted(file_server: FileServer, partial: Path) -> None:
    """SHA-256, and git's SHA-1 of small files; the next run starts anew."""
    file_server.files["/model"] = ServedFile(DATA, ETAG)
    for digest in (sha256(OTHER), "0" * 40):
        sentence = refusal(remote(file_server, digest=digest), partial)
        assert digest in sentence
        assert list(partial.parent.iterdir()) == []
    blob = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA, usedforsecurity=False).hexdigest()
    assert fetch(remote(file_server, digest=blob), partial) == sha256(DATA)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (ServedFile(b"<html>log in", {"Content-Type": "text/html; charset=utf-8"}), "web page and not a file"),
        (ServedFile(DATA, {"Content-Encoding": "gzip"}), "answered compressed"),
        (ServedFile(status=401), "status 401; it needs a login"),
        (ServedFile(status=403), "status 403; it needs a login"),
        (ServedFile(status=404), "status 404; there is no such file"),
        (ServedFile(status=418), "status 418"),
        (ServedFile(status=503), "broke off at 0.0 MB: the server answers with status 503"),
        (ServedFile(status=429), "status 429"),
        (ServedFile(DATA, size=len(DATA) + 9), "broke off at 1.0 MB"),
        (ServedFile(DATA, size=3 * 2**40), "2,199,023,255,552 at most"),
        (ServedFile(DATA, {"Content-Range": "bytes 5-9/10"}, status=206), "another part than was asked for"),
        (ServedFile(DATA, {"Content-Range": "nonsense"}, status=206), "another part than was asked for"),
        (ServedFile(status=302, headers={"Location": ""}), "redirects to nowhere"),
        (ServedFile(status=302, headers={"Location": "ftp://files.test/model"}), "is not an http or https address"),
        (ServedFile(status=302, headers={"Location": "/model"}), "redirects more than 8 times"),
    ],
    ids=lambda value: value.replace(" ", "-")[:24] if isinstance(value, str) else "",
)
def test_what_is_no_file_is_told_in_a_sentence(
    file_server: FileServer, partial: Path, file: ServedFile, told: str
) -> None:
    """Login pages, compressed answers, statuses, truncated and absurd ones, parts not asked for, loops."""
    file_server.files["/model"] = file
    assert told in refusal(remote(file_server), partial)


def test_more_bytes_than_are_listed_are_refused(file_server: FileServer, partial: Path) -> None:
    """By the length; and in chunks, where there is none, by the digest."""
    file_server.files["/model"] = ServedFile(DATA)
    assert "1,048,576 bytes, and 7 are listed" in refusal(remote(file_server, size=7), partial)


def test_a_full_disk_is_told_before_the_first_byte(file_server: FileServer, partial: Path) -> None:
    """The real free space of the real disk; nothing of the body was read into a file."""
    free = shutil.disk_usage(partial.parent).free
    file_server.files["/model"] = ServedFile(DATA, size=min(free + 10**9, 2 * 2**40))
    sentence = refusal(remote(file_server), partial)
    assert f"the disk of the folder {partial.parent.name} has" in sentence
    assert list(partial.parent.iterdir()) == []


def test_a_body_without_a_length_leaves_the_last_of_the_disk_to_others(
    file_server: FileServer, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not say how much comes: the free space is looked at while it comes."""
    file_server.files["/model"] = ServedFile(DATA, size=0)
    free = [10**12, MIN_FREE_BYTES + 100]
    monkeypatch.setattr(
        file_downloader.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free.pop(0) if free[1:] else free[0])
    )
    assert f"the disk of the folder {partial.parent.name} has" in refusal(remote(file_server), partial)
    assert not partial.exists() or partial.stat().st_size < len(DATA)


def test_a_disk_that_fills_meanwhile_is_told_and_resumed(
    file_server: FileServer, partial: Path, limit_of_files: Callable[[int], None]
) -> None:
    """The system refuses to write past a limit, as on a full disk; what is there is used afterwards."""
    file_server.files["/model"] = ServedFile(DATA, ETAG)
    limit_of_files(500_000)
    assert "cannot be written: File too large. The same command resumes it." in refusal(remote(file_server), partial)
    limit_of_files(-1)
    assert fetch(remote(file_server), partial) == sha256(DATA)
    assert any(sent.get("range") for _, sent in file_server.asked)


@pytest.fixture
def limit_of_files() -> Callable[[int], None]:
    """Set the largest size in bytes of the files that this process writes; -1: no limit."""
    import resource

    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:1/secret",
        "http://localhost/secret",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/model",
        "http://[::1]/model",
        "http://[::ffff:127.0.0.1]/model",
        "http://0.0.0.0/model",
        "http://metadata.internal.invalid/",
    ],
)
def test_a_redirect_to_a_private_address_is_refused(file_server: FileServer, partial: Path, location: str) -> None:
    """The address that was given may be private, as here; one that it leads to may not."""
    file_server.files["/model"] = ServedFile(status=302, headers={"Location": location})
    sentence = refusal(remote(file_server), partial)
    assert "The redirect from 127.0.0.1" in sentence or "does not lead to a public address" in sentence
    assert "FETCH_ALLOW" in sentence
    assert list(partial.parent.iterdir()) == []


def test_an_allowed_redirect_takes_no_credentials_along(file_server: FileServer, partial: Path) -> None:
    """FETCH_ALLOW opens it; the token of the first host is not sent to the second one."""
    with serve_files() as storage:
        storage.files["/blob"] = ServedFile(DATA, ETAG)
        location = f"{storage.url}/blob?Signature=x%2By&Expires=1"
        file_server.files["/model"] = ServedFile(status=302, headers={"Location": location})
        file = RemoteFile(f"{file_server.url}/model", "the file", {"Authorization": "Bearer hf_secret"})
        assert fetch(file, partial, storage.url.removeprefix("http://")) == sha256(DATA)
        assert file_server.asked[0][1]["authorization"] == "Bearer hf_secret"
        ((path, headers),) = storage.asked
        assert (path, "authorization" in headers) == ("/blob?Signature=x%2By&Expires=1", False)


def test_a_link_in_place_of_the_partial_file_is_not_followed(file_server: FileServer, partial: Path) -> None:
    """Somebody else's link would lead the download over another file."""
    victim = partial.with_name("victim")
    victim.write_text("mine")
    os.symlink(victim, partial)
    file_server.files["/model"] = ServedFile(DATA)
    assert "cannot be written" in refusal(remote(file_server), partial)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ('attachment; filename="juggernaut.safetensors"', "juggernaut.safetensors"),
        ("attachment; filename=plain.safetensors", "plain.safetensors"),
        ("attachment; filename*=UTF-8''gr%C3%BCn.safetensors; filename=x", "grün.safetensors"),
        ('attachment; filename="../../etc/cron.d/x.safetensors"', "x.safetensors"),
        ("attachment; filename*=UTF-8''..%2F..%2Fx.safetensors", "x.safetensors"),
        ('attachment; filename="..\\\\..\\\\x.safetensors"', "x.safetensors"),
        ('attachment; filename="C:\\\\x.safetensors"', "x.safetensors"),
        ('attachment; filename=".hidden.safetensors"', "hidden.safetensors"),
        ("attachment; filename*=UTF-8''a%0A%1B%5B2J%E2%80%AEb.safetensors", "a[2Jb.safetensors"),
        ('attachment; filename="a:b|c?.safetensors"', "a_b_c_.safetensors"),
        ('attachment; filename=".."', "model"),
        ("attachment", "model"),
        ("attachment; filename*=UTF-8''%00%00", "model"),
    ],
)
def test_the_servers_name_never_leaves_the_folder(file_server: FileServer, header: str, name: str) -> None:
    """`Content-Disposition` of CivitAI's kind, and of hostile servers; without one it is the address's last part."""
    file_server.files["/model"] = ServedFile(DATA, {"Content-Disposition": header})
    begun = asyncio.run(FileDownloader().look(remote(file_server), lambda data: 1))
    assert (begun.name, begun.size, begun.data[:1]) == (name, len(DATA), DATA[:1])


def test_a_long_name_keeps_its_ending() -> None:
    """And fits into what file systems take."""
    name = safe_name("ü" * 5000 + ".safetensors")
    assert name.endswith("ü.safetensors")
    assert MAX_NAME_BYTES - 2 < len(name.encode()) <= MAX_NAME_BYTES
    assert safe_name("x." + "y" * 5000) == ""


@pytest.mark.parametrize("ranges", [True, False])
def test_only_the_beginning_is_read_to_know_a_file(file_server: FileServer, ranges: bool) -> None:
    """As many bytes as are needed, in as many requests; without ranges the connection is ended early."""
    file_server.files["/model"] = ServedFile(DATA, ranges=ranges)

    def needed(data: bytes) -> int:
        return 1000 if len(data) < 1000 else 5000

    begun = asyncio.run(FileDownloader().look(remote(file_server), needed))
    assert len(begun.data) >= 5000
    assert begun.data == DATA[: len(begun.data)]
    assert begun.size == len(DATA)
    assert not ranges or file_server.sent["/model"] == 5000
