"""The AUTOMATIC1111 API, called with the client library that its users have."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import webuiapi
from conftest import RunningApp
from fakes import COLOURS, Canvas, FakeDenoiser, FakeImageDenoiser, disc, file_of, until
from live_servers import LiveServer
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

SIZE = {"width": 64, "height": 64}
TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


def client_of(live: LiveServer, **more: Any) -> webuiapi.WebUIApi:
    client = webuiapi.WebUIApi(baseurl=f"{live.url}/sdapi/v1", sampler="Euler", steps=4, **more)
    client.session.headers["Connection"] = "close"  # the library never closes its connections
    client.session.close()
    return client


@pytest.fixture
def live(live_of: Callable[..., LiveServer]) -> LiveServer:
    """A server with fake image-to-image models."""
    return live_of(FakeImageDenoiser())


@pytest.fixture
def client(live: LiveServer) -> webuiapi.WebUIApi:
    """A client of that server."""
    return client_of(live)


def pixels_of(result: webuiapi.WebUIApiResult) -> NDArray[np.uint8]:
    return np.asarray(result.image.convert("RGB"))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_picture_comes_with_how_it_was_made(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """The requested size, seed, steps and guidance, in the response and in the job; PNG, as AUTOMATIC1111 sends it."""
    result = client.txt2img(prompt="a red square", seed=7, cfg_scale=2.0, **SIZE)
    assert (result.image.size, result.image.format) == ((64, 64), "PNG")
    assert (result.info["seed"], result.info["all_seeds"], result.info["steps"]) == (7, [7], 4)
    assert "a red square" in result.info["infotexts"][0]
    assert result.info["not_honoured"] == []
    (job,) = live.squares.finished
    assert (job.seed, job.num_inference_steps, job.guidance_scale, job.scheduler) == (7, 4, 2.0, "euler")


def test_no_seed_is_another_picture_each_time_and_several_count_on(client: webuiapi.WebUIApi) -> None:
    """-1 is random; the `batch_size` × `n_iter` images have consecutive seeds."""
    first, second = (client.txt2img(prompt="a red square", **SIZE) for _ in range(2))
    assert first.info["seed"] != second.info["seed"]
    several = client.txt2img(prompt="a red square", seed=5, batch_size=2, n_iter=2, **SIZE)
    assert several.info["all_seeds"] == [5, 6, 7, 8]
    assert len(several.images) == 4


@pytest.mark.parametrize(
    ("sampler", "ours", "reported"),
    [
        ("Euler", "euler", False),
        ("Euler a", "euler_a", False),
        ("euler a", "euler_a", False),
        ("DDIM", "ddim", False),
        ("Euler a Karras", "euler_a", False),
        ("DPM++ 2M Karras", "dpm_2m", False),
        ("Restart", "dpm_2s_a", True),
        ("UniPC", "unipc", False),
        ("ddim", "ddim", False),
    ],
)
def test_samplers_are_mapped_and_inexact_ones_are_reported(
    live: LiveServer, client: webuiapi.WebUIApi, sampler: str, ours: str, reported: bool
) -> None:
    """The closest scheduler, and a warning where the sampler or its timestep spacing differs."""
    result = client.txt2img(prompt="a red square", sampler_name=sampler, **SIZE)
    assert live.squares.finished[0].scheduler == ours
    assert bool(result.info["not_honoured"]) == reported


def test_what_is_known_and_not_honoured_is_reported(client: webuiapi.WebUIApi) -> None:
    """By name; parameters at their defaults are not reported: a plain call with forty defaults reports nothing."""
    plain = client.txt2img(prompt="a red square", **SIZE)
    assert plain.info["not_honoured"] == []
    result = client.txt2img(
        prompt="a (red:1.3) square", restore_faces=True, tiling=True, styles=["anime"], subseed_strength=7,
        scheduler="KL Optimal", override_settings={"CLIP_stop_at_last_layers": 2}, **SIZE,
    )  # fmt: skip
    said = " ".join(result.info["not_honoured"])
    for name in ("restore_faces", "tiling", "styles", "subseed_strength", "CLIP_stop_at_last_layers"):
        assert name in said
    assert "brackets" not in said  # SDXL reads weights
    assert "scheduler: KL Optimal" in said


def test_a_model_is_chosen_for_one_call_or_for_the_caller(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """By `override_settings` or by the options endpoint, under title, name or alias."""
    titles = client.util_get_model_names()
    flux = next(title for title in titles if title.startswith("flux"))
    client.txt2img(prompt="a red square", override_settings={"sd_model_checkpoint": flux}, **SIZE)
    client.txt2img(prompt="a red square", **SIZE)
    client.util_set_model("flux", find_closest=True)
    assert client.util_get_current_model() == flux
    client.txt2img(prompt="a red square", **SIZE)
    assert [job.model for job in live.squares.finished] == ["flux", "sdxl", "flux"]


def test_lists_are_in_its_shapes(client: webuiapi.WebUIApi) -> None:
    """Models, samplers, LoRAs and options in AUTOMATIC1111's formats."""
    assert {model["model_name"] for model in client.get_sd_models()} == {"sdxl", "flux"}
    assert {"Euler", "Euler a", "DDIM"} <= set(client.util_get_sampler_names())
    assert client.get_loras() == []
    assert client.get_options()["samples_format"] == "png"


def test_an_image_is_redrawn_at_the_size_asked_for(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """With `denoising_strength`; stretched, cropped or padded as `resize_mode` says."""
    image = Image.fromarray(disc(128, 64))
    for mode in (0, 1, 2):
        result = client.img2img(
            images=[image], prompt="a green square", denoising_strength=0.5, resize_mode=mode, seed=1, **SIZE
        )
        assert result.image.size == (64, 64)
    assert {job.strength for job in live.squares.finished} == {0.5}
    assert len({job.image.digest for job in live.squares.finished if job.image}) == 3


@pytest.mark.parametrize("inverted", [0, 1])
@pytest.mark.parametrize("only_masked", [False, True])
def test_a_mask_is_repainted_and_nothing_else(client: webuiapi.WebUIApi, only_masked: bool, inverted: int) -> None:
    """Every pixel outside the mask equals the input; whole image or only the masked area; the mask may be inverted."""
    pixels = disc(128, 128)
    mask = np.zeros((128, 128), np.uint8)
    mask[40:60, 50:80] = 255
    result = client.img2img(
        images=[Image.fromarray(pixels)], mask_image=Image.fromarray(mask ^ (255 * inverted)), mask_blur=0,
        prompt="a green square", inpaint_full_res=only_masked, inpaint_full_res_padding=8, seed=16, width=128,
        height=128, inpainting_mask_invert=inverted, denoising_strength=1.0,
    )  # fmt: skip
    drawn = pixels_of(result)
    assert drawn.shape == pixels.shape
    assert (drawn[mask == 0] == pixels[mask == 0]).all()
    assert np.abs(drawn[43:57, 53:77].astype(int) - COLOURS["green"]).max() <= 3


def test_only_the_part_around_the_mask_is_drawn_at_full_size(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """A small mask in a large image gets all of the model's pixels; the result has the input's size."""
    mask = np.zeros((300, 400), np.uint8)
    mask[100:120, 200:220] = 255
    result = client.img2img(
        images=[Image.fromarray(disc(400, 300))], mask_image=Image.fromarray(mask), prompt="a green square",
        inpaint_full_res=True, inpaint_full_res_padding=10, width=128, height=128,
    )  # fmt: skip
    assert result.image.size == (400, 300)
    (job,) = live.squares.finished
    assert job.mask is not None
    assert job.mask.pixels.mean() > 40  # a quarter of what is generated, and a three-hundredth of the image
    assert (result.info["width"], result.info["height"]) == (400, 300)


def test_what_the_mask_hides_is_filled_as_asked(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """Surroundings, original, noise and grey give four different start images."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    for fill in range(4):
        client.img2img(
            images=[Image.fromarray(disc(64, 64))], mask_image=Image.fromarray(mask), prompt="a green square",
            inpainting_fill=fill, seed=1, inpaint_full_res=False, **SIZE,
        )  # fmt: skip
    assert len({job.image.digest for job in live.squares.finished if job.image}) == 4


def test_a_controlnet_unit_follows_edges(live: LiveServer, client: webuiapi.WebUIApi) -> None:
    """With its own image in txt2img, with the init image in img2img; thresholds and weight are applied."""
    image = Image.fromarray(disc(64, 64))
    unit = webuiapi.ControlNetUnit(
        image=image, module="canny", model="control_canny", weight=0.8, threshold_a=50, threshold_b=150
    )
    drawn = client.txt2img(prompt="a green square", controlnet_units=[unit], **SIZE)
    assert drawn.info["not_honoured"] == []
    client.img2img(images=[image], prompt="a green square", controlnet_units=[unit], denoising_strength=0.5, **SIZE)
    by_words, by_picture = live.squares.finished
    assert by_words.control is not None
    assert by_words.control.digest == (by_picture.control.digest if by_picture.control else "")
    assert (by_words.strength, by_words.control_scale, by_picture.strength) == (1.0, 0.8, 0.5)
    pose = webuiapi.ControlNetUnit(image=image, module="openpose", model="control_openpose", guidance_end=0.5)
    refused = client.txt2img(prompt="a green square", controlnet_units=[unit, pose], seed=2, **SIZE)
    assert "openpose" in " ".join(refused.info["not_honoured"])


class Sketching(FakeDenoiser):
    """Backend that reports progress and stops at a gate."""

    def preview(self, state: Canvas) -> NDArray[np.uint8]:
        return np.full((8, 8, 3), state.index, np.uint8)


def test_progress_tells_of_ones_own_task_alone(live_of: Callable[..., LiveServer]) -> None:
    """Steps, fraction, preview, also by task id; another key sees nothing and stops nothing."""
    squares = Sketching(seconds_per_step=0.05)
    live = live_of(squares, api_keys="ann:a, bob:b")
    ann, bob = client_of(live, username="ann", password="a"), client_of(live, username="bob", password="b")  # noqa: S106  # keys of this test alone
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(_task, ann, "mine", 60)
        until(lambda: ann.get_progress()["current_image"] is not None)
        reported = ann.get_progress()
        assert 0 < reported["progress"] < 1
        assert reported["state"]["sampling_steps"] == 60
        assert reported["state"]["sampling_step"] > 0
        assert reported["state"]["job"] == "mine"
        assert bob.get_progress()["progress"] == 0
        assert bob.get_progress()["state"]["job_count"] == 0
        by_name = ann.session.post(f"{live.url}/internal/progress", json={"id_task": "mine"}).json()
        other = ann.session.post(f"{live.url}/internal/progress", json={"id_task": "other"}).json()
        assert (by_name["active"], by_name["completed"], other["completed"]) == (True, False, True)
        bob.interrupt()
        time.sleep(0.2)
        assert ann.get_progress()["state"]["interrupted"] is False
        ann.interrupt()
        result = drawing.result(20)
        assert (len(result["images"]), json.loads(result["info"])["interrupted"]) == (1, True)
    assert ann.get_progress()["progress"] == 0


def _task(client: webuiapi.WebUIApi, name: str, steps: int) -> Any:
    asked = {"prompt": "a red square", "steps": steps, "force_task_id": name, **SIZE}
    return client.session.post(f"{client.baseurl}/txt2img", json=asked).json()


def test_who_hangs_up_frees_the_device(run_app: Callable[..., RunningApp]) -> None:
    """When the client disconnects, its task is cancelled and leaves the list."""
    squares = FakeDenoiser(gate=threading.Event())
    running_app = run_app(squares)
    assert squares.gate is not None
    squares.gate.set()
    assert running_app.client.post(TXT2IMG, json={"prompt": "a red square", **SIZE}).status_code == 200
    assert running_app.client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_a_picture_tells_how_it_was_made(client: webuiapi.WebUIApi) -> None:
    """One of our images in any format, one of AUTOMATIC1111's, and one without metadata."""
    for file_format in ("png", "webp", "jpg"):
        result = client.txt2img(
            prompt="a red square, on blue", seed=7, override_settings={"samples_format": file_format}, **SIZE
        )
        answer = client.session.post(f"{client.baseurl}/png-info", json={"image": result.json["images"][0]}).json()
        assert "Seed: 7" in answer["info"]
        assert (answer["parameters"]["Prompt"], answer["parameters"]["Seed"]) == ("a red square, on blue", "7")
    theirs = Image.new("RGB", (8, 8))
    theirs.info["parameters"] = "a castle\nNegative prompt: blur\nSteps: 20, Seed: 5"
    read = client.png_info(theirs)
    assert read.info.startswith("a castle")
    assert client.png_info(Image.new("RGB", (8, 8))).info == ""


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (TXT2IMG, {"width": 63}, "width"),
    (TXT2IMG, {"height": 4096}, "height"),
    (TXT2IMG, {"steps": 0}, "steps"),
    (TXT2IMG, {"steps": True}, "steps"),
    (TXT2IMG, {"steps": "4.5"}, "steps"),
    (TXT2IMG, {"steps": "four"}, "steps"),
    (TXT2IMG, {"steps": 151}, "steps"),
    (TXT2IMG, {"cfg_scale": 30.5}, "cfg_scale"),
    (TXT2IMG, {"cfg_scale": "nan"}, "cfg_scale"),
    (TXT2IMG, {"seed": 2**64}, "seed"),
    (TXT2IMG, {"seed": -(2**63) - 1}, "seed"),
    (TXT2IMG, {"batch_size": 11}, "batch_size"),
    (TXT2IMG, {"batch_size": 8, "n_iter": 100}, "batch_size"),
    (TXT2IMG, {"batch_size": 0}, "batch_size"),
    (TXT2IMG, {"sampler_name": "x" * 201}, "sampler_name"),
    (TXT2IMG, {"enable_hr": "perhaps"}, "enable_hr"),
    (TXT2IMG, {"enable_hr": True, "hr_scale": 33}, "hr_scale"),
    (TXT2IMG, {"enable_hr": True, "hr_scale": 0.5}, "hr_scale"),
    (TXT2IMG, {"enable_hr": True, "hr_resize_x": 2049}, "hr_resize_x"),
    (TXT2IMG, {"enable_hr": True, "hr_second_pass_steps": 151}, "hr_second_pass_steps"),
    (TXT2IMG, {"enable_hr": True, "denoising_strength": 1.1}, "denoising_strength"),
    (TXT2IMG, {"override_settings": {"sd_model_checkpoint": "gpt-7"}}, "override_settings"),
    (TXT2IMG, {"override_settings": {"samples_format": "gif"}}, "override_settings"),
    (TXT2IMG, {"override_settings": []}, "override_settings"),
    (TXT2IMG, {"alwayson_scripts": {"ControlNet": {"args": "canny"}}}, "alwayson_scripts"),
    (TXT2IMG, {"alwayson_scripts": {"ControlNet": {"args": [{"module": "canny"}]}}}, "alwayson_scripts"),
    (TXT2IMG, {"alwayson_scripts": {"ControlNet": {"args": [{"module": "canny", "weight": "x"}]}}}, "alwayson_scripts"),
    (TXT2IMG, {"alwayson_scripts": {"ControlNet": {"args": [{"module": "canny", "image": 5}]}}}, "alwayson_scripts"),
    (TXT2IMG, {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": "perhaps"}]}}}, "alwayson_scripts"),
    (IMG2IMG, {}, "init_images"),
    (IMG2IMG, {"init_images": []}, "init_images"),
    (IMG2IMG, {"init_images": ["%"]}, "init_images"),
    (IMG2IMG, {"init_images": [text(file_of(disc()))], "mask": "%"}, "mask"),
    (IMG2IMG, {"init_images": [text(file_of(disc()))], "denoising_strength": 2}, "denoising_strength"),
    (IMG2IMG, {"init_images": [text(file_of(disc()))], "resize_mode": 9}, "resize_mode"),
    (IMG2IMG, {"init_images": [text(file_of(disc()))], "mask": text(file_of(disc())), "mask_blur": -1}, "mask_blur"),
]


@pytest.mark.parametrize(("path", "change", "field"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_refused_by_its_own_name(
    running_app: RunningApp, path: str, change: dict[str, Any], field: str
) -> None:
    """422 in AUTOMATIC1111's format, with its parameter name; nothing is generated."""
    answer = running_app.client.post(path, json={"prompt": "a red square", **SIZE, **change})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body["errors"][0]["field"] == field, body
    assert body["detail"]
    assert running_app.squares.prepared == []


def test_bodies_that_are_no_json_objects_are_refused(running_app: RunningApp) -> None:
    """400, and 415 for another type; unlimited nesting is no 500."""
    for body in (b"[]", b"{", b'{"a": 1, "a": 2}', b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        answer = running_app.client.post(TXT2IMG, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    assert running_app.client.post(TXT2IMG, content=b"a", headers={"content-type": "text/plain"}).status_code == 415


def test_pictures_may_be_left_out_of_the_answer(running_app: RunningApp) -> None:
    """`send_images: false`: the images are stored, and `info` has their URLs."""
    answer = running_app.client.post(TXT2IMG, json={"prompt": "a red square", "send_images": False, **SIZE}).json()
    assert answer["images"] == []
    (url,) = json.loads(answer["info"])["paths"]
    assert running_app.client.get(url).status_code == 200


def test_the_same_order_is_the_same_picture_through_every_dialect(running_app: RunningApp) -> None:
    """Three dialects, one generation: the later two are cache hits."""
    words = {"prompt": "a red square", "seed": 7}
    ours = running_app.client.post(
        "/create_and_upload_image", json={**words, **SIZE, "format": "png", "num_inference_steps": 5}
    ).json()
    openai = running_app.client.post(
        "/v1/images/generations", json={**words, "size": "64x64", "num_inference_steps": 5}
    ).json()["data"][0]
    webui = running_app.client.post(TXT2IMG, json={**words, **SIZE, "steps": 5}).json()
    assert ours["key"] == openai["key"] == json.loads(webui["info"])["keys"][0]
    assert (openai["cached"], json.loads(webui["info"])["cached"]) == (True, [True])
    assert len(running_app.squares.finished) == 1
