"""{queued, running, encoding} × {disconnect, DELETE, deadline}.

The slot is free within a step, identical requests continue.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import free_port
from fakes import FakeDenoiser, settings_in, until

from stable_diffusion_server.app import create_app
from stable_diffusion_server.generation import output

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
STEPS = 6
ORDER = {"width": 64, "height": 64, "num_inference_steps": STEPS, "seed": 1}
VICTIM = {**ORDER, "prompt": "a red square", "save_path": "victim.webp"}
STAGES, ENDINGS = ("queued", "running", "encoding"), ("client gone", "DELETE", "deadline")


class Studio:
    """A server that generates one image at a time and can be held before a step and before encoding."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.painter = FakeDenoiser(gate=threading.Event())
        self.encoding, self.may_encode = threading.Event(), threading.Event()
        encode = output.encode_image

        def held(pixels: Any, *more: Any) -> bytes:
            self.encoding.set()
            assert self.may_encode.wait(30)
            return encode(pixels, *more)

        # Patched, because that moment is too short to hit from outside.
        monkeypatch.setattr(output, "encode_image", held)
        self.port = free_port()
        app = create_app(settings_in(folder, max_batch=1, port=self.port), load=lambda settings: self.painter)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.pool = ThreadPoolExecutor(4)
        until(lambda: self.server.started)
        until(lambda: self.client.get("/readyz").status_code == 200)

    def let_go(self) -> None:
        assert self.painter.gate is not None
        self.painter.gate.set()
        self.may_encode.set()

    def close(self) -> None:
        self.let_go()
        self.server.should_exit = True
        self.thread.join()
        self.pool.shutdown()
        self.client.close()

    def asks(self, asked: dict[str, Any], headers: dict[str, str] | None = None) -> Future[httpx.Response]:
        return self.pool.submit(self.client.post, CREATE, json=asked, headers=headers)

    def figure(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)

    def steps_of(self, prompt: str) -> int:
        return sum(batch.count(prompt) for batch in self.painter.batches)

    def stored(self, name: str) -> bool:
        return self.client.get(f"/files/static/uploads/{name}").status_code == 200


class Victim:
    """A request that is ended in one of three ways."""

    def __init__(self, studio: Studio, ending: str) -> None:
        self.studio = studio
        self.ending = ending
        if ending == "client gone":
            body = json.dumps(VICTIM).encode()
            self.line = socket.create_connection(("127.0.0.1", studio.port))
            head = f"POST {CREATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            self.line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        elif ending == "DELETE":
            self.job_id = studio.asks(VICTIM, {"Prefer": "respond-async"}).result().json()["id"]
        else:
            self.answer = studio.asks({**VICTIM, "timeout": 1.0})

    def end(self) -> None:
        if self.ending == "client gone":
            self.line.close()
            time.sleep(0.2)  # for the server to notice; a disconnected client gets no response
        elif self.ending == "DELETE":
            assert self.studio.client.delete(f"/jobs/{self.job_id}").json()["state"] == "cancelled"
        else:
            assert self.answer.result().status_code == 504


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    """A server on a port."""
    opened = Studio(tmp_path, monkeypatch)
    yield opened
    opened.close()


def bring_to(studio: Studio, stage: str, ending: str) -> Victim:
    """Bring a request to that stage and hold it there."""
    if stage == "queued":
        studio.asks({**ORDER, "prompt": "a blue square before it"})
        until(lambda: len(studio.painter.batches) == 1)
        victim = Victim(studio, ending)
        until(lambda: studio.figure("sds_queue_waiting") == 1)
        return victim
    victim = Victim(studio, ending)
    until(lambda: len(studio.painter.batches) == 1)
    if stage == "encoding":
        assert studio.painter.gate is not None
        studio.painter.gate.set()
        assert studio.encoding.wait(20)
    return victim


@pytest.mark.fault(62)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_order_that_is_ended_frees_its_place_within_a_step(studio: Studio, stage: str, ending: str) -> None:
    """It is not generated further and not stored, and the next request succeeds."""
    victim = bring_to(studio, stage, ending)
    before = studio.steps_of("a red square")
    victim.end()
    next_one = studio.asks({**ORDER, "prompt": "a green square after it"})
    if stage == "encoding":
        until(lambda: any("green" in job.prompt for job in studio.painter.finished))
    studio.let_go()
    assert next_one.result().status_code == 200
    assert studio.steps_of("a red square") <= before + 1
    assert before == {"queued": 0, "running": 1, "encoding": STEPS}[stage]
    assert not studio.stored("victim.webp")
    assert (studio.figure("sds_queue_waiting"), studio.figure("sds_queue_running")) == (0, 0)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_twin_of_an_order_that_is_ended_gets_its_picture(studio: Studio, stage: str, ending: str) -> None:
    """Other waiters for the same image are not cancelled, and it is generated once."""
    victim = bring_to(studio, stage, ending)
    twin = studio.asks(VICTIM)
    time.sleep(0.2)  # joining is visible only in the response
    victim.end()
    studio.let_go()
    answer = twin.result()
    assert answer.status_code == 200
    assert answer.json()["coalesced"] or answer.json()["cached"]
    assert studio.steps_of("a red square") == STEPS
    assert studio.stored("victim.webp")
