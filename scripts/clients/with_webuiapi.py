"""Sends every kind of request with `webuiapi`: `SERVER=http://127.0.0.1:8000 KEY=… python with_webuiapi.py`."""

from __future__ import annotations

import json
import threading
import time
from importlib.metadata import version
from typing import Any

import webuiapi
from cells import HOST, KEY, PORT, WORDS, ClientReport, cancels, check, circle, hole, outside_is_exact
from PIL import Image

SMALL: dict[str, Any] = {"width": 256, "height": 256}
LONG: dict[str, Any] = {"steps": 100, "width": 512, "height": 512}
# webuiapi's getters of lists, and the type of each answer.
LISTS: dict[str, type] = {
    "get_samplers": list, "get_schedulers": list, "get_sd_models": list, "get_sd_vae": list, "get_loras": list,
    "get_upscalers": list, "get_latent_upscale_modes": list, "get_hypernetworks": list, "get_face_restorers": list,
    "get_realesrgan_models": list, "get_prompt_styles": list, "get_extensions": list, "get_options": dict,
    "get_cmd_flags": dict, "get_embeddings": dict, "get_scripts": dict, "get_memory": dict,
}  # fmt: skip


def main() -> None:
    """Every column of the table."""
    who = {"username": "anyone", "password": KEY} if KEY != "none" else {}
    api = webuiapi.WebUIApi(host=HOST, port=PORT, sampler="Euler", steps=4, **who)
    report = ClientReport(f"webuiapi {version('webuiapi')}")
    with report.cell("connect"):
        api.get_options()
    lists(report, api)
    draws(report, api)
    edits(report, api)
    follows(report, api)
    errors(report, api)


def lists(report: ClientReport, api: Any) -> None:
    """Every getter, and orders that change nothing here."""
    for getter, kind in LISTS.items():
        if hasattr(api, getter):
            with report.cell("list"):
                answer = getattr(api, getter)()
                check(isinstance(answer, kind) and "error" not in answer, f"{getter} answers {str(answer)[:80]}")
    with report.cell("list"):
        check("sdxl" in " ".join(api.util_get_model_names()), "sdxl is listed")
        api.util_set_model("flux"), api.util_set_model("sdxl")
        check("sdxl" in api.util_get_current_model(), "the chosen model is reported")
    for order in ("refresh_checkpoints", "refresh_loras", "unload_checkpoint", "reload_checkpoint"):
        if hasattr(api, order):
            with report.cell("list"):
                getattr(api, order)()


def draws(report: ClientReport, api: Any) -> None:
    """Seeds, batches, samplers, styles of prompts, a second pass."""
    with report.cell("draw"):
        drawn = api.txt2img(prompt=WORDS, seed=7, cfg_scale=2, batch_size=2, **SMALL)
        check([image.size for image in drawn.images] == [(256, 256)] * 2, "two images of the asked size")
        check(drawn.info["all_seeds"] == [7, 8] and len(drawn.info["all_subseeds"]) == 2, "seeds are reported")
        check("Seed: 7" in api.png_info(drawn.image).info, "the parameters are read back from the image")
    with report.cell("draw"):
        api.txt2img(
            prompt=f"({WORDS}:1.2) <lora:nonesuch:1>", seed=-1, restore_faces=True, sampler_name="Restart", **SMALL
        )
    with report.cell("draw"):
        large = api.txt2img(
            prompt=WORDS, enable_hr=True, hr_scale=2, hr_upscaler=webuiapi.HiResUpscaler.Latent, **SMALL
        )
        check(large.image.size == (512, 512), f"enable_hr doubles the size, not {large.image.size}")
    with report.cell("draw"):
        unit = webuiapi.ControlNetUnit(image=circle(), module="canny", model="control_canny", weight=0.8)
        drawn = api.txt2img(prompt="a green circle", seed=1, controlnet_units=[unit], width=128, height=128)
        check(drawn.images[0].size == (128, 128), "an image drawn along edges")
    with report.cell("draw"):
        api.controlnet_version(), api.controlnet_model_list(), api.controlnet_module_list()
        check(api.controlnet_detect([circle()], module="canny").images, "edges are detected")


def edits(report: ClientReport, api: Any) -> None:
    """Image to image, with a mask, and enlarged."""
    mask = hole().getchannel("A").point(lambda alpha: 0 if alpha else 255)
    edit: dict[str, Any] = {"images": [circle()], "prompt": "a yellow square", "width": 128, "height": 128, "seed": 1}
    with report.cell("edit"):
        api.img2img(**{**edit, "images": [circle(), circle()]}, denoising_strength=0.1)
    for only_masked in (False, True):
        with report.cell("edit"):
            result = api.img2img(
                **edit, mask_image=mask, mask_blur=0, denoising_strength=1.0, inpainting_fill=1,
                inpaint_full_res=only_masked, inpaint_full_res_padding=16, inpainting_mask_invert=0,
            )  # fmt: skip
            check(outside_is_exact(result.image), "the outside of the mask is exact")
    with report.cell("edit"):
        large = api.extra_single_image(circle(), upscaler_1="Lanczos", upscaling_resize=2)
        check(large.image.size == (256, 256), "extra_single_image doubles the size")
    with report.cell("edit"):
        several = api.extra_batch_images([circle(), circle()], upscaler_1="Lanczos", upscaling_resize=2)
        check(len(several.images) == 2, "extra_batch_images enlarges both")
    with report.cell("edit"):
        try:
            api.interrogate(circle())
        except RuntimeError as error:
            check("no model that describes images" in str(error), "interrogate is refused with a reason")


def follows(report: ClientReport, api: Any) -> None:
    """Progress, interrupt and skip."""
    results: list[webuiapi.WebUIApiResult] = []

    def draw(images: int = 4) -> None:
        results.append(api.txt2img(prompt=WORDS, seed=3, batch_size=images, **LONG))

    def progress_at(step: int) -> dict[str, Any]:
        until = time.monotonic() + 20
        while (progress := api.get_progress())["state"]["sampling_step"] < step and time.monotonic() < until:
            time.sleep(0.02)
        return dict(progress)

    def skip() -> None:
        progress_at(1)  # an image that is skipped before its first step is left out
        api.skip()

    with report.cell("progress"):
        thread = threading.Thread(target=draw)
        thread.start()
        progress = progress_at(3)
        check(0 < progress["progress"] < 1 and progress["eta_relative"] >= 0, f"{json.dumps(progress)[:120]}")
        check(progress["current_image"], "progress has an image")
    with report.cell("cancel"):
        api.interrupt()
        thread.join()
        check(results[-1].info["interrupted"], "info tells of the interruption")
        check(isinstance(results[-1].image, Image.Image), "an interrupted request answers the unfinished image")
    with report.cell("cancel"):
        cancels(draw, api.interrupt)
    with report.cell("cancel"):
        results.clear()
        # One image, because those of a batch that were not started follow, in 100 steps each.
        cancels(lambda: draw(1), skip)
        check(results and results[0].images, "a skipped request answers an image")


def errors(report: ClientReport, api: Any) -> None:
    """A refused value raises, and the message names it."""
    with report.cell("errors"):
        try:
            api.txt2img(prompt=WORDS, width=99999, height=256)
        except RuntimeError as error:
            check("width" in str(error), f"the message names width, not {str(error)[:100]}")
        else:
            check(False, "width=99999 is refused")
    if KEY != "none":
        with report.cell("errors"):
            wrong = {"username": "anyone", "password": f"not {KEY}"}
            answer = webuiapi.WebUIApi(host=HOST, port=PORT, **wrong).get_options()
            check(answer.get("error"), "a wrong key is refused")


if __name__ == "__main__":
    main()
