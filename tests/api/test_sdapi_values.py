"""Values of AUTOMATIC1111's API: what its clients send and its own models coerce, and what `info` says about it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, FakeImageDenoiser, disc, file_of, lora_file
from PIL import Image

from stable_diffusion_server.api.automatic1111.protocol import parse_task
from stable_diffusion_server.api.automatic1111.task_params import Txt2Img
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.pipelines.catalog import MODELS

SIZE = {"width": 64, "height": 64}
TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
PICTURE = base64.b64encode(file_of(disc(64, 64))).decode()
MASK = base64.b64encode(file_of(disc(64, 64, "white", "black"))).decode()


@pytest.fixture
def running(run_app: Callable[..., RunningApp]) -> RunningApp:
    """An app whose fake denoiser takes input images."""
    return run_app(FakeImageDenoiser(), max_n=10)


def asked(running: RunningApp, path: str = TXT2IMG, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The response and its `info`."""
    answer = running.client.post(path, json={"prompt": "a red square", **SIZE, **parameters})
    assert answer.status_code == 200, answer.text
    return answer.json(), json.loads(answer.json()["info"])


def image_of(body: dict[str, Any], number: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(body["images"][number])))


def said(info: dict[str, Any]) -> str:
    return " ".join(info["not_honoured"])


@pytest.mark.parametrize(
    ("name", "value", "field", "taken"),
    [
        ("seed", "123", "seed", 123),
        ("seed", 123.0, "seed", 123),
        ("steps", "4", "num_inference_steps", 4),
        ("steps", 20.0, "num_inference_steps", 20),
        ("cfg_scale", "7.0", "guidance_scale", 7.0),
        ("cfg_scale", 7, "guidance_scale", 7.0),
        ("width", "128", "width", 384),
        ("height", 128.0, "height", 384),
    ],
)
def test_numbers_may_be_texts_and_whole_floats(
    running: RunningApp, name: str, value: object, field: str, taken: object
) -> None:
    """As Pydantic coerces them in AUTOMATIC1111; sizes are rounded up to the canvas of the model."""
    asked(running, **{name: value})
    assert getattr(running.squares.finished[0], field) == taken


@pytest.mark.parametrize("value", [True, False, 1, 0, "1", 1.0])
def test_a_flag_of_a_mask_may_be_a_boolean_or_a_number(running: RunningApp, value: object) -> None:
    """`inpainting_mask_invert: true`, as AUTOMATIC1111's own tests send it, and `mask_blur` as a float."""
    asked(running, IMG2IMG, init_images=[PICTURE], mask=MASK, inpainting_mask_invert=value, mask_blur=4.0)


@pytest.mark.parametrize(("value", "images"), [("true", 1), (1, 1), ("yes", 1), ("off", 0), (0, 0), (False, 0)])
def test_booleans_may_be_numbers_and_words(running: RunningApp, value: object, images: int) -> None:
    """`send_images` in every spelling of Pydantic."""
    assert len(asked(running, send_images=value)[0]["images"]) == images


@pytest.mark.parametrize("seed", [-1, -2, "-1", None, -1.0])
def test_a_negative_seed_is_random(running: RunningApp, seed: object) -> None:
    """Two requests have two seeds."""
    first, second = (asked(running, seed=seed)[1]["seed"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("seed", [6302954713490123530, "6302954713490123530", 2**64 - 1, 2**32])
def test_a_seed_of_64_bits_is_kept(running: RunningApp, seed: object) -> None:
    """Image i has the seed after it; the last one is followed by 0. `info` has seeds that draw the same again."""
    body, info = asked(running, seed=seed, batch_size=2)
    first = int(seed)  # type: ignore[call-overload]  # a number or its text
    assert info["all_seeds"] == [first, (first + 1) % 2**64]
    assert info["not_honoured"] == []
    again, repeated = asked(running, seed=info["seed"], batch_size=2)
    assert again["images"] == body["images"]
    assert repeated["keys"] == info["keys"]


def test_info_has_all_members_of_processed(running: RunningApp) -> None:
    """Every member of AUTOMATIC1111's `Processed.js()`, with lists as long as the images."""
    _, info = asked(
        running, batch_size=2, n_iter=2, seed=5, subseed="7", sampler_name="Euler a", negative_prompt="blur"
    )
    assert (info["batch_size"], info["all_seeds"], info["all_subseeds"]) == (2, [5, 6, 7, 8], [7, 8, 9, 10])
    assert (info["sampler_name"], info["seed"], info["subseed"], info["clip_skip"]) == ("Euler a", 5, 7, 1)
    assert info["all_negative_prompts"] == ["blur"] * 4
    assert len(info["job_timestamp"]) == 14
    members = (
        "prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed all_subseeds subseed_strength "
        "width height sampler_name cfg_scale steps batch_size restore_faces face_restoration_model sd_model_name "
        "sd_model_hash sd_vae_name sd_vae_hash seed_resize_from_w seed_resize_from_h denoising_strength "
        "extra_generation_params index_of_first_image infotexts styles job_timestamp clip_skip "
        "is_using_inpainting_conditioning version"
    )
    assert set(members.split()) <= set(info)


@pytest.mark.parametrize("file_format", ["png", "webp", "jpg"])
def test_the_infotext_is_equal_everywhere_and_draws_the_same_again(running: RunningApp, file_format: str) -> None:
    """In `info`, in the file and from png-info, in AUTOMATIC1111's spelling; as `infotext` it is the same request."""
    settings = {"samples_format": file_format}
    body, info = asked(running, seed=7, steps=6, sampler_name="Euler a", override_settings=settings, cfg_scale=3)
    read = running.client.post("/sdapi/v1/png-info", json={"image": body["images"][0]}).json()
    assert info["infotexts"] == [read["info"]]
    assert read["info"].startswith(
        "a red square\nSteps: 6, Sampler: Euler a, CFG scale: 3.0, Seed: 7, Size: 64x64, Model"
    )
    assert (read["parameters"]["Size-1"], read["parameters"]["Sampler"]) == ("64", "Euler a")
    if file_format == "png":
        assert image_of(body).info["parameters"] == read["info"]
    request = {"infotext": read["info"], "override_settings": settings}
    again = json.loads(running.client.post(TXT2IMG, json=request).json()["info"])
    assert again["keys"] == info["keys"]
    changed = json.loads(running.client.post(TXT2IMG, json={**request, "seed": 8}).json()["info"])
    assert (changed["seed"], changed["steps"]) == (8, 6)


def test_an_infotext_with_wrong_values_is_taken_as_far_as_it_goes(running: RunningApp) -> None:
    """What is wrong in it, and a model that is not here, is reported."""
    text = "a red square\nSteps: many, Sampler: Restart, CFG scale: 3, Seed: 5, Size: 64x64, Model: dreamshaper"
    info = json.loads(running.client.post(TXT2IMG, json={"infotext": text}).json()["info"])
    assert (info["seed"], info["cfg_scale"], info["width"]) == (5, 3.0, 64)
    assert "Steps" in said(info)
    assert "dreamshaper" in said(info)
    assert "Restart" in said(info)


@pytest.mark.parametrize(
    "sampler",
    [
        *("Restart", "DPM fast", "DPM adaptive", "DPM++ 2M SDE Heun", "DDIM CFG++"),
        *("UniPC BH2", "HeunPP2", "IPNDM", "[Forge] Flux Realistic", "Default", "Automatic"),
        *("Warp", "Euler Ancestral CFG++", "uni_pc_bh2", "[[[[", "\u732b"),
    ],
)
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_any_sampler_is_drawn_by_the_closest_and_reported(running: RunningApp, sampler: str, model: str) -> None:
    """Never 422; the closest has the same words in its name, else it is the model's default."""
    _, info = asked(running, sampler_name=sampler, override_settings={"sd_model_checkpoint": model})
    taken = running.squares.finished[0].scheduler
    assert f"{sampler} is drawn by {taken}" in said(info)
    closest = {
        **dict.fromkeys(("Restart",), "dpm_2s_a"),
        **dict.fromkeys(("DPM fast", "DPM adaptive"), "dpm_2m"),
        **dict.fromkeys(("HeunPP2",), "heun"),
        **{"DPM++ 2M SDE Heun": "dpm", "IPNDM": "lms", "DDIM CFG++": "ddim", "UniPC BH2": "unipc"},
        **{"Euler Ancestral CFG++": "euler_a", "uni_pc_bh2": "unipc"},
    }
    flow = "flow_heun" if sampler == "HeunPP2" else "flow_euler"
    assert taken == (flow if model == "flux" else closest.get(sampler, "euler"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("(a red square:1.2)", "a red square"),
        ("a (red:1.4) [[square]]", "a red square"),
        ("a [red:red:0.5] square", "a red square"),
        ("a [red:blue:0.7] square", "a red square"),
        ("a [blue:red:0.2] square", "a red square"),
        ("a [blue:red:1] square", "a red square"),
        ("a [red|blue] square", "a red square"),
        ("a red square:1.3", "a red square"),
        ("a red BREAK square", "a red square"),
        ("a red square (unclosed:1.1", "a red square unclosed"),
        ("a red) square]", "a red square"),
        ("a red square AND a disc :0.5", "a red square, a disc"),
        ("a red square \\(cat\\)", "a red square (cat)"),
        ("((a [(red:1.1):blue:0.9]:1.2) square)", "a red square"),
    ],
)
def test_brackets_never_reach_an_encoder_of_plain_text(running: RunningApp, prompt: str, words: str) -> None:
    """The words stay, in both prompts, and `info` says so; escaped brackets are brackets."""
    _, info = asked(running, prompt=prompt, negative_prompt=prompt, override_settings={"sd_model_checkpoint": "flux"})
    (job,) = running.squares.finished
    assert (job.prompt, job.weighted) == (words, False)
    assert "prompt: weights and schedules in brackets" in said(info)
    assert "negative_prompt: weights" in said(info)
    assert info["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        *("(a red square:1.2)", "a (red:1.4) [[square]]", "a [red:blue:0.7] square", "a [red|blue] square"),
        *("a red BREAK square", "a red square (unclosed:1.1", "a red square \\(cat\\)"),
    ],
)
def test_brackets_reach_models_that_read_weights(running: RunningApp, prompt: str) -> None:
    """SDXL gets both prompts as they are, and reads them as AUTOMATIC1111 does; nothing is reported."""
    _, info = asked(running, prompt=prompt, negative_prompt=prompt)
    (job,) = running.squares.finished
    assert (job.prompt, job.negative_prompt, job.weighted) == (prompt, prompt, True)
    assert info["not_honoured"] == []
    assert info["infotexts"][0].startswith(prompt)


def test_and_composes_no_prompts(running: RunningApp) -> None:
    """Its parts become one prompt, without their weights, and `info` says so."""
    _, info = asked(running, prompt="a (red:1.2) square :1.3 AND a disc :0.5 AND 16:9")
    assert running.squares.finished[0].prompt == "a (red:1.2) square, a disc, 16"
    assert "prompt: prompts are not composed by AND here" in said(info)


def test_clip_skip_is_that_of_sd15_and_has_no_effect_on_sdxl(running: RunningApp) -> None:
    """As in AUTOMATIC1111; there is no SD 1.5 here, so its request is read by the converter alone."""
    _, info = asked(running, override_settings={"CLIP_stop_at_last_layers": 2})
    assert "CLIP_stop_at_last_layers" in said(info)
    assert running.squares.finished[0].clip_skip is None
    spec = replace(MODELS["sdxl"], usual_clip_skip=1)
    context = DialectContext(RequestLimits(), {"sdxl": spec}, "sdxl", {}, 10, 67_108_864)
    for layer, skipped in ((1, 0), (2, 1), (12, 11)):
        parsed = parse_task(Txt2Img(override_settings={"CLIP_stop_at_last_layers": layer}), context, {})
        assert (parsed.generations[0].clip_skip, parsed.ignored) == (skipped, [])
    for layer in (0, 13, True, "2", 1.5):
        with pytest.raises(InvalidInput, match="between 1 and 12"):
            parse_task(Txt2Img(override_settings={"CLIP_stop_at_last_layers": layer}), context, {})


def test_a_plain_prompt_is_left_as_it_is(running: RunningApp) -> None:
    """Colons and bars outside brackets are text."""
    _, info = asked(running, prompt="a red square, 16:9 | wide")
    assert running.squares.finished[0].prompt == "a red square, 16:9 | wide"
    assert info["not_honoured"] == []


def test_an_empty_prompt_draws_here_and_only_here(running: RunningApp) -> None:
    """Also one that consists of LoRA tags; the native API refuses it as before."""
    for prompt in ("", "  ", "<lora:nothing:1>"):
        asked(running, prompt=prompt)
        asked(running, IMG2IMG, prompt=prompt, init_images=[PICTURE])
    assert running.client.post("/create_and_upload_image", json={"prompt": "", **SIZE}).status_code == 422


def test_unknown_adapters_are_skipped_and_known_ones_found_by_other_spellings(
    run_app: Callable[..., RunningApp], tmp_path: Any
) -> None:
    """Another case and a file's ending are the same name; the tag is in the prompt and the infotext."""
    folder = tmp_path / "loras"
    folder.mkdir()
    lora_file(folder / "Ink.safetensors")
    running = run_app(FakeImageDenoiser(), lora_dir=folder)
    body, info = asked(running, prompt="a red square <lora:INK.safetensors:0.5> <lora:nosuch:0.8>", seed=3)
    assert running.squares.finished[0].loras == (("Ink", 0.5),)
    assert "nosuch" in said(info)
    assert info["prompt"] == "a red square <lora:INK.safetensors:0.5> <lora:nosuch:0.8>"
    assert info["infotexts"][0].startswith("a red square <lora:Ink:0.5>\n")
    assert image_of(body).info["parameters"] == info["infotexts"][0]
    again = json.loads(running.client.post(TXT2IMG, json={"infotext": info["infotexts"][0]}).json()["info"])
    assert again["keys"] == info["keys"]


@pytest.mark.parametrize("change", [{"denoising_strength": 0.2}, {"denoising_strength": 0}, {"steps": 1}])
def test_a_small_strength_draws_one_step(running: RunningApp, change: dict[str, Any]) -> None:
    """Also strength 0, and one step at the default strength; with a mask too."""
    asked(running, IMG2IMG, init_images=[PICTURE], **change)
    asked(running, IMG2IMG, init_images=[PICTURE], mask=MASK, **change)


def test_a_default_strength_never_refuses_an_edit_of_one_step(running: RunningApp) -> None:
    """Neither at OpenAI's route nor at ours; a strength that the caller chose still has to leave a step."""
    files = {"image": ("a.png", file_of(disc(64, 64)))}
    edit = {"prompt": "a red square", "num_inference_steps": "1"}
    assert running.client.post("/v1/images/edits", data=edit, files=files).status_code == 200
    ours = {"image_file": files["image"]}
    path = "/style_transfer_and_upload_image"
    assert running.client.post(path, data=edit, files=ours).status_code == 200
    assert running.client.post(path, data={**edit, "strength": "0.6"}, files=ours).status_code == 422


def test_several_input_images_are_a_picture_each(running: RunningApp) -> None:
    """Of each batch; MAX_N bounds their number."""
    other = base64.b64encode(file_of(disc(64, 64, "green"))).decode()
    body, info = asked(running, IMG2IMG, init_images=[PICTURE, other], n_iter=2, seed=5, denoising_strength=0.5)
    assert (len(body["images"]), info["all_seeds"], info["batch_size"]) == (4, [5, 6, 7, 8], 2)
    inputs = [job.image.digest for job in sorted(running.squares.finished, key=lambda job: job.seed) if job.image]
    assert inputs[0] == inputs[2] != inputs[1] == inputs[3]
    many = {"prompt": "a", "init_images": [PICTURE] * 11, **SIZE}
    assert running.client.post(IMG2IMG, json=many).status_code == 422


def test_images_may_lack_the_padding_of_base64(running: RunningApp) -> None:
    """As JavaScript's clients send them, also across lines."""
    bare = PICTURE.rstrip("=")
    asked(running, IMG2IMG, init_images=[bare[:40] + "\n" + bare[40:]])


@pytest.mark.parametrize(
    ("change", "maps"),
    [
        ({}, 1),
        ({"save_detected_map": False}, 0),
        ({"save_detected_map": "false"}, 0),
        ({"enabled": "false"}, 0),
        ({"weight": "0.8", "threshold_a": "50", "threshold_b": 150.0, "enabled": 1}, 1),
    ],
)
def test_the_detected_map_follows_the_pictures(running: RunningApp, change: dict[str, Any], maps: int) -> None:
    """One of the asked size, unless its unit refuses; values of a unit may be texts."""
    unit = {"module": "canny", "image": {"image": PICTURE, "mask": ""}, **change}
    body, _ = asked(running, alwayson_scripts={"ControlNet": {"args": [unit]}}, batch_size=2)
    assert len(body["images"]) == 2 + maps
    if maps:
        pixels = np.asarray(image_of(body, 2))
        assert pixels.shape[:2] == (64, 64)
        assert set(np.unique(pixels)) == {0, 255}
    if "weight" in change:
        assert {job.control_scale for job in running.squares.finished} == {0.8}


@pytest.mark.parametrize(
    ("change", "size", "sentence"),
    [
        ({}, (128, 128), "Hires upscale: 2"),
        ({"hr_scale": "1.5"}, (96, 96), "Hires upscale: 1.5"),
        ({"hr_resize_x": 192}, (192, 192), "Hires upscale: 3"),
        ({"hr_resize_x": 160, "hr_resize_y": 96}, (160, 96), "Hires resize: 160x96"),
    ],
)
def test_hires_fix_draws_a_second_pass_at_the_asked_size(
    running: RunningApp, change: dict[str, Any], size: tuple[int, int], sentence: str
) -> None:
    """The first image, enlarged, is the input of the second pass; both are in `info`, and the infotext repeats them."""
    body, info = asked(
        running, enable_hr=True, denoising_strength=0.5, hr_second_pass_steps=6, seed=5, steps=4,
        hr_upscaler="R-ESRGAN 4x+", **change,
    )  # fmt: skip
    assert image_of(body).size == size
    first, second = running.squares.finished
    assert (first.num_inference_steps, second.num_inference_steps, second.strength) == (4, 6, 0.5)
    assert second.image is not None
    assert (info["width"], info["height"], info["steps"], info["denoising_strength"]) == (64, 64, 4, 0.5)
    assert sentence in info["infotexts"][0]
    assert "Denoising strength: 0.5" in info["infotexts"][0]
    assert info["extra_generation_params"]["Hires steps"] == "6"
    assert "'R-ESRGAN 4x+' is not an upscaler here" in said(info)
    assert "Lanczos enlarges the image" in said(info)
    again = json.loads(running.client.post(TXT2IMG, json={"infotext": info["infotexts"][0]}).json()["info"])
    assert again["keys"] == info["keys"]


@pytest.mark.parametrize(
    "change",
    [
        {"hr_resize_y": "9" * 4300, "width": 2048},
        {"hr_resize_x": "9" * 4300, "height": 2048},
        {"hr_scale": "9" * 300},
        {"hr_resize_x": "9" * 4300, "hr_resize_y": "9" * 4300},
        {"infotext": f"a\nSteps: 4, Seed: 7, Hires resize-2: {'9' * 4300}", "width": 2048},
    ],
)
def test_a_second_pass_of_any_size_is_refused_by_name(running: RunningApp, change: dict[str, Any]) -> None:
    """A number may have 4300 digits; its product with a side may have more, which Python does not write as text."""
    asking = {"prompt": "a", "width": 64, "height": 64, "steps": 4, "enable_hr": True, **change}
    answer = running.client.post(TXT2IMG, json=asking)
    assert answer.status_code == 422
    assert {error["field"] for error in answer.json()["errors"]} <= {"hr_resize_x", "hr_resize_y", "hr_scale"}
    assert len(answer.text) < 1000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seed", 2**64, "between -9223372036854775808 and 18446744073709551615"),
        ("subseed", "9" * 4300, "between -9223372036854775808 and 18446744073709551615"),
        ("seed", -(2**63) - 1, "between -9223372036854775808 and 18446744073709551615"),
        ("cfg_scale", 31, "between 0 and 30"),
        ("steps", 0, "between 1 and 150"),
    ],
)
def test_the_ends_of_a_range_are_told_exactly(running: RunningApp, name: str, value: object, words: str) -> None:
    """Also those beyond 2**53, where a float has gaps."""
    answer = running.client.post(TXT2IMG, json={"prompt": "a", "width": 64, "height": 64, name: value})
    assert (answer.status_code, answer.json()["detail"]) == (422, f"{name} must be {words}.")


def test_without_hires_fix_its_parameters_have_no_effect(running: RunningApp) -> None:
    """Clients send them always."""
    body, info = asked(running, enable_hr=0, hr_scale=4, hr_upscaler="R-ESRGAN 4x+", denoising_strength=0.5)
    assert image_of(body).size == (64, 64)
    assert (info["not_honoured"], len(running.squares.finished)) == ([], 1)


@pytest.mark.parametrize("word", ["yes", "no", "1", "off", "True"])
def test_a_query_boolean_has_every_spelling(running_app: RunningApp, word: str) -> None:
    """`skip_current_image` as FastAPI reads it."""
    assert running_app.client.get(f"/sdapi/v1/progress?skip_current_image={word}").status_code == 200


def test_the_ends_of_the_sliders_are_taken(run_app: Callable[..., RunningApp]) -> None:
    """150 steps, cfg 30, 8 images of 2048 pixels at most."""
    running = run_app(FakeDenoiser(), max_n=10)
    asked(running, steps=150, cfg_scale=30)
    assert len(asked(running, batch_size=8)[0]["images"]) == 8
    asked(running, width=2048, height=64)
