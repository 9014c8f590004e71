"""The server as users start it: real processes, real sockets, trained weights, images that match their prompts."""

from __future__ import annotations

import io
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
NATIVE = {"width": 128, "height": 128}
RGB = {
    "red": (215, 40, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 210),
    "yellow": (245, 215, 50),
    "orange": (245, 140, 30),
    "purple": (130, 50, 165),
    "white": (245, 245, 245),
    "black": (20, 20, 22),
}


def nearest_colour(rgb: NDArray[np.float64]) -> str:
    return min(RGB, key=lambda name: float(((np.array(RGB[name]) - rgb) ** 2).sum()))


def colours_of(content: bytes) -> tuple[str, str]:
    """Median colours in the middle and along the edge of an image."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)
    height, width = pixels.shape[:2]
    middle = pixels[height * 9 // 20 : height * 11 // 20, width * 9 // 20 : width * 11 // 20].reshape(-1, 3)
    edge = pixels[: height // 16].reshape(-1, 3)
    return nearest_colour(np.median(middle, 0)), nearest_colour(np.median(edge, 0))


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_the_first_minute_of_a_new_user(server: Server) -> None:
    """The seed's curl: 200 with a path; the path is a WebP of the requested size, red on blue.

    Again: cached, same path.
    """
    asked = {"prompt": "a red circle on a blue background", "save_path": "demo/first.webp"}
    first = httpx.get(f"{server.url}{CREATE}", params=asked, timeout=120)
    assert first.status_code == 200, first.text
    picture = httpx.get(first.json()["path"])
    assert picture.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(picture.content)).size == (1024, 1024)
    assert colours_of(picture.content) == ("red", "blue")
    again = httpx.get(f"{server.url}{CREATE}", params=asked).json()
    assert (again["cached"], again["path"]) == (True, first.json()["path"])


@pytest.mark.parametrize("model", ["sdxl", "flux"])
@pytest.mark.parametrize(
    ("thing", "colour", "background"),
    [
        ("circle", "red", "blue"),
        ("square", "green", "yellow"),
        ("circle", "yellow", "black"),
        ("hexagon", "blue", "white"),
        ("square", "orange", "purple"),
        ("circle", "white", "green"),
    ],
)
def test_the_picture_shows_the_colours_of_its_prompt(
    server: Server, model: str, thing: str, colour: str, background: str
) -> None:
    """Both families follow the prompt: its colour in the middle, its background along the edge."""
    prompt = f"a {colour} {thing} on a {background} background"
    answer = httpx.get(f"{server.url}/make_image", params={"prompt": prompt, "model": model, **NATIVE}, timeout=120)
    assert colours_of(answer.content) == (colour, background)


@pytest.mark.fault(60)
def test_a_hundred_identical_requests_at_once_are_one_generation(server: Server) -> None:
    """Counted by the engine: one image generated, a hundred equal responses."""
    before = metric(server, 'sds_jobs_total{outcome="done"}')
    asked = {"prompt": "a purple heart on a white background", "num_inference_steps": 8, **NATIVE}
    with ThreadPoolExecutor(100) as pool:
        answers = list(
            pool.map(lambda _: httpx.get(f"{server.url}{CREATE}", params=asked, timeout=120).json(), range(100))
        )
    assert metric(server, 'sds_jobs_total{outcome="done"}') - before == 1
    assert len({(answer["path"], answer["seed"]) for answer in answers}) == 1
    assert sum(not (answer["coalesced"] or answer["cached"]) for answer in answers) == 1


def test_sixteen_different_requests_at_once_each_get_their_own_picture(server: Server) -> None:
    """No cross-talk with trained weights and real batches, and the process answers health checks meanwhile."""
    wanted = [(c, b) for c in ("red", "green", "yellow", "white") for b in ("blue", "black", "purple", "orange")]

    def ask(colours: tuple[str, str]) -> tuple[str, str]:
        prompt = f"a large {colours[0]} square on a {colours[1]} background"
        asked = {"prompt": prompt, "model": "sdxl", "seed": 11, **NATIVE}
        return colours_of(httpx.get(f"{server.url}/make_image", params=asked, timeout=120).content)

    stop, healthy = threading.Event(), list[int]()

    def watch() -> None:
        with httpx.Client(timeout=10) as client:
            while not stop.wait(0.01):
                healthy.append(client.get(f"{server.url}/healthz").status_code)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(16) as pool:
        drawn = list(pool.map(ask, wanted))
    stop.set()
    watcher.join()
    assert drawn == wanted
    assert healthy
    assert set(healthy) == {200}


@pytest.mark.fault(64)
def test_a_picture_drawn_alone_is_the_same_before_and_after_a_crowd(server: Server) -> None:
    """The short form of the soak test.

    A fixed request, thirty others of every size and model at once, the request again.
    """

    def probe(model: str) -> bytes:
        asked = {"prompt": "a red circle on a blue background", "seed": 7, "model": model, "format": "png"}
        drawn = httpx.get(f"{server.url}{CREATE}", params={**asked, "overwrite": True, **NATIVE}, timeout=120)
        return np.asarray(Image.open(io.BytesIO(httpx.get(drawn.json()["path"]).content))).tobytes()

    def other(n: int) -> int:
        asked = {"prompt": f"a green star {n}", "model": ("sdxl", "flux")[n % 2], "num_inference_steps": 2 + n % 4}
        size = {"width": 64 + 32 * (n % 5), "height": 64 + 32 * (n % 3)}
        return httpx.get(f"{server.url}{CREATE}", params={**asked, **size}, timeout=120).status_code

    before = [probe(model) for model in ("sdxl", "flux")]
    with ThreadPoolExecutor(30) as pool:
        assert set(pool.map(other, range(30))) == {200}
    assert [probe(model) for model in ("sdxl", "flux")] == before


def test_a_client_that_hangs_up_frees_the_device(server: Server) -> None:
    """A hundred steps are cancelled when no client waits."""
    before = metric(server, 'sds_jobs_total{outcome="cancelled"}')
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        query = "prompt=a+slow+star&num_inference_steps=100&width=128&height=128&seed=random"
        connection.sendall(f"GET {CREATE}?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        until(lambda: metric(server, "sds_queue_running") == 1)
    until(lambda: metric(server, 'sds_jobs_total{outcome="cancelled"}') == before + 1)
    until(lambda: metric(server, "sds_queue_running") == 0)


def raw(server: Server, request: bytes) -> bytes:
    """The response to bytes that no valid client would send."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("up", ["..", "%2e%2e", ".%2e", "..%2f.."])
def test_no_path_leads_out_of_the_bucket(server: Server, up: str) -> None:
    """Sent as raw bytes, since clients normalise such paths; the target exists, and must not be served."""
    (server.folder / "bucket" / "secret.webp").write_text("secret")
    (server.folder / "secret.webp").write_text("secret")
    for path in (f"/files/{up}/secret.webp", f"/files/static/{up}/{up}/secret.webp", f"/files/{up}%2fsecret.webp"):
        answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404")
        assert not answer.endswith(b"secret")


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(server: Server) -> None:
    """It is not a server error, and the log has none."""
    errors = server.log.read_text().count("unexpected error")
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        head = f"POST {CREATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        connection.sendall(f'{head}\r\n{{"prompt":'.encode())
    until(lambda: '"status": 499' in server.log.read_text())
    assert server.log.read_text().count("unexpected error") == errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_although_clients_wait(tmp_path: Path, number: signal.Signals) -> None:
    """The running request finishes or is cancelled in time, waiting ones get a retryable error.

    And the process ends.
    """
    port = free_port()
    command = (sys.executable, "-m", "stable_diffusion_server", "serve")
    doomed = start_server(tmp_path, port, *command, PORT=str(port), MAX_BATCH="1", CPU_THREADS="1")

    def ask(n: int) -> int:
        asked = {"prompt": "a star", "seed": n, "num_inference_steps": 100, **NATIVE}
        return httpx.get(f"{doomed.url}{CREATE}", params=asked, timeout=120).status_code

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, n) for n in range(6)]
        until(lambda: metric(doomed, "sds_queue_waiting") >= 4)
        doomed.stop(number)
        reported = sorted(answer.result() for answer in answers)
    assert set(reported) == {200, 503}
    assert reported.count(503) >= 3


def test_a_request_without_a_host_is_refused(server: Server) -> None:
    """HTTP/1.0 needs no Host header; this server does."""
    assert b" 421 " in raw(server, b"GET /healthz HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize("name", ["a%2Fb.webp", "a%252Fb.webp", "two words+plus.webp", "猫/%00.webp"])
def test_a_percent_sign_in_a_name_survives_the_way_there_and_back(server: Server, name: str) -> None:
    """Encoded once in the URL and never in the key, over real HTTP."""
    asked = {"prompt": "a red circle on a blue background", "save_path": name, **NATIVE}
    receipt = httpx.get(f"{server.url}{CREATE}", params=asked, timeout=120).json()
    assert receipt["key"] == f"static/uploads/{name}"
    assert httpx.get(receipt["path"]).status_code == 200


def test_uvicorn_main_app_works_as_the_seed_says(tmp_path: Path) -> None:
    """`uvicorn main:app --port …` with the seed's flags: ready, generates, and its URLs have the real port."""
    port = free_port()
    command = (sys.executable, "-m", "uvicorn", "main:app", "--port", str(port), "--timeout-keep-alive", "600")
    seed_server = start_server(tmp_path, port, *command, "--workers", "1", "--limit-concurrency", "4")
    try:
        asked = {"prompt": "test", "save_path": "test.webp", **NATIVE}
        receipt = httpx.get(f"http://localhost:{port}{CREATE}", params=asked, timeout=120).json()
        assert receipt["path"] == f"http://localhost:{port}/files/static/uploads/test.webp"
        assert (tmp_path / "bucket" / "objects" / "static" / "uploads" / "test.webp").is_file()
        assert "prompt=test" not in seed_server.log.read_text(), "prompts stay out of the access log"
    finally:
        assert seed_server.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("command", [["-m", "stable_diffusion_server", "serve"], ["-m", "uvicorn", "main:app"]])
def test_a_wrong_setting_stops_the_start_in_one_sentence(tmp_path: Path, command: list[str]) -> None:
    """No stack trace: one line that names the setting, and a failing exit status."""
    done = subprocess.run(  # noqa: S603  # our own interpreter and program
        [sys.executable, *command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "QUEUE_LIMIT": "many", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("QUEUE_LIMIT ")


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_flux_schnell_draws_a_file(tmp_path: Path, ending: str) -> None:
    """The smallest example: one prompt, one file of the requested size with the prompt's colours, and no warnings."""
    out = tmp_path / f"out.{ending}"
    command = [sys.executable, str(ROOT / "flux_schnell.py"), "a green square on a yellow background"]
    command += ["--out", str(out), "--steps", "4", "--seed", "1", "--size", "192x128"]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True, text=True)  # noqa: S603  # our own program
    assert (done.stdout, done.stderr) == (f"{out}\n", "")
    assert Image.open(io.BytesIO(out.read_bytes())).size == (192, 128)
    assert colours_of(out.read_bytes()) == ("green", "yellow")


@pytest.mark.parametrize("wrong", [["--size", "10x10"], ["--size", "big"], ["--steps", "0"], ["--out", "a.gif"], [" "]])
def test_flux_schnell_says_what_is_wrong(tmp_path: Path, wrong: list[str]) -> None:
    """A usage line and exit status 2, no stack trace."""
    command = [sys.executable, str(ROOT / "flux_schnell.py"), *wrong]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603  # our own program
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / ".venv" / ".run").exists(), reason="make run would install; CI runs it with .venv")
def test_make_run_prints_what_to_do_next(tmp_path: Path) -> None:
    """PORT works, the welcome text appears when the server is ready, and its curl command works."""
    port = free_port()
    places = {"LOCAL_BUCKET_DIR": str(tmp_path / "bucket"), "DATA_DIR": str(tmp_path / "data")}
    made = start_server(tmp_path, port, "make", "-C", str(ROOT), "run", PORT=str(port), **places)
    try:
        until(lambda: "curl" in made.log.read_text())
        welcome = made.log.read_text()
        curl = re.search(r'curl "([^"]+)"', welcome)
        picture = re.search(r"then look at +(\S+)", welcome)
        assert curl
        assert picture
        assert f"http://localhost:{port}/docs" in welcome
        assert httpx.get(curl[1], timeout=120).json()["cached"] is False
        assert httpx.get(picture[1]).headers["content-type"] == "image/webp"
    finally:
        made.stop(signal.SIGINT)


def test_a_busy_port_is_reported_and_ends_the_start(server: Server, tmp_path: Path) -> None:
    """A second server on the same port exits with one sentence, before it loads anything."""
    done = subprocess.run(
        [sys.executable, "-m", "stable_diffusion_server", "serve"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PORT": server.url.rsplit(":", 1)[1], "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    port = server.url.rsplit(":", 1)[1]
    assert done.stderr == f"HOST 127.0.0.1, PORT {port} cannot be listened on (Address already in use).\n"
