"""Replicate's predictions over our jobs: routes, inputs, waiting, webhooks, and what strangers send."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, disc, file_of, until

INPUT = {"prompt": "a red square", "width": 64, "height": 64}
DATA_URL = f"data:image/png;base64,{base64.b64encode(file_of(disc(64, 64))).decode()}"
WAIT = {"Prefer": "wait=30"}


def predict(app: RunningApp, path: str = "models/local/sdxl/predictions", **changes: Any) -> Any:
    """One prediction, waited for."""
    given = changes.pop("given", {})
    headers = {**WAIT, **changes.pop("headers", {})}
    return app.client.post(f"/v1/{path}", json={"input": {**INPUT, **given}, **changes}, headers=headers)


def test_a_prediction_is_made_waited_for_and_read_again(running_app: RunningApp) -> None:
    """201 with output, logs, metrics and addresses; the same at its address and in the list, without native jobs."""
    running_app.client.post("/create_and_upload_image", json=INPUT, headers={"Prefer": "respond-async"})
    made = predict(running_app, given={"seed": 7})
    assert made.status_code == 201
    body = made.json()
    assert (body["status"], body["model"], body["version"]) == ("succeeded", "local/sdxl", "sdxl")
    assert body["input"] == {**INPUT, "seed": 7}
    assert running_app.client.get(body["output"][0]).headers["content-type"] == "image/webp"
    assert "Using seed: 7" in body["logs"]
    assert body["metrics"]["total_time"] >= body["metrics"]["predict_time"] > 0
    assert body["created_at"] <= body["started_at"] <= body["completed_at"]
    assert running_app.client.get(body["urls"]["get"]).json() == body
    assert running_app.client.get("/v1/predictions").json()["results"] == [body]


def test_a_prediction_that_has_not_ended_starts_and_is_cancelled(run_app: Callable[..., RunningApp]) -> None:
    """202 and `starting` after its wait too: the clients take one that is processed for the finished one."""
    app = run_app(FakeDenoiser(seconds_per_step=0.05))
    made = predict(app, given={"num_inference_steps": 100}, headers={"Prefer": "wait=1"})
    assert (made.status_code, made.json()["status"], made.json()["output"]) == (202, "starting", None)
    urls = made.json()["urls"]
    until(lambda: "%|" in app.client.get(urls["get"]).json()["logs"])
    assert app.client.get(urls["get"]).json()["status"] == "processing"
    cancelled = app.client.post(urls["cancel"]).json()
    assert cancelled["status"] == "canceled"
    assert app.client.post(urls["cancel"]).json()["completed_at"] == cancelled["completed_at"]
    assert 'event: done\ndata: {"reason":"canceled"}' in app.client.get(urls["stream"]).text


@pytest.mark.parametrize(
    ("path", "version"),
    [
        ("models/local/sdxl/predictions", None),
        ("models/stability-ai/sdxl/predictions", None),
        ("models/sdxl/predictions", None),
        ("models/local/deep/sdxl/predictions", None),
        ("predictions", "local/sdxl:sdxl"),
        ("predictions", "local/sdxl"),
        ("predictions", "local/sdxl:0123456789abcdef"),
        ("predictions", "sdxl"),
    ],
)
def test_a_model_is_named_with_any_owner_and_version(running_app: RunningApp, path: str, version: str | None) -> None:
    """The whole name comes first, then what follows the owner."""
    named = {} if version is None else {"version": version}
    assert predict(running_app, path, **named).json()["status"] == "succeeded"


def test_the_paths_of_models_stay_apart(running_app: RunningApp) -> None:
    """A model's id may have slashes; GET of a path that ends in `predictions` is a model, not a prediction."""
    client = running_app.client
    assert client.get("/v1/models/sdxl").json()["id"] == "sdxl"
    assert client.get("/v1/models/local/sdxl/versions/sdxl").json()["id"] == "sdxl"
    for path in ("/v1/models/sdxl/predictions", "/v1/models/a/versions/b", "/v1/predictions/none"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert predict(running_app, "models/local/none/predictions").status_code == 404


@pytest.mark.parametrize(
    ("given", "task"),
    [
        ({"image": DATA_URL}, "image_to_image"),
        ({"image": DATA_URL, "prompt_strength": 0.3, "scheduler": "K_EULER"}, "image_to_image"),
        ({"image": DATA_URL, "mask": DATA_URL, "refine": "no_refiner"}, "inpaint"),
        ({"aspect_ratio": "16:9", "width": None, "height": None, "output_format": "jpg"}, "text_to_image"),
    ],
)
def test_inputs_say_what_is_drawn(running_app: RunningApp, given: dict[str, Any], task: str) -> None:
    """By the names that models at Replicate have; images come back shortened."""
    body = predict(running_app, given={**given, "go_fast": True}).json()
    assert body["status"] == "succeeded", body
    record = running_app.client.get(body["output"][0].partition("?")[0] + "?record=1").json()["record"]
    assert record["task"] == task
    assert "go_fast has no effect here." in body["logs"]
    assert len(str(body["input"])) < 500


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"given": {"num_outputs": 2, "width": 1, "aspect_ratio": None}}, {"num_outputs", "width"}),
        ({"given": {"prompt": 5, "foo": 1}}, {"prompt", "foo"}),
        ({"given": {"mask": DATA_URL, "prompt_strength": 2}}, {"image", "prompt_strength"}),
        ({"given": {"images": [DATA_URL]}}, {"images"}),
        (
            {"given": {"scheduler": "none", "aspect_ratio": "9999:1", "width": None, "height": None}},
            {"scheduler", "aspect_ratio"},
        ),
        ({"given": {"image": "/etc/passwd"}}, {"image"}),
        ({"given": {"image": "file:///etc/passwd"}}, {"image"}),
        ({"given": {"model": "flux"}}, {"model"}),
        ({"webhook_events_filter": ["foo"], "foo": 1}, {"webhook_events_filter", "foo"}),
        ({"version": "sdxl"}, {"version"}),
        ({"webhook": "http://127.0.0.1:1/"}, {"webhook"}),
        ({"webhook": "file:///etc/passwd"}, {"webhook"}),
    ],
)
def test_bad_input_names_every_field(running_app: RunningApp, changes: dict[str, Any], fields: set[str]) -> None:
    """422 as a problem document; a name of a file on this machine is none of an image."""
    answer = predict(running_app, **changes)
    assert answer.status_code == 422
    body = answer.json()
    assert {body.get("field"), *(fault["field"] for fault in body.get("errors", ()))} - {None} == fields


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"input": ' + '{"a":' * 2000 + "1" + "}" * 2001, 400),
        ('{"input": [' + "1," * 9000 + "1]}", 400),
        ('{"input": {"prompt": "' + "a" * 3_000_000 + '"}}', 422),
        ('{"input": {"image": "' + "A" * 40_000_000 + '"}}', 413),
        ('{"input": {"prompt": "a"}, "input": {}}', 400),
        ("[]", 400),
        ('{"input": null}', 422),
        ("\xff", 400),
    ],
    ids=["deep", "many", "long", "large", "twice", "list", "null", "latin"],
)
def test_hostile_bodies_are_refused_before_they_are_built(running_app: RunningApp, body: str, status: int) -> None:
    """4xx on both paths, and the next request is answered."""
    for path in ("/v1/predictions", "/v1/models/local/sdxl/predictions"):
        headers = {"Content-Type": "application/json"}
        answer = running_app.client.post(path, content=body.encode("latin-1"), headers=headers)
        assert answer.status_code == status, answer.text[:300]
    assert running_app.client.get("/v1/predictions").json()["results"] == []


def test_predictions_count_against_the_rate_and_polls_do_not(run_app: Callable[..., RunningApp]) -> None:
    """On both paths that make one, although paths of models are cheap otherwise."""
    app = run_app(rate_limit="2/hour")
    first = predict(app)
    assert predict(app, "predictions", version="sdxl", given={"seed": 2}).status_code == 201
    assert [predict(app).status_code, predict(app, "predictions", version="sdxl").status_code] == [429, 429]
    assert app.client.get(first.json()["urls"]["get"]).status_code == 200


def test_keys_see_their_own_predictions_only(run_app: Callable[..., RunningApp]) -> None:
    """Bearer and Token; another key, a wrong key and a foreign origin are refused; the secret is the operator's."""
    app = run_app(api_keys="ann:key-of-ann,bob:key-of-bob,eve:key-of-eve;admin", **{"webhook_secret": "whsec_c2VjcmV0"})
    ann, bob, eve = (
        {"Authorization": f"{scheme} key-of-{name}"}
        for scheme, name in (("Token", "ann"), ("Bearer", "bob"), ("Bearer", "eve"))
    )
    body = predict(app, headers=ann).json()
    at = f"/v1/predictions/{body['id']}"
    assert app.client.get(at, headers=ann).json()["output"] == body["output"]
    for path in (at, f"{at}/stream"):
        assert app.client.get(path, headers=bob).status_code == 404
    assert app.client.post(f"{at}/cancel", headers=bob).status_code == 404
    assert app.client.get("/v1/predictions", headers=bob).json()["results"] == []
    assert predict(app, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert predict(app, headers={**ann, "Origin": "https://evil.example"}).status_code == 403
    at = "/v1/webhooks/default/secret"
    assert [app.client.get(at, headers=who).status_code for who in (ann, eve)] == [403, 200]
    assert app.client.get(at, headers=eve).json() == {"key": "whsec_c2VjcmV0"}


def test_without_a_secret_there_is_none(running_app: RunningApp) -> None:
    """404, with the setting that makes one."""
    answer = running_app.client.get("/v1/webhooks/default/secret")
    assert (answer.status_code, "WEBHOOK_SECRET" in answer.json()["detail"]) == (404, True)
