"""API keys that may use some models only: every dialect, lists, jobs and replay; other keys are not limited."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, until
from fastapi import FastAPI
from fastapi.testclient import TestClient
from service_harness import ServiceHarness, order

from stable_diffusion_server.api.routes.health import health_router
from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.settings.auth import AuthSettings, parse_keys
from stable_diffusion_server.types import Caller

pytestmark = pytest.mark.slow

KEYS = (
    "ann:secret-a;models=flux, bob:secret-b;models=dream|sdxl, eve:secret-e;models=gone, cid:secret-c, "
    "root:secret-r;admin"
)
SIZE = {"prompt": "a red square", "width": 64, "height": 64}
REFUSED = "This key may not use the model 'sdxl'; for it there are flux."


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A server with two models, an alias of one, and keys limited to some, to none that is here, and to nothing."""
    return run_app(api_keys=KEYS, model_aliases=("dream=flux",))


def as_key(running_app: RunningApp, key: str, method: str, path: str, **given: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer secret-{key}", **given.pop("headers", {})}
    return running_app.client.request(method, path, headers=headers, **given)


def test_models_are_written_behind_the_key() -> None:
    """Names separated by |, each once, blanks and slashes allowed."""
    ann, root = parse_keys(["ann:s;rate=1/minute;models=flux|sub/My Model|flux", "root:t;admin"])
    assert (ann.models, root.models) == (("flux", "sub/My Model"), ())


@pytest.mark.parametrize("written", ["a:s;models=", "a:s;models=x||y", "a:s;models=x;models=y", "a:s;models=x;admin"])
def test_models_that_are_written_wrong_stop_the_start(written: str) -> None:
    """An empty list must not mean all, and a limit must not be ignored for an admin."""
    with pytest.raises(ValueError, match=r"^has (models|options) at key 1"):
        parse_keys([written, "other:key"])


def test_the_only_key_is_admin_and_cannot_be_limited(tmp_path: Path) -> None:
    """The limit would be ignored; beside a key of the file it is taken."""
    with pytest.raises(ValueError, match="limits the models of the only key"):
        AuthSettings(_env_file=None, api_keys="a:s;models=flux").read_keys()
    (tmp_path / "keys").write_text("root:t;admin\n")
    keys = AuthSettings(_env_file=None, api_keys="a:s;models=flux", api_keys_file=tmp_path / "keys").read_keys()
    assert [key.models for key in keys] == [("flux",), ()]


def test_our_own_routes_refuse_other_models_and_draw_with_the_first_permitted(app: RunningApp) -> None:
    """By query, form and JSON; an unknown model is told nothing else than one of another key; admins use all."""
    path = "/create_and_upload_image"
    ways = (
        {"params": {**SIZE, "model": "sdxl"}},
        {"data": {**SIZE, "model": "sdxl"}},
        {"json": {**SIZE, "model": "sdxl"}},
    )
    for method, given in zip(("GET", "POST", "POST"), ways, strict=True):
        answer = as_key(app, "a", method, path, **given)
        assert (answer.status_code, answer.json()["detail"]) == (403, REFUSED)
        assert answer.json()["type"].endswith("forbidden")
    unknown = as_key(app, "a", "GET", path, params={**SIZE, "model": "nonsense"})
    assert unknown.status_code == 403
    assert unknown.json()["detail"] == REFUSED.replace("sdxl", "nonsense")
    assert not app.squares.finished
    drawn = [as_key(app, key, "GET", path, params=SIZE).json()["model"] for key in "abcr"]
    assert drawn == ["flux", "sdxl", "sdxl", "sdxl"]
    for key in "cr":
        assert as_key(app, key, "GET", path, params={**SIZE, "model": "flux"}).status_code == 200
    nothing = as_key(app, "e", "GET", path, params=SIZE)
    assert (nothing.status_code, nothing.json()["detail"]) == (403, "The models that this key may use are not here.")


def test_openai_lists_and_draws_permitted_models_only(app: RunningApp) -> None:
    """OpenAI's own names mean the key's first model; aliases are permitted as the models that they lead to."""
    lists = {
        key: [model["id"] for model in as_key(app, key, "GET", "/v1/models").json()["data"]]
        for key in ("a", "b", "e", "r")
    }
    assert {key: sorted(names) for key, names in lists.items()} == {
        "a": ["dream", "flux"],
        "b": ["dream", "flux", "sdxl"],
        "e": [],
        "r": ["dream", "flux", "sdxl"],
    }
    for name in ("sdxl", "nonsense"):
        answer = as_key(app, "a", "GET", f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (403, REFUSED.replace("sdxl", name))
        body = {"prompt": "a red square", "size": "64x64", "model": name}
        answer = as_key(app, "a", "POST", "/v1/images/generations", json=body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (403, REFUSED.replace("sdxl", name))
    for name in ("flux", "dream", "gpt-image-1", None):
        body = {"prompt": "a red square", "size": "64x64", **({"model": name} if name else {})}
        answer = as_key(app, "a", "POST", "/v1/images/generations", json=body)
        assert answer.json()["data"][0]["model"] == "flux", answer.text
    streamed = as_key(app, "a", "POST", "/v1/images/generations", json={**body, "model": "sdxl", "stream": True})
    assert streamed.status_code == 403


def test_automatic1111_lists_and_draws_permitted_models_only(app: RunningApp) -> None:
    """Lists, options of any spelling, overrides, titles, and the model that an infotext names."""
    titles = [model["model_name"] for model in as_key(app, "a", "GET", "/sdapi/v1/sd-models").json()]
    assert titles == ["flux"]
    nets = {key: as_key(app, key, "GET", "/controlnet/model_list").json()["model_list"] for key in ("a", "e", "r")}
    assert [len(names) for names in nets.values()] == [1, 0, 2]
    kinds = as_key(app, "a", "GET", "/controlnet/control_types").json()["control_types"]
    assert kinds["Canny"]["model_list"] == ["None", *nets["a"]]
    page = as_key(app, "a", "GET", "/config").text
    assert "flux [" in page
    assert "sdxl" not in page
    every = as_key(app, "r", "GET", "/sdapi/v1/sd-models").json()
    sdxl = next(model for model in every if model["model_name"] == "sdxl")
    assert as_key(app, "a", "GET", "/sdapi/v1/options").json()["sd_model_checkpoint"].startswith("flux [")
    for name in ("sdxl", "SDXL.safetensors", sdxl["title"], sdxl["hash"]):
        changed = as_key(app, "a", "POST", "/sdapi/v1/options", json={"sd_model_checkpoint": name})
        assert changed.status_code == 403, name
        body = {**SIZE, "steps": 1, "override_settings": {"sd_model_checkpoint": name}}
        refused = as_key(app, "a", "POST", "/sdapi/v1/txt2img", json=body)
        assert refused.status_code == 403, name
        assert "for it there are flux" in refused.text
    assert not app.squares.finished
    for extra in ({}, {"infotext": "a red square\nSteps: 1, Size: 64x64, Model: sdxl"}):
        answer = as_key(app, "a", "POST", "/sdapi/v1/txt2img", json={**SIZE, "steps": 1, **extra})
        assert json.loads(answer.json()["info"])["sd_model_name"] == "flux"
    assert {job.model for job in app.squares.finished} == {"flux"}


def test_readiness_and_the_api_document_name_no_other_models(run_app: Callable[..., RunningApp], registry: Any) -> None:
    """Remarks name files of other models, so limited keys do not read them; the document is public."""
    app = run_app(registry, api_keys=KEYS.replace("dream|", ""))
    listed = {
        key: [model["name"] for model in as_key(app, key, "GET", "/readyz").json()["models"]] for key in ("a", "b", "r")
    }
    assert listed == {"a": ["flux"], "b": ["sdxl"], "r": ["sdxl", "flux"]}
    ready = as_key(app, "r", "GET", "/readyz").json()
    assert "The API key eve may use 'gone', not a model here." in ready["remarks"]
    assert as_key(app, "a", "GET", "/readyz").json()["remarks"] == []
    properties = app.client.get("/openapi.json").json()["paths"]["/create_and_upload_image"]["get"]["parameters"]
    model = next(part for part in properties if part["name"] == "model")
    assert "enum" not in json.dumps(model)


def test_reasons_that_name_the_files_of_another_model_are_not_told() -> None:
    """The default model of the server may be one that the key may not use."""
    router = health_router(lambda: ["secret.safetensors ends too early."], bytes)
    for models, told in (((), True), (("flux",), False)):
        app = FastAPI()
        app.include_router(router)
        state = {"caller": Caller("ann", models=models)}

        async def with_caller(scope: Any, receive: Any, send: Any, app: Any = app, state: Any = state) -> None:
            await app({**scope, "state": state}, receive, send)

        answer = TestClient(with_caller).get("/readyz")
        assert answer.status_code == 503
        assert ("secret" in answer.text) is told
        assert answer.json()["missing"]


def test_a_replay_with_another_model_is_refused(run_app: Callable[..., RunningApp]) -> None:
    """The record of a picture names the model that drew it."""
    app = run_app(api_keys=KEYS)
    for model, status in (("sdxl", 403), ("flux", 200)):
        made = as_key(app, "r", "GET", "/create_and_upload_image", params={**SIZE, "model": model}).json()
        picture = as_key(app, "r", "GET", made["path"]).content
        answer = as_key(app, "a", "POST", "/v1/replay", files={"picture_file": picture})
        assert answer.status_code == status, answer.text


def test_a_job_is_refused_at_the_door_and_again_where_the_key_was_limited_since(
    run_app: Callable[..., RunningApp],
) -> None:
    """A job of yesterday's key fails with the same sentence; it is not drawn by the model it was accepted for."""
    held = FakeDenoiser(gate=threading.Event())
    keys = "ann:secret-a, root:secret-r;admin"
    app = run_app(held, api_keys=keys, jobs_concurrency=1, shutdown_grace_seconds=0.1)
    path, later = "/create_and_upload_image", {"headers": {"prefer": "respond-async"}}
    as_key(app, "r", "GET", path, params={**SIZE, "prompt": "the one that holds the others up"}, **later)
    until(lambda: app.squares.prepared != [])
    accepted = as_key(app, "a", "GET", path, params={**SIZE, "model": "sdxl"}, **later)
    assert accepted.status_code == 202
    stopping = threading.Thread(target=app.client.__exit__, args=(None, None, None))
    stopping.start()
    jobs = app.client.app.state.jobs  # type: ignore[attr-defined]  # FastAPI's state takes any attribute
    until(lambda: jobs.running == 0)
    assert held.gate is not None
    held.gate.set()
    stopping.join(30)
    again = run_app(api_keys="ann:secret-a;models=flux, root:secret-r;admin")
    job = f"/jobs/{accepted.json()['id']}"
    until(lambda: as_key(again, "a", "GET", job).json()["state"] in ("failed", "done"))
    ended = as_key(again, "a", "GET", job).json()
    assert (ended["state"], ended["problem"]["detail"]) == ("failed", REFUSED)
    refused = as_key(again, "a", "GET", path, params={**SIZE, "model": "sdxl"}, headers={"prefer": "respond-async"})
    assert refused.status_code == 403


def test_what_another_key_had_drawn_is_not_answered_from_the_store(tmp_path: Path) -> None:
    """Not by the cache without I/O, not by the store, not as a job; without a model the permitted one draws."""
    harness = ServiceHarness(tmp_path, FakeDenoiser())
    service, ann = harness.service, Caller("ann", models=("flux",))
    wanted = order(model="sdxl")

    async def run() -> None:
        await service.generate(wanted)
        for call in (
            lambda: service.generate(wanted, caller=ann),
            lambda: service.generate_with_bytes(wanted, caller=ann),
            lambda: service.validate(wanted, ann),
            lambda: service.prepare_for_storage(wanted, ann),
            lambda: asyncio.to_thread(service.lookup_cached, wanted, ann),
        ):
            with pytest.raises(Forbidden):
                await call()
        prepared, _ = await service.prepare_for_storage(order(), ann)
        assert prepared.model == "flux"  # a job keeps it, whatever becomes of the key
        assert (await service.generate(order(), caller=ann)).model == "flux"

    try:
        asyncio.run(run())
    finally:
        harness.engine.stop(5)
        service.close()
