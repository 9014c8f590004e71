"""Job routes.

Asynchronous requests by a Prefer header, events, cancellation; responses replayed for an idempotency key.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import Canvas, FakeDenoiser, until
from live_servers import LiveServer
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
ORDER: dict[str, Any] = {"prompt": "a red square", "width": 64, "height": 64}


def ask(
    running_app: RunningApp, path: str = CREATE, headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    return running_app.client.post(path, json={**ORDER, **more}, headers=headers or {})


def ended(running_app: RunningApp, job_id: str) -> dict[str, Any]:
    def has_ended() -> bool:
        return running_app.client.get(f"/jobs/{job_id}").json()["state"] not in ("queued", "running")

    until(has_ended)
    reported: dict[str, Any] = running_app.client.get(f"/jobs/{job_id}").json()
    return reported


def events_of(text: str) -> list[dict[str, str]]:
    blocks = [[line.split(": ", 1) for line in block.splitlines()] for block in text.split("\n\n")]
    return [event for event in map(dict, blocks) if "id" in event]  # type: ignore[arg-type]  # pairs


@pytest.mark.parametrize("path", [CREATE, "/make_image"])
def test_a_job_is_accepted_and_leads_to_the_receipt(running_app: RunningApp, path: str) -> None:
    """202 with a Location and Preference-Applied; then the result that a waiting caller would have got."""
    answer = ask(running_app, path, ASYNC)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["state"], job["step"]) == ("queued", 0)
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert len(job["id"]) >= 20
    done = ended(running_app, job["id"])
    assert (done["state"], done["step"], done["steps"]) == ("done", 4, 4) or done["state"] == "done"
    receipt = ask(running_app).json()
    assert (done["receipt"]["path"], done["receipt"]["seed"]) == (receipt["path"], receipt["seed"])
    assert running_app.client.get(done["receipt"]["path"]).status_code == 200
    assert [job["id"] for job in running_app.client.get("/jobs").json()["jobs"]] == [done["id"]]


def test_a_file_sent_with_a_job_is_kept_with_it(running_app: RunningApp) -> None:
    """Images from a multipart body are used after the response was sent."""
    picture = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(picture, "PNG")
    answer = running_app.client.post(
        "/style_transfer_bytes_and_upload_image",
        data={"prompt": "a blue square", "save_path": "a.webp"},
        files={"image_file": ("a.png", picture.getvalue())},
        headers=ASYNC,
    )
    assert answer.status_code == 202, answer.text
    done = ended(running_app, answer.json()["id"])
    assert (done["state"], done["receipt"]["width"], done["receipt"]["height"]) == ("done", 96, 64)


def test_who_would_rather_wait_gets_the_receipt(running_app: RunningApp) -> None:
    """RFC 7240 `wait`: a short job is answered within those seconds, a long one with 202."""
    answer = ask(running_app, headers={"Prefer": "respond-async, wait=10"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "respond-async, wait=10")
    assert answer.json()["path"]
    running_app.squares.seconds_per_step = 0.2
    assert ask(running_app, headers={"Prefer": "respond-async; x, wait=0"}, prompt="slow").status_code == 202
    assert ask(running_app, headers={"Prefer": "wait=oops, handling=lenient"}).status_code == 200


def test_what_is_wrong_is_refused_before_a_job_is_made(running_app: RunningApp) -> None:
    """422 for an invalid parameter, name, id or key; nothing is accepted."""
    assert ask(running_app, headers=ASYNC, width=7).status_code == 422
    assert ask(running_app, headers=ASYNC, save_path="a/../b").status_code == 422
    assert ask(running_app, headers={**ASYNC, "X-Job-ID": "short"}).json()["field"] == "X-Job-ID"
    assert ask(running_app, headers={**ASYNC, "Idempotency-Key": ""}).json()["field"] == "Idempotency-Key"
    assert running_app.client.get("/jobs").json() == {"jobs": []}


def test_a_webhook_is_for_jobs_and_for_public_addresses(running_app: RunningApp) -> None:
    """A webhook on a synchronous request is refused, as is a private address."""
    assert ask(running_app, webhook_url="https://example.com/").json()["field"] == "webhook_url"
    for url in ("http://127.0.0.1:9/", "ftp://example.com/", "http://169.254.169.254/latest"):
        refused = ask(running_app, headers=ASYNC, webhook_url=url)
        assert (refused.status_code, refused.json()["field"]) == (422, "webhook_url"), url


def test_a_job_no_one_has_is_not_found(running_app: RunningApp) -> None:
    """404 on every job route."""
    for method, path in (("GET", "/jobs/x"), ("DELETE", "/jobs/x"), ("GET", "/jobs/x/events")):
        assert running_app.client.request(method, path).status_code == 404


def test_jobs_belong_to_the_key_they_came_with(run_app: Callable[..., RunningApp]) -> None:
    """Another key sees nothing of it."""
    running_app = run_app(api_keys="ann:first-secret,bob:second-secret")
    ann, bob = ({"X-API-Key": secret} for secret in ("first-secret", "second-secret"))
    job_id = ask(running_app, headers={**ASYNC, **ann}).json()["id"]
    assert running_app.client.get(f"/jobs/{job_id}", headers=bob).status_code == 404
    assert running_app.client.delete(f"/jobs/{job_id}", headers=bob).status_code == 404
    assert running_app.client.get(f"/jobs/{job_id}", headers=ann).status_code == 200
    assert running_app.client.get(f"/jobs/{job_id}").status_code == 401


def followed(live: LiveServer, gate: threading.Event, **parameters: Any) -> tuple[str, str]:
    """Id and event stream of a new job, which takes its first step when the follower has received an event."""
    job_id = httpx.post(f"{live.url}{CREATE}", json={**ORDER, **parameters}, headers=ASYNC, timeout=60).json()["id"]
    with httpx.stream("GET", f"{live.url}/jobs/{job_id}/events", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith("id:"):
                gate.set()
        return job_id, "\n".join(lines)


def test_the_events_of_a_job_are_a_stream_that_can_be_resumed(live_of: Callable[..., LiveServer]) -> None:
    """Steps and the end are server-sent events, each with an id; after the end there is nothing to resume."""
    gate = threading.Event()
    live = live_of(FakeDenoiser(gate=gate))
    job_id, text = followed(live, gate)
    events = events_of(text)
    steps = [json.loads(event["data"])["step"] for event in events if event["event"] == "step"]
    assert steps == [0, 1, 2, 3, 4]
    assert events[-1]["event"] == "done"
    assert json.loads(events[-1]["data"])["receipt"]["path"]
    url = f"{live.url}/jobs/{job_id}/events"
    late = httpx.get(url, headers={"Last-Event-ID": "of-another-time.7"}, timeout=60)
    assert [event["event"] for event in events_of(late.text)] == ["done"]
    assert httpx.get(url, headers={"Last-Event-ID": events[-1]["id"]}, timeout=60).status_code == 204


class Sketchers(FakeDenoiser):
    """Backend that sends previews."""

    def preview(self, state: Canvas) -> NDArray[np.uint8]:
        return np.full((8, 8, 3), state.index * 10, np.uint8)


def test_a_follower_sees_small_pictures_on_the_way(live_of: Callable[..., LiveServer]) -> None:
    """Previews are sent as base64 WebP once someone follows the job."""
    gate = threading.Event()
    _, text = followed(live_of(Sketchers(gate=gate, seconds_per_step=0.2)), gate, num_inference_steps=8)
    previews = [json.loads(event["data"]) for event in events_of(text) if event["event"] == "preview"]
    assert previews
    assert Image.open(io.BytesIO(base64.b64decode(previews[0]["image"]))).format == "WEBP"
    assert previews[0]["content_type"] == "image/webp"


def test_a_request_that_waits_can_be_followed_and_cancelled_by_the_id_it_brings(
    run_app: Callable[..., RunningApp],
) -> None:
    """The caller chooses the id, as it gets the server's id only with the response. A cancelled request says so."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))
    headers = {"X-Job-ID": "an-id-of-the-caller"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, running_app, CREATE, headers)
        until(lambda: bool(running_app.squares.batches))
        assert running_app.client.get("/jobs/an-id-of-the-caller").json()["state"] == "running"
        assert ask(running_app, headers=headers).status_code == 409
        cancelled = pool.submit(running_app.client.delete, "/jobs/an-id-of-the-caller")
        assert running_app.client.delete("/jobs/an-id-of-the-caller").json()["state"] == "cancelled"
        answer = waiting.result()
        assert (answer.status_code, answer.json()["type"].rsplit(":", 1)[1]) == (409, "cancelled")
        cancelled.result()
    assert running_app.client.get("/jobs/an-id-of-the-caller").json()["state"] == "cancelled"
    running_app.squares.gate.set()
    answer = ask(running_app)
    assert answer.status_code == 200
    assert running_app.client.get(f"/jobs/{answer.headers['x-job-id']}").json()["state"] == "done"


def test_a_key_repeats_the_first_answer(running_app: RunningApp) -> None:
    """Synchronous or not; another request with the key is refused; another key is another request."""
    first = ask(running_app, headers={"Idempotency-Key": "k1"}, seed="random")
    again = ask(running_app, headers={"Idempotency-Key": "k1"}, seed="random")
    assert again.json() == first.json()
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")
    other = ask(running_app, headers={"Idempotency-Key": "k1"}, seed=7)
    assert (other.status_code, other.json()["type"].rsplit(":", 1)[1]) == (422, "idempotency-key-reused")
    assert ask(running_app, headers={"Idempotency-Key": "k2"}, seed="random").json()["seed"] != first.json()["seed"]
    jobs = [ask(running_app, headers={**ASYNC, "Idempotency-Key": "k3"}, seed="random") for _ in range(3)]
    assert [job.status_code for job in jobs] == [202] * 3
    assert len({job.json()["id"] for job in jobs}) == 1
    picture = [ask(running_app, "/make_image", {"Idempotency-Key": "k4"}, seed="random").content for _ in range(2)]
    assert picture[0] == picture[1]


def test_a_key_is_running_until_it_is_answered_and_free_if_it_never_is(run_app: Callable[..., RunningApp]) -> None:
    """409 while it runs; a transient failure is not replayed, a permanent one is."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))
    key = {"Idempotency-Key": "k1", "X-Job-ID": "an-id-of-the-caller"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, running_app, CREATE, key)
        until(lambda: bool(running_app.squares.batches))
        meanwhile = ask(running_app, headers={"Idempotency-Key": "k1"})
        assert (meanwhile.status_code, meanwhile.headers["retry-after"]) == (409, "1")
        running_app.client.delete("/jobs/an-id-of-the-caller")
        assert waiting.result().status_code == 409
    running_app.squares.gate.set()
    assert ask(running_app, headers={"Idempotency-Key": "k1"}).status_code == 200
    wrong = [ask(running_app, headers={"Idempotency-Key": "k2"}, guidance_scale=99) for _ in range(2)]
    assert [answer.status_code for answer in wrong] == [422, 422]


def test_openais_endpoint_answers_by_a_job_and_once_for_a_key(running_app: RunningApp) -> None:
    """One image at a time; with `n` > 1 or a stream, a key is refused rather than ignored."""
    path, asked = "/v1/images/generations", {"prompt": "a red square", "size": "64x64"}
    job_id = running_app.client.post(path, json=asked, headers=ASYNC).json()["id"]
    assert ended(running_app, job_id)["state"] == "done"
    key = {"Idempotency-Key": "k1"}
    answers = [running_app.client.post(path, json=asked, headers=key) for _ in range(2)]
    assert answers[0].json()["data"] == answers[1].json()["data"]
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert running_app.client.post(path, json={**asked, "n": 2}, headers=key).status_code == 422
