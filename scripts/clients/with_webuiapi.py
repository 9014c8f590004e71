"""Sends every kind of request with `webuiapi`: `PORT=8000 KEY=… python with_webuiapi.py`."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np
import webuiapi
from PIL import Image, ImageDraw

PORT, KEY = int(os.environ.get("PORT", "8000")), os.environ.get("KEY", "")


def say(what: str, *facts: object) -> None:
    """Print one result."""
    sys.stdout.write(f"{what}: {' '.join(map(str, facts))}\n")
    sys.stdout.flush()


def main() -> None:
    """Every kind of request once."""
    who = {"username": "anyone", "password": KEY} if KEY else {}
    api = webuiapi.WebUIApi(port=PORT, sampler="Euler", steps=4, **who)
    say("models", api.util_get_model_names(), "samplers", api.util_get_sampler_names(), "loras", api.get_loras())
    size: dict[str, Any] = {"width": 256, "height": 256}
    drawn = api.txt2img(prompt="a red circle on a blue background", seed=7, cfg_scale=2, batch_size=2, **size)
    say(
        "txt2img",
        [picture.size for picture in drawn.images],
        "seeds",
        drawn.info["all_seeds"],
        drawn.info["not_honoured"],
    )
    ignored = api.txt2img(prompt="a red circle", seed=8, restore_faces=True, sampler_name="DPM++ 2M Karras", **size)
    say("not honoured", ignored.info["not_honoured"])
    picture, mask = Image.new("RGB", (128, 128), "blue"), Image.new("L", (128, 128), 0)
    ImageDraw.Draw(picture).ellipse((40, 40, 88, 88), fill="red")
    mask.paste(255, (44, 44, 84, 84))
    for whole in (True, False):
        result = api.img2img(
            images=[picture], mask_image=mask, prompt="a yellow square on a red background", mask_blur=0, seed=1,
            denoising_strength=1.0, inpainting_fill=1, inpaint_full_res=not whole, inpaint_full_res_padding=16,
            width=128, height=128, cfg_scale=2,
        )  # fmt: skip
        outside = np.asarray(mask) == 0
        same = bool((np.asarray(result.image.convert("RGB"))[outside] == np.asarray(picture)[outside]).all())
        inside = np.asarray(result.image.convert("RGB"))[50:78, 50:78].reshape(-1, 3).mean(0).round()
        say("img2img with mask", "whole" if whole else "only masked", "outside as sent:", same, "inside:", inside)
    unit = webuiapi.ControlNetUnit(image=picture, module="canny", model="control_canny", weight=0.8)
    drawn = api.txt2img(
        prompt="a green circle on a white background", seed=1, controlnet_units=[unit], width=128, height=128
    )
    say("controlnet", drawn.image.size, drawn.info["not_honoured"])
    read = api.png_info(drawn.image)
    say("png info", read.info.replace("\n", " | ") if isinstance(read.info, str) else read.info)
    results: list[webuiapi.WebUIApiResult] = []
    long = threading.Thread(
        target=lambda: results.append(
            api.txt2img(prompt="a star", steps=100, seed=3, batch_size=2, width=512, height=512)
        )
    )
    long.start()
    until = time.monotonic() + 20
    while (progress := api.get_progress())["state"]["sampling_step"] < 3 and time.monotonic() < until:
        time.sleep(0.05)
    say("progress", progress["progress"], progress["state"]["sampling_step"], "of", progress["state"]["sampling_steps"],
        "eta", progress["eta_relative"], "picture", bool(progress["current_image"]))  # fmt: skip
    started = time.monotonic()
    api.interrupt()
    long.join()
    say("interrupt", f"answered after {time.monotonic() - started:.2f} s", results[0].info["interrupted"])


if __name__ == "__main__":
    main()
