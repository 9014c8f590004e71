"""Checks that real responses match the OpenAPI document, and that the document names every member of each response."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import RunningApp
from fakes import disc, file_of, settings_in, until
from jsonschema import Draft202012Validator

from stable_diffusion_server.api.automatic1111.list_bodies import styles_body
from stable_diffusion_server.api.automatic1111.responses import loras_body
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.generation import PromptExpander, PromptFiles, RequestLimits

_ASKED = {"prompt": "a red square", "width": 64, "height": 64}
_BY_JOB = {"Prefer": "respond-async"}
_TEXT = base64.b64encode(file_of(disc())).decode()


def closed(shape: Any) -> Any:
    """Copy of a schema in which every object with named members forbids additional ones."""
    if isinstance(shape, list):
        return [closed(part) for part in shape]
    if not isinstance(shape, dict):
        return shape
    parts = {name: closed(part) for name, part in shape.items()}
    return {**parts, "additionalProperties": False} if "properties" in shape else parts


def faults_of(document: dict[str, Any], name: str, body: Any) -> list[str]:
    """Differences between a body and the schema of that name, including members that the schema does not name."""
    schema = closed({"$ref": f"#/components/schemas/{name}", "components": document["components"]})
    return [f"{fault.json_path}: {fault.message[:200]}" for fault in Draft202012Validator(schema).iter_errors(body)]


def answered(document: dict[str, Any]) -> set[str]:
    """Names of the schemas that the operations return, alone or in a list."""
    contents = [
        content["schema"]
        for operations in document["paths"].values()
        for operation in operations.values()
        for response in operation["responses"].values()
        for content in response.get("content", {}).values()
    ]
    refs = [{**schema, **schema.get("items", {})}.get("$ref", "") for schema in contents]
    return {ref.rpartition("/")[2] for ref in refs if ref}


def job_of(running_app: RunningApp, **changes: Any) -> dict[str, Any]:
    """A finished job, as GET /jobs/ID returns it."""
    asked = running_app.client.post("/create_and_upload_image", json={**_ASKED, **changes}, headers=_BY_JOB)
    path = asked.headers["location"]
    until(lambda: running_app.client.get(path).json()["state"] in ("done", "failed"))
    body: dict[str, Any] = running_app.client.get(path).json()
    return body


def events_of(running_app: RunningApp) -> list[Any]:
    """Data of all server-sent events of a job that is followed to its end."""
    asked = running_app.client.post("/create_and_upload_image", json={**_ASKED, "seed": 7}, headers=_BY_JOB)
    text = running_app.client.get(f"{asked.headers['location']}/events").text
    return [json.loads(data) for data in re.findall(r"^data: (.*)$", text, re.MULTILINE)]


def answers(running_app: RunningApp) -> Iterator[tuple[str, Any]]:
    """Schema names and bodies of real responses: at least one per schema, every variant for some."""
    client = running_app.client
    receipt = running_app.draw(prompt="a red square", save_path="a.png")
    yield "GenerationResult", receipt.json()
    yield "GenerationResult", running_app.draw(prompt="a blue square", save_path="a.png").json()
    long = running_app.draw(prompt="a red square " * 60, width=70, height=70)
    yield "GenerationResult", long.json()
    assert "prompt_used" in long.json()
    yield "Problem", running_app.draw(prompt="", width=1).json()
    yield "Problem", client.get("/files/none.webp").json()
    yield "OpenAIError", client.post("/v1/images/generations", json={"prompt": ""}).json()
    yield "Automatic1111Error", client.post("/sdapi/v1/txt2img", json={"prompt": "a", "width": 1}).json()
    yield "JobStatus", client.post("/create_and_upload_image", json=_ASKED, headers=_BY_JOB).json()
    yield "JobStatus", job_of(running_app, prompt="a green square")
    yield "JobStatus", job_of(running_app, prompt="unsteppable")
    yield from (("JobEvent", body) for body in events_of(running_app))
    yield "JobList", client.get("/jobs").json()
    yield "HistoryPage", client.get("/history").json()
    yield "HistoryPage", client.get("/history?limit=1").json()
    yield "OpenAIImages", client.post("/v1/images/generations", json={"prompt": "a red square", "size": "64x64"}).json()
    in_text = {"prompt": "a red square", "size": "64x64", "response_format": "b64_json", "quality": "high", "n": 2}
    yield "OpenAIImages", client.post("/v1/images/generations", json=in_text).json()
    yield "OpenAIModelList", client.get("/v1/models").json()
    yield "OpenAIModel", client.get("/v1/models/sdxl").json()
    pictures = client.post("/sdapi/v1/txt2img", json={**_ASKED, "restore_faces": True, "foo": 1}).json()
    yield "Automatic1111Images", pictures
    yield "Automatic1111Images", client.post("/sdapi/v1/img2img", json={**_ASKED, "init_images": [_TEXT]}).json()
    yield "Automatic1111Progress", client.get("/sdapi/v1/progress").json()
    yield "Automatic1111TaskProgress", client.post("/internal/progress", json={"id_task": "none"}).json()
    yield "Automatic1111Options", client.get("/sdapi/v1/options").json()
    yield from (("Automatic1111Model", item) for item in client.get("/sdapi/v1/sd-models").json())
    yield from (("Automatic1111Sampler", item) for item in client.get("/sdapi/v1/samplers").json())
    assert client.get("/sdapi/v1/loras").json() == []
    context = DialectContext(RequestLimits(), {}, "", {}, max_n=1, max_response_bytes=1, loras=lambda: ["pastel"])
    yield "Automatic1111Lora", loras_body(context)[0]
    yield "Automatic1111PngInfo", client.post("/sdapi/v1/png-info", json={"image": pictures["images"][0]}).json()
    yield "Automatic1111PngInfo", client.post("/sdapi/v1/png-info", json={"image": _TEXT}).json()
    yield from automatic1111_lists(running_app)
    picture = client.get(receipt.json()["path"]).content
    yield "ReplayResult", client.post("/v1/replay", files={"picture_file": ("a.png", picture, "image/png")}).json()
    yield "Verification", client.post("/v1/verify", files={"image_file": ("a.png", picture, "image/png")}).json()
    yield "ImageRecord", client.get(f"/files/{receipt.json()['key']}?record=1").json()
    making = {"input": _ASKED, "version": "sdxl", "webhook_events_filter": ["completed"]}
    yield "Prediction", client.post("/v1/predictions", json=making, headers={"Prefer": "wait"}).json()
    yield "Prediction", client.post("/v1/models/a/sdxl/predictions", json={"input": _ASKED}).json()
    yield "PredictionList", client.get("/v1/predictions").json()
    yield "Version", client.get("/v1/models/a/sdxl/versions/sdxl").json()
    yield "Health", client.get("/healthz").json()
    yield "Readiness", client.get("/readyz").json()


def automatic1111_lists(running_app: RunningApp) -> Iterator[tuple[str, Any]]:
    """Responses of AUTOMATIC1111's lists, of its extension and its page, and of enlarging."""
    client = running_app.client
    for path, name in (
        ("/sdapi/v1/upscalers", "Automatic1111Upscaler"),
        ("/sdapi/v1/latent-upscale-modes", "Automatic1111LatentMode"),
        ("/sdapi/v1/schedulers", "Automatic1111Scheduler"),
        ("/sdapi/v1/script-info", "Automatic1111ScriptInfo"),
    ):
        items = client.get(path).json()
        assert items
        yield from ((name, item) for item in items)
    for path, name in (
        ("/sdapi/v1/embeddings", "Automatic1111Embeddings"),
        ("/sdapi/v1/scripts", "Automatic1111Scripts"),
        ("/sdapi/v1/cmd-flags", "Automatic1111Flags"),
        ("/sdapi/v1/memory", "Automatic1111Memory"),
        ("/controlnet/version", "ControlNetVersion"),
        ("/adetailer/v1/version", "AdetailerVersion"),
        ("/adetailer/v1/ad_model", "AdetailerModels"),
        ("/controlnet/model_list", "ControlNetModels"),
        ("/controlnet/module_list", "ControlNetModules"),
        ("/controlnet/settings", "ControlNetSettings"),
        ("/controlnet/control_types", "ControlNetTypes"),
        ("/config", "GradioConfig"),
        ("/app_id", "GradioAppId"),
    ):
        yield name, client.get(path).json()
    sheet = running_app.folder / "styles.csv"
    sheet.write_text("name,prompt\noil,oil painting\n")
    context = DialectContext(RequestLimits(), {}, "", {}, 1, 1, expander=PromptExpander(PromptFiles(sheet)))
    yield "Automatic1111Style", styles_body(context)[0]
    edges = {"controlnet_module": "canny", "controlnet_input_images": [_TEXT]}
    yield "ControlNetDetect", client.post("/controlnet/detect", json=edges).json()
    yield "Automatic1111ExtraImage", client.post("/sdapi/v1/extra-single-image", json={"image": _TEXT}).json()
    batch = {"imageList": [{"data": _TEXT, "name": "a.png"}]}
    yield "Automatic1111ExtraImages", client.post("/sdapi/v1/extra-batch-images", json=batch).json()


def test_every_answer_has_the_members_its_schema_names_and_no_others(running_app: RunningApp) -> None:
    """Compares real responses with the document with every object closed; each schema needs at least one response."""
    document = running_app.client.get("/openapi.json").json()
    faults, seen = [], set()
    for name, body in answers(running_app):
        seen.add(name)
        faults += [f"{name} {fault}" for fault in faults_of(document, name, body)]
    assert faults == []
    assert seen == answered(document) | {"JobEvent"}


def test_readiness_names_everything_that_is_said_of_a_loaded_model(registry: Any, running_app: RunningApp) -> None:
    """Tests /readyz of a server that loaded the embedded models."""
    document = running_app.client.get("/openapi.json").json()
    loaded = ModelState.of(settings_in(running_app.folder))
    loaded.models = registry
    models = json.loads(json.dumps(loaded.describe()))
    assert len(models) == 2
    body = {"status": "ready", "missing": [], "models": models}
    assert faults_of(document, "Readiness", body) == []


@pytest.mark.parametrize("change", ["added", "removed", "of another type"])
def test_the_check_itself_sees_a_difference(running_app: RunningApp, change: str) -> None:
    """An extra member, a missing member and a wrong type are each reported: the check itself can fail."""
    document = running_app.client.get("/openapi.json").json()
    body = running_app.client.get("/readyz").json()
    assert faults_of(document, "Readiness", body) == []
    body = {"added": {**body, "extra": 1}, "removed": {"status": "ready"}, "of another type": {**body, "missing": "a"}}[
        change
    ]
    assert faults_of(document, "Readiness", body)
