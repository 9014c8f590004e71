"""Isolation between callers: anonymous clients by address, and keys that are not marked as admin."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, until
from service_harness import OPTIONS, order

from stable_diffusion_server.generation.permissions import Ownership
from stable_diffusion_server.generation.resolver import resolve_request
from stable_diffusion_server.storage.signed_urls import ServerSecret

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ORDER: dict[str, Any] = {"prompt": "a red square", "width": 64, "height": 64}
ASYNC = {"prefer": "respond-async"}
KEYS = "ann:secret-a, bob:secret-b, root:secret-r;admin, pre:secret-p;prefix=pre/"
ONE = "0123456789"
CHOSEN = "0123456789abcdef-job"


@dataclass
class One:
    """One client of an app, with the headers it always sends."""

    running_app: RunningApp
    headers: dict[str, str]

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        return self.running_app.client.request(method, path, headers={**self.headers, **(headers or {})}, **more)

    def draw(self, headers: dict[str, str] | None = None, path: str = CREATE, **more: Any) -> httpx.Response:
        return self.ask("POST", path, headers, json={**ORDER, **more})

    def ended(self, job_id: str) -> dict[str, Any]:
        until(lambda: self.ask("GET", f"/jobs/{job_id}").json()["state"] not in ("queued", "running"))
        reported: dict[str, Any] = self.ask("GET", f"/jobs/{job_id}").json()
        return reported


Two = tuple[RunningApp, One, One]


@pytest.fixture
def strangers(run_app: Callable[..., RunningApp]) -> Two:
    """Two clients without a key, at two addresses."""
    running_app = run_app(allow_anonymous=True, trusted_proxies="127.0.0.1")
    return running_app, *(One(running_app, {"x-forwarded-for": address}) for address in ("203.0.113.5", "198.51.100.9"))


def held(running_app: RunningApp, *secrets: str) -> list[One]:
    return [One(running_app, {"x-api-key": secret}) for secret in secrets]


@pytest.fixture
def keys(run_app: Callable[..., RunningApp]) -> list[One]:
    """Clients with the keys ann, bob (neither marked), root (admin) and pre (with a prefix)."""
    return held(run_app(api_keys=KEYS), "secret-a", "secret-b", "secret-r", "secret-p")


@pytest.mark.fault(140)
def test_an_anonymous_caller_follows_its_job_by_the_id_and_no_list_tells_it(strangers: Two) -> None:
    """The server-generated id is enough, from any address; lists and client-chosen ids are refused."""
    _, one, other = strangers
    job = one.draw(ASYNC).json()
    assert len(job["id"]) >= 22, "128 bits in base64"
    for path in ("/jobs", "/history", "/metrics", "/files/static/uploads/a.webp?record=1"):
        assert other.ask("GET", path).status_code == 403, path
        assert one.ask("GET", path).status_code == 403, path
    assert one.ended(job["id"])["state"] == "done"
    moved = One(one.running_app, {"x-forwarded-for": "192.0.2.77"})
    assert moved.ask("GET", f"/jobs/{job['id']}").json()["state"] == "done"
    assert "event: done" in moved.ask("GET", f"/jobs/{job['id']}/events").text
    for headers in ({"x-job-id": CHOSEN}, {"x-job-id": CHOSEN, **ASYNC}, {"x-job-id": CHOSEN, "idempotency-key": "1"}):
        refused = other.draw(headers)
        assert (refused.status_code, refused.json()["field"]) == (403, "X-Job-ID")


@pytest.mark.fault(140)
def test_an_anonymous_caller_changes_nothing_of_others(strangers: Two) -> None:
    """Deleting, overwriting and reading provenance are refused.

    Images generated without a key are readable by everyone.
    """
    running_app, one, other = strangers
    key = one.draw(save_path="mine.webp").json()["key"]
    before = running_app.client.get(f"/files/{key}").content
    assert other.ask("DELETE", f"/files/{key}").status_code == 403
    assert other.ask("GET", f"/files/{key}", params={"record": "1"}).status_code == 403
    for more in ({"overwrite": True, "prompt": "a blue square", "save_path": "mine.webp"}, {"overwrite": True}):
        refused = other.draw(**more)
        assert (refused.status_code, refused.json()["field"]) == (403, "overwrite")
    picture = {"picture_file": before}
    first, second = (other.ask("POST", "/v1/replay", files=picture).json() for _ in range(2))
    assert first["key"] != second["key"], "no replay is written over another's"
    assert running_app.client.get(f"/files/{key}").content == before


@pytest.mark.fault(140)
def test_idempotency_keys_and_choices_of_anonymous_callers_are_their_own(strangers: Two) -> None:
    """A guessable key like 1 affects no other address; nor does a model that one caller selects."""
    _, one, other = strangers
    assert one.draw({"idempotency-key": "1"}, prompt="a red square").status_code == 200
    assert other.draw({"idempotency-key": "1"}, prompt="a blue square").status_code == 200
    again = other.draw({"idempotency-key": "1", **ASYNC}, prompt="a blue square")
    assert again.headers["idempotency-replayed"] == "true"
    own = one.ask("GET", "/sdapi/v1/options").json()["sd_model_checkpoint"]
    other.ask("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "flux"})
    assert one.ask("GET", "/sdapi/v1/options").json()["sd_model_checkpoint"] == own


@pytest.mark.fault(140)
def test_an_anonymous_task_is_seen_and_stopped_by_its_own_id_alone(run_app: Callable[..., RunningApp]) -> None:
    """AUTOMATIC1111's progress, preview and interrupt need a sufficiently long force_task_id."""
    squares = FakeDenoiser(gate=threading.Event())
    running_app = run_app(squares, allow_anonymous=True, trusted_proxies="127.0.0.1")
    one, other = (One(running_app, {"x-forwarded-for": address}) for address in ("203.0.113.5", "198.51.100.9"))
    name = "task(abcdefghij12345)"
    body = {**ORDER, "force_task_id": name, "steps": 4}
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(one.ask, "POST", "/sdapi/v1/txt2img", json=body)
        until(lambda: bool(squares.batches))
        for asked in ({}, {"id_task": "task(other)"}, {"id_task": ""}):
            assert other.ask("GET", "/sdapi/v1/progress", params=asked).json()["state"]["job_count"] == 0
            assert not other.ask("POST", "/internal/progress", json=asked).json()["active"]
        assert other.ask("POST", "/sdapi/v1/interrupt").status_code == 403
        assert other.ask("POST", "/sdapi/v1/interrupt?id_task=a").status_code == 403
        assert one.ask("POST", "/internal/progress", json={"id_task": name}).json()["active"]
        assert one.ask("POST", f"/sdapi/v1/interrupt?id_task={name}").status_code == 200
        assert squares.gate is not None
        squares.gate.set()
        answer = drawing.result().json()
        info = json.loads(answer["info"])
        assert (len(answer["images"]), info["interrupted"], info["keys"]) == (1, True, []), "unfinished, and not stored"


@pytest.mark.fault(141)
def test_ids_that_keys_choose_are_their_own(keys: list[One]) -> None:
    """Two keys use one id, running or queued; neither sees the other's job; admin sees both by full id."""
    ann, bob, root, _ = keys
    assert ann.draw({"x-job-id": CHOSEN, **ASYNC}).status_code == 202
    done = ann.ended(CHOSEN)
    waited = bob.draw({"x-job-id": CHOSEN}, prompt="a blue square")
    assert (waited.status_code, waited.headers["x-job-id"]) == (200, CHOSEN)
    assert bob.draw({"x-job-id": f"{CHOSEN}-b", **ASYNC}, prompt="a green square").status_code == 202
    bob.ended(f"{CHOSEN}-b")
    seen = ann.ask("GET", f"/jobs/{CHOSEN}").json()
    # A job's progress is known until its end is written, and not reported afterwards.
    assert [(job["id"], job["state"], job["receipt"]["key"]) for job in (seen, done)] == [
        (CHOSEN, "done", done["receipt"]["key"])
    ] * 2, "not shadowed by a request of the same id that waited"
    assert "event: done" in ann.ask("GET", f"/jobs/{CHOSEN}/events").text
    for job_id in (f"{CHOSEN}-b", f"bob:{CHOSEN}-b"):
        assert ann.ask("GET", f"/jobs/{job_id}").status_code == 404
        assert ann.ask("DELETE", f"/jobs/{job_id}").status_code == 404
    assert [job["id"] for job in ann.ask("GET", "/jobs").json()["jobs"]] == [CHOSEN]
    whole = [job["id"] for job in root.ask("GET", "/jobs").json()["jobs"]]
    assert whole == [f"bob:{CHOSEN}-b", f"ann:{CHOSEN}"]
    assert [root.ask("GET", f"/jobs/{job_id}").json()["state"] for job_id in whole] == ["done", "done"]


@pytest.mark.fault(141)
def test_an_accepted_job_is_never_hidden_by_a_request_of_its_id(running_app: RunningApp) -> None:
    """Neither a failed request before it nor a waiting one after it, under the same id and caller, hides the job."""
    one = One(running_app, {})
    assert one.draw({"x-job-id": CHOSEN}, timeout=0.0001).status_code in (422, 504)
    assert one.draw({"x-job-id": CHOSEN, "idempotency-key": "k"}, prompt="an unpreparable square").status_code == 500
    assert one.ask("GET", f"/jobs/{CHOSEN}").json()["state"] == "failed"
    assert one.draw({"x-job-id": CHOSEN, **ASYNC}).status_code == 202
    assert one.ended(CHOSEN)["state"] == "done"
    assert one.draw({"x-job-id": CHOSEN}).status_code == 409
    assert one.ended(CHOSEN)["state"] == "done"


@pytest.mark.fault(142)
def test_a_key_without_the_mark_touches_its_own_pictures_alone(keys: list[One]) -> None:
    """List, read, delete, overwrite: only its own. Admin has all; a prefix's images belong to the prefix's key."""
    ann, bob, root, pre = keys
    mine = ann.draw(save_path="mine.webp").json()["key"]
    made = ann.draw(prompt="a green square").json()["key"]
    theirs = pre.draw(save_path="pre/x.webp").json()["key"]
    assert bob.draw(prompt="a blue square").status_code == 200
    listed = [{picture["key"] for picture in one.ask("GET", "/history").json()["pictures"]} for one in keys]
    assert listed[0] == {mine, made}
    assert listed[1].isdisjoint({mine, made, theirs})
    assert listed[2] >= {mine, made, theirs}
    assert listed[3] == {theirs}
    for key in (mine, made, theirs):
        assert bob.ask("GET", f"/files/{key}", params={"record": "1"}).status_code == 403
        assert bob.ask("DELETE", f"/files/{key}").status_code == 403
        assert root.ask("GET", f"/files/{key}", params={"record": "1"}).status_code == 200
    refused = bob.draw(save_path="mine.webp", prompt="a blue square", overwrite=True)
    assert (refused.status_code, refused.json()["field"]) == (403, "save_path")
    job = bob.draw(ASYNC, save_path="mine.webp", prompt="a blue square", overwrite=True)
    assert job.status_code == 403 or bob.ended(job.json()["id"])["state"] == "failed"
    assert ann.draw(save_path="mine.webp", prompt="a blue square", overwrite=True).status_code == 200
    assert ann.ask("GET", f"/files/{mine}", params={"record": "1"}).status_code == 200
    assert root.draw(save_path="mine.webp", prompt="a red square", overwrite=True).status_code == 200
    assert ann.ask("DELETE", f"/files/{made}").status_code == 204
    assert ann.ask("DELETE", f"/files/{made}").status_code == 204, "what is not there is no error"


@pytest.mark.fault(142)
def test_a_sole_key_and_the_operator_have_everything(run_app: Callable[..., RunningApp]) -> None:
    """Images a local server generated before keys were set belong to the sole key too."""
    running_app = run_app()
    key = running_app.draw(prompt="a red square", save_path="old.webp").json()["key"]
    sole = held(run_app(api_keys="only"), "only")[0]
    assert key in {picture["key"] for picture in sole.ask("GET", "/history").json()["pictures"]}
    assert sole.ask("GET", f"/files/{key}", params={"record": "1"}).status_code == 200
    assert sole.ask("DELETE", f"/files/{key}").status_code == 204


@pytest.mark.fault(143)
@pytest.mark.parametrize("where", ["record", "history", "job"])
def test_a_replay_tells_no_more_than_the_picture_itself(run_app: Callable[..., RunningApp], where: str) -> None:
    """With EMBED_METADATA=digest, a caller that may not read the record cannot replay it into an image of its own."""
    ann, bob, root, pre = held(
        run_app(api_keys=KEYS, embed_metadata="digest"), "secret-a", "secret-b", "secret-r", "secret-p"
    )
    prompt = "a very private red square"
    path = ann.draw(prompt=prompt, save_path="a.png").json()["path"]
    picture = {"picture_file": ann.running_app.client.get(path).content}
    for other in (bob, pre):
        refused = other.ask("POST", "/v1/replay", files=picture)
        assert (refused.status_code, refused.json()["field"]) == (422, "picture_file")
        reported = {
            "record": refused.text,
            "history": other.ask("GET", "/history").text,
            "job": other.ask("GET", "/jobs").text,
        }
        assert prompt not in reported[where]
    for owner in (ann, root):
        assert owner.ask("POST", "/v1/replay", files=picture).json()["replay"]["equal"]


@pytest.mark.fault(144)
def test_names_made_from_orders_are_no_ones_to_compute(run_app: Callable[..., RunningApp]) -> None:
    """With keys, names differ between servers and between keys; without keys the name is unchanged."""
    open_key = run_app().draw(prompt="a red square").json()["key"]
    running_app = run_app(api_keys=KEYS, url_secret=ONE)
    made = [one.draw().json()["key"] for one in held(running_app, "secret-a", "secret-b", "secret-p")]
    assert len({open_key.rpartition("/")[2], *(key.rpartition("/")[2] for key in made)}) == 4
    assert running_app.client.get(f"/files/{open_key}").status_code in (200, 404)
    twin, other = run_app(api_keys=KEYS, url_secret=ONE), run_app(api_keys=KEYS, url_secret=ONE[::-1])
    assert held(twin, "secret-a")[0].draw().json()["key"] == made[0], "replicas share the secret"
    assert held(other, "secret-a")[0].draw().json()["key"] != made[0]


@pytest.mark.fault(144)
def test_every_kind_of_made_name_is_concealed(tmp_path: Path) -> None:
    """Requests without a name, names with a content prefix, variations; tested on the pure resolver."""
    secret = ServerSecret("", tmp_path / "secret")
    secret.open()
    closed = replace(OPTIONS, ownership=Ownership(secret.hmac_hex))
    for asked in (
        order(prompt="a red square"),
        order(prompt="a red square", variation=3, seed=4),
        order(prompt="a red square", save_path="cat.webp", named_by_content=True),
        order(prompt="a red square", folder="team/"),
    ):
        plain, hidden = (
            resolve_request(asked, OPTIONS).key,
            resolve_request(replace(asked, named_for="ann"), closed).key,
        )
        assert plain != hidden
        assert hidden == resolve_request(replace(asked, named_for="ann"), closed).key
        assert hidden != resolve_request(replace(asked, named_for="bob"), closed).key
        assert plain.rpartition("/")[0] == hidden.rpartition("/")[0]


@pytest.mark.fault(144)
def test_what_was_there_is_reported_to_its_owner_and_admin_alone(keys: list[One]) -> None:
    """`cached`, the stored seed, and whether the request matched.

    Another key gets the same response whatever it guesses.
    """
    ann, bob, root, _ = keys
    ann.draw(save_path="x.webp", seed=5)
    assert ann.draw(save_path="x.webp", seed=5).json()["cached"]
    assert root.draw(save_path="x.webp", seed=5).json()["cached"]
    right = bob.draw(save_path="x.webp", seed=5).json()
    wrong = bob.draw(save_path="x.webp", seed=5, prompt="a blue square").json()
    assert {**right, "request_id": 0} == {**wrong, "request_id": 0}
    assert not right["cached"]
    assert right["seed"] is None
    assert [warning["code"] for warning in right["warnings"]] == ["different-request"]
    bob.draw(prompt="a green square")
    assert not ann.draw(prompt="a green square").json()["cached"]


@pytest.mark.fault(142)
@pytest.mark.parametrize("path", [CREATE, "/make_image", "/v1/images/generations"])
def test_a_private_picture_is_not_opened_by_asking_for_its_name(run_app: Callable[..., RunningApp], path: str) -> None:
    """With signed URLs, a name that another key has taken is refused, whatever the request."""
    ann, bob, root = held(run_app(api_keys=KEYS, signed_url_seconds=60), "secret-a", "secret-b", "secret-r")
    size = {"size": "64x64", "width": None, "height": None} if path.startswith("/v1") else {}
    body = {name: value for name, value in {**ORDER, **size, "save_path": "p.webp", "seed": 3}.items() if value}
    assert [one.ask("POST", path, json=body).status_code for one in (ann, ann, root)] == [200] * 3
    for prompt in (ORDER["prompt"], "a blue square"):
        refused = bob.ask("POST", path, json={**body, "prompt": prompt})
        assert refused.status_code == 403, refused.text
    job = bob.ask("POST", path, ASYNC, json=body).json()
    assert bob.ended(job["id"])["state"] == "failed"


@pytest.mark.fault(144)
def test_keys_that_draw_one_picture_at_a_time_are_not_refused_for_it(run_app: Callable[..., RunningApp]) -> None:
    """The work is shared on the device; `coalesced` is visible to admin only."""
    squares = FakeDenoiser(gate=threading.Event())
    ann, bob, root = held(run_app(squares, api_keys=KEYS), "secret-a", "secret-b", "secret-r")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ann.draw, seed=3)
        until(lambda: bool(squares.batches))
        others = [pool.submit(one.draw, seed=3) for one in (bob, root)]
        assert squares.gate is not None
        squares.gate.set()
        reported = [asked.result().json() for asked in (first, *others)]
    assert [receipt["coalesced"] for receipt in reported[:2]] == [False, False]
    assert len({receipt["key"] for receipt in reported}) == 3


@pytest.mark.fault(145)
@pytest.mark.parametrize("headers", [{}, ASYNC, {"prefer": "respond-async, wait=20"}], ids=["waiting", "job", "wait"])
@pytest.mark.parametrize("path", [CREATE, "/make_image", "/v1/images/generations"])
def test_a_repeated_key_draws_again_what_was_deleted(
    running_app: RunningApp, path: str, headers: dict[str, str]
) -> None:
    """When the image is deleted, the idempotency key counts as new, on every route and in every response mode."""
    one, sent = One(running_app, {}), {"idempotency-key": "k", **headers}
    size = {"size": "64x64"} if path.startswith("/v1") else {"width": 64, "height": 64}
    body = {"prompt": "a red square", "seed": 5, "save_path": "k.webp", **size}

    def stored() -> bool:
        return running_app.client.get("/files/static/uploads/k.webp").status_code == 200

    first = one.ask("POST", path, sent, json=body)
    assert first.status_code in (200, 202), first.text
    until(stored)
    assert one.ask("POST", path, sent, json=body).headers["idempotency-replayed"] == "true"
    until(lambda: one.ask("POST", path, sent, json=body).status_code in (200, 202))
    drawn = len(running_app.squares.prepared)
    assert one.ask("DELETE", "/files/static/uploads/k.webp").status_code == 204
    again = one.ask("POST", path, sent, json=body)
    assert (again.status_code, "idempotency-replayed" in again.headers) == (first.status_code, False), again.text
    until(stored)
    assert len(running_app.squares.prepared) == drawn + 1


@dataclass(frozen=True)
class _LoadedModel:
    """The model part of `/readyz`."""

    name: str = "sdxl"
    folder: str = "private-weights"
    remarks: tuple[str, ...] = ()


class _Telling(FakeDenoiser):
    """Backend that reports a loaded model."""

    loaded = (_LoadedModel(),)


@pytest.mark.fault(146)
def test_how_the_server_stands_is_reported_to_keys_alone(run_app: Callable[..., RunningApp], tmp_path: Path) -> None:
    """Without a key only the state: no model folder and no error detail."""
    running_app = run_app(_Telling(), api_keys=KEYS)
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Basic eHg6eHg="}):
        reported = running_app.client.get("/readyz", headers=headers)
        assert (reported.status_code, reported.json()["status"]) == (200, "ready")
        assert not any(value for name, value in reported.json().items() if name != "status")
    assert "private-weights" in running_app.client.get("/readyz", headers={"x-api-key": "secret-b"}).text
    assert "private-weights" in run_app(_Telling()).client.get("/readyz").text, "the operator's own server"
    for elsewhere in (
        run_app(_Telling(), client=("203.0.113.5", 5)),
        run_app(_Telling(), client=("203.0.113.5", 5), allow_anonymous=True),
    ):
        assert not elsewhere.client.get("/readyz").json()["models"]
