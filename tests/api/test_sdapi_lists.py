"""AUTOMATIC1111's lists and orders, its ControlNet extension and its page, as clients ask them at start."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import webuiapi
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of
from live_servers import LiveServer
from PIL import Image

from stable_diffusion_server.api.automatic1111.list_bodies import memory_body
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.imaging import canny
from stable_diffusion_server.pipelines import MODELS

EMPTY = (
    *("sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles"),
    *("extensions", "lycos", "artists", "artist-categories"),
)
LISTS = [*EMPTY, "upscalers", "latent-upscale-modes", "schedulers", "script-info"]
OBJECTS = {"embeddings": {"loaded", "skipped"}, "scripts": {"txt2img", "img2img"}, "memory": {"ram", "cuda"}}
ORDERS = "refresh-checkpoints refresh-vae refresh-loras refresh-embeddings unload-checkpoint reload-checkpoint".split()
STOPPING = ["server-kill", "server-restart", "server-stop"]
TRAINING = ["create/embedding", "create/hypernetwork", "train/embedding", "train/hypernetwork"]
PICTURE = base64.b64encode(file_of(disc(64, 48))).decode()


def test_every_list_is_a_list(running_app: RunningApp) -> None:
    """200 with a list of objects; each entry of a menu has a name."""
    for name in LISTS:
        answer = running_app.client.get(f"/sdapi/v1/{name}")
        assert answer.status_code == 200, name
        items = answer.json()
        assert isinstance(items, list), name
        assert bool(items) == (name not in EMPTY), name
        assert all(item["name"] for item in items), name


def test_lists_that_are_objects_have_their_members(running_app: RunningApp) -> None:
    """AUTOMATIC1111's shape also where there is nothing to list."""
    for name, members in OBJECTS.items():
        answer = running_app.client.get(f"/sdapi/v1/{name}")
        assert (answer.status_code, set(answer.json())) == (200, members)


def test_the_client_library_reads_every_list(live_of: Callable[..., LiveServer]) -> None:
    """All `get_*` methods of webuiapi, which would index an error body as a list."""
    client = webuiapi.WebUIApi(baseurl=f"{live_of().url}/sdapi/v1")
    client.session.headers["Connection"] = "close"
    for name in (
        *("get_options", "get_cmd_flags", "get_progress", "get_samplers", "get_sd_vae", "get_upscalers"),
        *("get_latent_upscale_modes", "get_loras", "get_sd_models", "get_hypernetworks", "get_face_restorers"),
        *(
            "get_realesrgan_models",
            "get_prompt_styles",
            "get_scripts",
            "get_embeddings",
            "get_memory",
            "get_schedulers",
        ),
        *("get_artist_categories", "get_artists", "refresh_checkpoints"),
    ):
        result = getattr(client, name)()
        assert not (isinstance(result, dict) and "error" in result), name
    assert "Lanczos" in [upscaler["name"] for upscaler in client.get_upscalers()]
    client.session.close()


def test_orders_that_change_nothing_are_accepted(running_app: RunningApp) -> None:
    """With any body, as clients send them: null, a text, an object. A request afterwards generates as before."""
    for name in (*ORDERS, "skip"):
        for body in (None, "", {}, {"id_task": "a"}):
            answer = running_app.client.post(f"/sdapi/v1/{name}", json=body)
            assert (answer.status_code, answer.json()) == (200, {} if name.endswith("load-checkpoint") else None)
    asked = {"prompt": "a red square", "width": 64, "height": 64}
    assert running_app.client.post("/sdapi/v1/txt2img", json=asked).status_code == 200


def test_orders_that_are_refused_say_why(running_app: RunningApp) -> None:
    """Not 404, which clients take for a server without the API; the server goes on."""
    for name, status in [*((name, 403) for name in (*STOPPING, *TRAINING)), ("interrogate", 422)]:
        answer = running_app.client.post(f"/sdapi/v1/{name}", json={"image": PICTURE, "model": "clip"})
        assert answer.status_code == status, name
        assert len(answer.json()["detail"]) > 20, name
    assert running_app.client.get("/healthz").status_code == 200


def test_an_unknown_route_is_still_not_found(running_app: RunningApp) -> None:
    """404 with the detail by which clients recognise a missing API."""
    for path in ("/sdapi/v1/nothing", "/controlnet/nothing", "/internal/nothing"):
        answer = running_app.client.get(path)
        assert (answer.status_code, answer.json()["detail"]) == (404, "Not Found")


def test_memory_is_reported_to_key_holders_only(run_app: Callable[..., RunningApp]) -> None:
    """Bytes of the process and the machine; an anonymous caller learns nothing of the machine."""
    running_app = run_app(api_keys="ann:a", allow_anonymous=True)
    known = running_app.client.get("/sdapi/v1/memory", headers={"X-API-Key": "a"}).json()["ram"]
    assert 0 < known["used"] < known["total"]
    assert set(running_app.client.get("/sdapi/v1/memory").json()["ram"]) == {"error"}


def test_memory_of_an_accelerator_has_its_kinds() -> None:
    """The first CUDA device in AUTOMATIC1111's shape; a CPU is no accelerator, nor is one that does not answer."""
    kinds = {"used": 5, "reserved": 7, "free": 11}

    def cuda(devices: dict[str, dict[str, int]]) -> Any:
        context = DialectContext(RequestLimits(), {}, "", {}, 1, 1, device_memory=lambda: devices)
        return memory_body(context, anonymous=False)["cuda"]

    assert cuda({"cuda:0": kinds})["system"] == {"free": 11, "used": 7, "total": 18}
    assert cuda({"cpu": kinds}) == cuda({"cuda:0": {}}) == {"error": "unavailable"}


def test_controlnet_lists_what_the_models_have(running_app: RunningApp) -> None:
    """Canny for both models; each listed model and module is accepted in a unit."""
    client = running_app.client
    models = client.get("/controlnet/model_list?update=true").json()["model_list"]
    assert len(models) == 2
    assert all("canny" in name for name in models)
    modules = client.get("/controlnet/module_list?alias_names=true").json()
    assert (
        {"none", "canny", "tile_resample", "inpaint_only"} <= {*modules["module_list"]} == {*modules["module_detail"]}
    )
    assert "openpose" not in modules["module_list"]  # its model files are not here
    sliders = [slider["name"] for slider in modules["module_detail"]["canny"]["sliders"]]
    assert sliders == ["Preprocessor Resolution", "Low Threshold", "High Threshold"]
    assert client.get("/controlnet/version").json()["version"] >= 2
    assert client.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    kinds = client.get("/controlnet/control_types").json()["control_types"]
    assert kinds["Canny"]["default_option"] == "canny"
    assert kinds["Canny"]["default_model"] in models


def test_a_listed_controlnet_draws(run_app: Callable[..., RunningApp]) -> None:
    """A unit with module and model from the lists, as AI-Render sends it, follows edges without a warning."""
    running_app = run_app(FakeImageDenoiser())
    model = running_app.client.get("/controlnet/model_list").json()["model_list"][0]
    unit = {"module": "canny", "model": model}
    asked = {
        "prompt": "a green square", "width": 64, "height": 64, "init_images": [PICTURE],
        "alwayson_scripts": {"controlnet": {"args": [unit]}},
    }  # fmt: skip
    answer = running_app.client.post("/sdapi/v1/img2img", json=asked)
    assert answer.status_code == 200, answer.text
    (job,) = running_app.squares.finished
    assert job.control is not None


def detected(running_app: RunningApp, **changes: Any) -> Any:
    asked = {"controlnet_module": "canny", "controlnet_input_images": [PICTURE], **changes}
    return running_app.client.post("/controlnet/detect", json=asked)


def test_detect_answers_edges(running_app: RunningApp) -> None:
    """White on black at the size of the preprocessor; thresholds count, also as text; `none` answers the image."""
    answer = detected(running_app)
    assert answer.json()["info"] == "Success"
    assert pixels_of(answer).shape == (512, 683, 3)
    small = detected(running_app, controlnet_processor_res="64", controlnet_threshold_a=100.0)
    found = pixels_of(small)
    assert found.shape == (64, 85, 3)
    assert set(np.unique(found)) == {0, 255}
    none = detected(running_app, controlnet_processor_res=64, controlnet_threshold_a=255, controlnet_threshold_b=255)
    assert pixels_of(none).mean() <= found.mean()
    same = pixels_of(detected(running_app, controlnet_module="none"))
    assert (same == disc(64, 48)).all()
    both = detected(running_app, controlnet_input_images=[PICTURE, "data:image/png;base64," + PICTURE])
    assert len(both.json()["images"]) == 2
    older = detected(running_app, controlnet_input_images=None, controlnet_images=[PICTURE])
    assert (pixels_of(older) == pixels_of(answer)).all()


def test_edges_are_those_of_the_server(running_app: RunningApp) -> None:
    """At the image's own size the map equals the one that a generation follows."""
    large = disc(64, 64)
    answer = detected(
        running_app,
        controlnet_input_images=[base64.b64encode(file_of(large)).decode()],
        controlnet_processor_res=64,
    )
    assert (pixels_of(answer) == canny(large)).all()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"controlnet_module": "openpose"}, "controlnet_module"),
    ({"controlnet_input_images": []}, "controlnet_input_images"),
    ({"controlnet_input_images": ["%"]}, "controlnet_input_images"),
    ({"controlnet_input_images": [base64.b64encode(b"no image").decode()]}, "controlnet_input_images"),
    ({"controlnet_input_images": PICTURE}, "controlnet_input_images"),
    ({"controlnet_threshold_a": "much"}, "controlnet_threshold_a"),
    ({"controlnet_input_images": [base64.b64encode(file_of(disc(2048, 1))).decode()]}, "controlnet_input_images"),
    ({"controlnet_processor_res": 2048, "controlnet_input_images": [PICTURE] * 9}, "controlnet_input_images"),
]


def test_what_detect_cannot_do_is_refused(running_app: RunningApp) -> None:
    """By its name: other modules, no image, no base64, a result that is too long or too much for one response."""
    for changes, field in REFUSED:
        answer = detected(running_app, **changes)
        assert answer.status_code in (415, 422), str(changes)[:100]
        assert answer.json()["errors"][0]["field"] == field, str(changes)[:100]


def pixels_of(answer: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))))


def test_the_page_has_the_lists_that_clients_read_from_it(run_app: Callable[..., RunningApp]) -> None:
    """`/config` as aiyabot and the Photoshop plug-in read it: lists by `elem_id` in the components."""
    running_app = run_app(api_keys="ann:a, bob:b")
    headers = {"X-API-Key": "a"}
    config = running_app.client.get("/config", headers=headers).json()
    choices = {part["props"]["elem_id"]: part["props"].get("choices") for part in config["components"]}
    assert {"None", "Lanczos"} <= set(choices["txt2img_hr_upscaler"])
    assert choices["setting_sd_lora"] == ["None"]
    assert ["none", "canny"] in [(part["props"].get("choices") or [])[:2] for part in config["components"]]
    assert len(choices["setting_sd_model_checkpoint"]) == len(MODELS)
    assert running_app.client.get("/user", headers=headers).json() == "ann"
    assert running_app.client.get("/app_id", headers=headers).json()["app_id"] == config["app_id"]
    assert running_app.client.get("/internal/ping", headers=headers).json() == {}


def test_without_keys_nobody_is_named(running_app: RunningApp) -> None:
    """`/user` is null, as in Gradio without a login."""
    answer = running_app.client.get("/user")
    assert (answer.status_code, answer.json()) == (200, None)


def test_a_missing_key_is_asked_for_by_http_basic(run_app: Callable[..., RunningApp]) -> None:
    """401 with the challenge that AUTOMATIC1111's clients understand, on all paths of this dialect."""
    running_app = run_app(api_keys="ann:a")
    for path in ("/sdapi/v1/txt2img", "/sdapi/v1/nothing", "/controlnet/version", "/config", "/user", "/app_id"):
        answer = running_app.client.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Basic "), path
        assert answer.json()["error"], path
    assert running_app.client.get("/history").headers["www-authenticate"] == "Bearer"


def test_booleans_of_a_query_are_those_of_automatic1111(running_app: RunningApp) -> None:
    """`skip_current_image=yes` and its other spellings; another word is refused by name."""
    for word in ("yes", "No", "on", "OFF", "t", "y", "1", "true"):
        assert running_app.client.get(f"/sdapi/v1/progress?skip_current_image={word}").status_code == 200
    assert running_app.client.get("/sdapi/v1/progress?skip_current_image=perhaps").status_code == 422


def test_options_are_answered_at_every_route(running_app: RunningApp) -> None:
    """OPTIONS without an Origin, by which clients ask whether a server is there, lists the methods of the path."""
    document = running_app.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        answer = running_app.client.options(re.sub(r"\{\w+\}", "a", path))
        assert answer.status_code == 204, path
        assert {method.upper() for method in operations} <= set(answer.headers["allow"].split(", ")), path
    assert running_app.client.options("/sdapi/v1/nothing").status_code == 404


def test_json_without_a_content_type_is_taken(running_app: RunningApp) -> None:
    """At every route of this dialect that reads a body, as `requests.post(data=json.dumps(…))` sends it."""
    large = base64.b64encode(file_of(np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8))).decode()
    assert len(large) > 1_048_576
    bodies: dict[str, dict[str, Any]] = {
        "/sdapi/v1/txt2img": {"prompt": "a red square", "width": 64, "height": 64},
        "/sdapi/v1/options": {"send_seed": True},
        "/sdapi/v1/png-info": {"image": large},
        "/sdapi/v1/extra-single-image": {"image": large},
        "/sdapi/v1/extra-batch-images": {"imageList": [{"data": large}]},
        "/controlnet/detect": {"controlnet_input_images": [large], "controlnet_module": "canny"},
        "/internal/progress": {"id_task": "a"},
        "/sdapi/v1/refresh-loras": {},
    }
    for path, body in bodies.items():
        answer = running_app.client.post(path, content=json.dumps(body).encode())
        assert "content-type" not in answer.request.headers
        assert answer.status_code == 200, (path, answer.text[:200])
