"""A small Hugging Face hub on 127.0.0.1 for `huggingface_hub`: repositories, commits, gated access, ranges, aborts."""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest


@dataclass
class HubServer:
    """Its content and its requests: `repositories` maps names to files, those of `main` at `commits`.

    Repositories in `gated` need a token; the first response for a name in `cut` is aborted in the middle, and the one
    for a name in `held` stays there until the client ends. `sent` counts the bytes of bodies by the last part of the
    path. Tokens in `refused` are no tokens; with `storage`, weights are elsewhere, as on the real hub. `old` has the
    files of former commits.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    sent: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    storage: str = ""
    old: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def add(self, repo: str, folder: Path, *, mark: str = "") -> None:
        """Add a folder's files; safetensors files get `mark` in their names."""
        self.repositories[repo] = {
            file.relative_to(folder).as_posix().replace(".safetensors", f"{mark}.safetensors"): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    def commit(self, repo: str) -> str:
        """The commit of `main`: it changes with the files."""
        parts = [name.encode() + data for name, data in sorted(self.repositories[repo].items())]
        return hashlib.sha1(b"\0".join(parts), usedforsecurity=False).hexdigest()


def answer(hub: HubServer, method: str, path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one response."""
    parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(path).path.strip("/").split("/")]
    repo = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
    files = hub.repositories.get(repo)
    if headers.get("Authorization", "").removeprefix("Bearer ") in hub.refused:
        return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
    if files is None:
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
    revision = next(
        (parts[n + 1] for n, part in enumerate(parts[:-1]) if part in ("revision", "resolve", "tree")), "main"
    )
    commit = revision if revision in hub.old else hub.commit(repo)
    files = hub.old.get(revision, files)
    if revision not in ("main", commit):
        return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"}, b""
    if parts[:2] == ["api", "models"]:
        listed = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": blob_id(data),
                "type": "file",
                "path": name,
                "oid": blob_id(data),
                **({"lfs": {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}} if sha256 else {}),
            }
            for name, data in files.items()
            for sha256 in (lfs_digest(name, data),)
        ]
        if "tree" in parts:
            return 200, {}, json.dumps(listed).encode()
        info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": listed, "tags": []}
        return 200, {}, json.dumps(info).encode()
    if repo in hub.gated and not headers.get("Authorization"):
        message = f"Access to model {repo} is restricted."
        return 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message}, b""
    data = files.get("/".join(parts[4:]))
    if data is None:
        return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
    etag = lfs_digest(parts[-1], data) or blob_id(data)
    given = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    given |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"'}
    if hub.storage and lfs_digest(parts[-1], data):
        return 302, {"Location": f"{hub.storage}/{etag}?Signature=secret"}, b""
    if not headers.get("Range") or method != "GET":
        return 200, given, data
    start, _, end = headers["Range"].removeprefix("bytes=").partition("-")
    part = data[int(start) : int(end) + 1 if end else None]
    given["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
    return 206, given, part


def blob_id(data: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_digest(name: str, data: bytes) -> str:
    """The SHA-256 of a file that the hub keeps outside of git; empty for others."""
    return hashlib.sha256(data).hexdigest() if name.endswith((".safetensors", ".gguf")) else ""


@contextmanager
def serve(hub: HubServer) -> Iterator[HubServer]:
    """Listen on a free port of 127.0.0.1 until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Keep the console clean."""

        def do_GET(self) -> None:
            if self.command == "GET":
                hub.asked.append(self.path)
            status, headers, body = answer(hub, self.command, self.path, self.headers)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            name = self.path.rsplit("/", 1)[-1]
            resolved = "/resolve/" in self.path
            if name in hub.cut and status == 200 and resolved:
                hub.cut.discard(name)
                body, self.close_connection = body[: len(body) // 2], True
            holds = name in hub.held and status == 200 and resolved
            if holds:
                body = body[: len(body) // 2]
            with suppress(ConnectionError):
                self.wfile.write(body)
            hub.sent[name] = hub.sent.get(name, 0) + len(body)
            if holds:
                self.connection.recv(1)  # returns when the client's end is closed
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815  # the name http.server looks for

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process's client uses, with an empty cache and no token."""
    with serve(HubServer()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield hub
