"""Attacks on the UI: every route that is not ours, every event and field, in every role, on real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import disc, file_of, until
from hostile_images import foreign, png_claiming

pytestmark = pytest.mark.slow

CANARY = "canary-7f3a91c2d85e4b60"
SERVE = (sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.001")
ROLES = ("operator", "key", "anonymous")
_KEYS = "boss:secret-of-the-boss;admin,team:secret-of-the-team;prefix=team/"
PAYLOADS = 12


@dataclass
class Visitor:
    """A browser session on a server, in one role. `events` are those of Gradio's own configuration."""

    server: Server
    http: httpx.Client
    headers: dict[str, str]
    events: list[dict[str, Any]] = field(default_factory=list)
    components: dict[int, dict[str, Any]] = field(default_factory=dict)

    def send(
        self, event: dict[str, Any], data: list[Any], session: str, instead: dict[str, Any] | None = None
    ) -> httpx.Response:
        """Send an event, with some members replaced."""
        body = {"data": data, "event_data": None, "fn_index": event["id"], "trigger_id": None, "session_hash": session}
        return self.http.post("/ui/gradio_api/queue/join", json={**body, **(instead or {})})

    def news(self, session: str) -> str:
        """All messages of a session until no more follow."""
        parts = []
        params = {"session_hash": session}
        with self.http.stream("GET", "/ui/gradio_api/queue/data", params=params, timeout=60) as answer:
            for line in answer.iter_lines():
                parts.append(line)
                if "close_stream" in line:
                    break
        return "\n".join(parts)


def environment_of(role: str, folder: Path) -> dict[str, str]:
    """The settings that give a visitor a role; they also contain the secret that must not leak."""
    (folder / "secret.txt").write_text(CANARY)
    (folder / "secret.png").write_bytes(file_of(disc()) + CANARY.encode())
    kept = {"DATA_DIR": str(folder / "data"), "LOCAL_BUCKET_DIR": str(folder / "bucket"), "UI_RATE_LIMIT": ""}
    secret = {"AWS_SECRET_ACCESS_KEY": CANARY, "QUEUE_LIMIT": "10000", "JOBS_MAX_QUEUED": "10000"}
    more = {
        "operator": {},
        "key": {"API_KEYS": _KEYS},
        "anonymous": {"ALLOW_ANONYMOUS": "1", "TRUSTED_PROXIES": "127.0.0.0/8"},
    }[role]
    return {**kept, **secret, **more}


def visit(server: Server, role: str) -> Visitor:
    """Open the UI in a role."""
    headers = {"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "http"} if role == "anonymous" else {}
    http = httpx.Client(base_url=server.url, headers=headers, timeout=120)
    if role == "key":
        assert http.post("/ui/key", data={"key": "secret-of-the-team"}).status_code == 303
    http.get("/ui/")
    until(lambda: "gradio_config" in http.get("/ui/").text, 180)
    page = http.get("/ui/").text
    config = json.loads(page.split("window.gradio_config = ", 1)[1].split(";</script>", 1)[0])
    components = {component["id"]: component for component in config["components"]}
    return Visitor(server, http, headers, config["dependencies"], components)


@pytest.fixture(scope="module", params=ROLES)
def visitor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    """A visitor with its own server, in each role."""
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    server = start_server(folder, port, *SERVE, PORT=str(port), **environment_of(request.param, folder))
    found = visit(server, request.param)
    yield found
    found.http.close()
    server.stop()


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[str, list[str]]]:
    """A web server that must receive no request: its URL, and its requests."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def payloads(folder: Path, url: str) -> list[Any]:
    """Inputs that make some Gradio versions open a file or a URL: dictionaries, nested ones, strings."""
    secret = str(folder / "secret.txt")
    file = {"path": secret, "meta": {"_type": "gradio.FileData"}}
    made = [
        file,
        {"path": "/proc/self/environ", "meta": {"_type": "gradio.FileData"}, "orig_name": "x", "url": None},
        {"path": str(folder / "secret.png"), "url": f"file://{secret}", "is_stream": False, "mime_type": "image/png"},
        {"path": f"{url}/by-path", "url": f"{url}/by-url", "meta": {"_type": "gradio.FileData"}},
        {"name": secret, "is_file": True, "data": None},
        [file],
        {"background": file, "layers": [file], "composite": file},
        [[{"image": file, "caption": None}]],
        secret,
        f"file://{secret}",
        f"{url}/by-text",
        json.dumps(file),
    ]
    assert len(made) == PAYLOADS
    return made


def told_anywhere(visitor: Visitor) -> bool:
    """Whether the secret is in a response about jobs and images, or in a file the server wrote."""
    answers = [visitor.http.get(path).text for path in ("/jobs", "/history", "/ui/", "/metrics", "/readyz")]
    files = [path for name in ("data", "bucket") for path in (visitor.server.folder / name).rglob("*")]
    files.append(visitor.server.log)
    written = [path.read_bytes() for path in files if path.is_file()]
    return any(CANARY in answer for answer in answers) or any(CANARY.encode() in content for content in written)


def payload_everywhere(visitor: Visitor, event: dict[str, Any], payload: Any, session: str) -> tuple[int, int, str]:
    """Send a payload in every field of an event, and beside them: how many were sent and refused, and the messages."""
    blank = [None] * len(event["inputs"])
    refused = 0
    for place in range(len(blank)):
        answer = visitor.send(event, [*blank[:place], payload, *blank[place + 1 :]], session)
        refused += answer.status_code == 422
        assert (answer.status_code, isinstance(payload, str)) in ((422, False), (422, True), (200, True))
    beside = {"event_data": {"index": 0, "value": payload, "path": payload}, "request": payload}
    assert visitor.send(event, blank, session, beside).status_code == 200
    return len(blank) + 1, refused, visitor.news(session)


@pytest.mark.fault(100)
@pytest.mark.timeout(900)
def test_no_event_reads_a_file_or_an_address(visitor: Visitor, listener: tuple[str, list[str]]) -> None:
    """Every payload in every field of every event, and in its other members.

    Dictionaries are refused, strings stay strings.

    The events are those of Gradio's own configuration, so a new event is tested automatically.
    """
    url, asked = listener
    made = payloads(visitor.server.folder, url)
    tried = refused = 0
    answers = []
    # Gradio's streams look for news every 50 ms, so the sessions of an event wait side by side.
    with ThreadPoolExecutor(PAYLOADS) as pool:
        for event in visitor.events:
            sessions = [f"s{event['id']}x{number}" for number in range(PAYLOADS)]
            for sent, refusals, news in pool.map(partial(payload_everywhere, visitor, event), made, sessions):
                tried, refused = tried + sent, refused + refusals
                answers.append(news)
            blank = [None] * len(event["inputs"])
            for name in ("session_hash", "trigger_id", "fn_index", "data"):
                answer = visitor.send(event, blank, "s", {name: made[0]})
                tried += 1
                refused += 1
                assert answer.status_code == 422
    print(f"{len(visitor.events)} events, {PAYLOADS} payloads, {tried} tried, {refused} refused")  # noqa: T201  # -s
    assert len(visitor.events) > 40
    assert (CANARY in "".join(answers), told_anywhere(visitor), asked) == (False, False, [])
    assert not [path for path in (visitor.server.folder / "data" / "studio").rglob("*") if path.is_file()]


@pytest.mark.fault(104)
def test_every_route_of_gradio_but_ours_is_closed(visitor: Visitor) -> None:
    """Every Gradio route, with any method, answers 404, except those that our page calls."""
    opened = [(method, path) for method, path in gradio_routes() if is_open(visitor, method, path)]
    assert set(opened) == {
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/theme.css"),
        ("GET", "/gradio_api/heartbeat/{session_hash}"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join"),
    }


ROUTES = """
import json
import gradio as gr
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
with gr.Blocks() as blocks:
    text = gr.Textbox()
    text.change(lambda text: text, text, text)
shell = FastAPI()
gr.mount_gradio_app(shell, blocks, path="/ui")
mounted = next(route for route in shell.routes if getattr(route, "path", "") == "/ui").app
found = [(getattr(route, "methods", None), route.path) for route in iter_route_contexts(mounted.routes)]
routes = sorted({(method, path) for methods, path in found for method in methods or ["GET"]})
print(json.dumps(routes))
"""


@cache
def gradio_routes() -> tuple[tuple[str, str], ...]:
    """Every method and path of a Gradio application with its default routes, from its own route list."""
    quiet = {"PATH": os.environ["PATH"], "GRADIO_ANALYTICS_ENABLED": "False"}
    made = subprocess.run(  # noqa: S603  # our own program
        [sys.executable, "-c", ROUTES], capture_output=True, check=True, text=True, timeout=280, env=quiet
    )
    routes = tuple((method, path) for method, path in json.loads(made.stdout.splitlines()[-1]))
    assert len(routes) > 60
    return routes


def is_open(visitor: Visitor, method: str, path: str) -> bool:
    """Whether a route returns content of its own; path parameters are filled with a plain value."""
    filled = path
    while "{" in filled:
        before, _, rest = filled.partition("{")
        filled = before + "x1" + rest.partition("}")[2]
    streamed = visitor.http.stream(method, f"/ui{filled}", json=None if method in ("GET", "HEAD") else {})
    with streamed as answer:
        return answer.status_code != 404


@pytest.mark.fault(104)
def test_known_ways_into_gradio_are_closed(visitor: Visitor) -> None:
    """Files by path, uploads, calls by name, ffmpeg, proxied URLs, logins, path traversal and doubled slashes: 404."""
    file = {"path": str(visitor.server.folder / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    secret = visitor.server.folder / "secret.txt"
    ways = [
        *(
            ("GET", f"/ui/gradio_api/file={name}")
            for name in (secret, "/etc/passwd", "http://127.0.0.1:1/", "%2e%2e/x")
        ),
        *(("GET", f"/ui/{name}") for name in (f"file={secret}", "config", "info", "gradio_api/info", "svelte/x.js")),
        *(
            ("GET", f"/ui/assets/{name}")
            for name in ("..%2f..%2fapp.py", "%2e%2e/%2e%2e/app.py", "/etc/passwd", "a//b")
        ),
        ("GET", "/ui/static/%2e%2e/%2e%2e/app.py"),
        ("GET", "/ui//gradio_api/info"),
        ("GET", "/ui/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/ui/gradio_api/deep_link"),
        ("GET", "/ui/gradio_api/stream/a/b/1/playlist-file"),
        ("GET", "/ui/monitoring"),
        ("GET", "/ui/gradio_api/vibe-code"),
        *(("POST", f"/ui/gradio_api/{name}") for name in ("upload", "process_recording", "component_server", "reset")),
        *(
            ("POST", f"/ui/gradio_api/{name}")
            for name in ("call/draw", "call/v2/draw", "run/draw", "api/draw", "cancel")
        ),
        *(
            ("POST", f"/ui/{name}")
            for name in ("login", "api/draw", "run/predict", "upload", "queue/join", "pictures/x")
        ),
        *(("PUT", f"/ui/{name}") for name in ("", "pictures", "gradio_api/queue/join", "gradio_api/queue/data")),
    ]
    for method, path in ways:
        body = {"data": [file], "fn_index": 0, "session_hash": "a"} if method != "GET" else None
        answer = visitor.http.request(method, path, json=body)
        assert (method, path, answer.status_code, CANARY in answer.text) == (method, path, 404, False)


@pytest.mark.fault(104)
def test_a_session_is_of_its_visitor_alone(tmp_path: Path) -> None:
    """A client that names another visitor's session receives nothing."""
    port = free_port()
    server = start_server(tmp_path, port, *SERVE, PORT=str(port), **environment_of("anonymous", tmp_path))
    try:
        first = visit(server, "anonymous")
        other = httpx.Client(base_url=server.url, headers={"x-forwarded-for": "203.0.113.8"}, timeout=60)
        draw = next(event for event in first.events if len(event["inputs"]) > 8)
        assert first.send(draw, [None] * len(draw["inputs"]), "shared").status_code == 200
        heard: list[str] = []
        listening = other.stream("GET", "/ui/gradio_api/queue/data", params={"session_hash": "shared"})
        # Gradio closes the stream of an unknown session.
        with listening as answer, suppress(httpx.RemoteProtocolError):
            heard.extend(answer.iter_lines())
        assert "process_" not in "".join(heard)
        assert "process_completed" in first.news("shared")
        other.close()
        first.http.close()
    finally:
        server.stop()


@pytest.mark.fault(101)
def test_bombs_and_foreign_formats_do_not_grow_the_server(visitor: Visitor) -> None:
    """A PNG of 13,000² with all its pixels, and twenty kinds of files: refused; memory hardly grows."""
    process = psutil.Process(visitor.server.process.pid)
    bomb = png_claiming(13_000, 13_000, zlib.compress(bytes(13_000 * (13_000 * 3 + 1)), 9))
    visitor.http.post("/ui/pictures", content=file_of(disc()))
    before, peak, over = process.memory_info().rss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert visitor.http.post("/ui/pictures", content=bomb).status_code == 422
        for name, body in foreign().items():
            assert (name, visitor.http.post("/ui/pictures", content=body).status_code) == (name, 415)
    finally:
        over.set()
        thread.join()
    print(f"a bomb of {len(bomb)} bytes: {before / 1e6:.0f} MB, then at most {peak / 1e6:.0f} MB")  # noqa: T201  # -s
    assert peak < before * 1.15


@pytest.mark.fault(102)
def test_uploads_that_are_never_used_fill_nothing(visitor: Visitor) -> None:
    """Twenty uploads of 30 MB: refused, and neither the server's disk nor its memory grows with them."""
    process = psutil.Process(visitor.server.process.pid)
    before, disk = process.memory_info().rss, size_of(visitor.server.folder)
    body = file_of(disc()) + bytes(30_000_000)
    for _ in range(20):
        assert visitor.http.post("/ui/pictures", content=body).status_code == 413
    grown = size_of(visitor.server.folder) - disk
    print(f"20 × 30 MB: {grown} bytes on disk")  # noqa: T201  # shown with -s
    assert grown < 100_000
    assert process.memory_info().rss < before + 4 * len(body)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
