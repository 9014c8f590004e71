"""Sends every kind of request with OpenAI's client: `SERVER=http://127.0.0.1:8000 KEY=… python with_openai.py`.

With API_KEYS="…;rate=…" on the server it also shows a wrong key and the rate limit.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from urllib.request import urlopen

import openai
from PIL import Image, ImageDraw

SERVER, KEY = os.environ.get("SERVER", "http://127.0.0.1:8000"), os.environ.get("KEY", "none")
WORDS = "a red circle on a blue background"


def say(what: str, *facts: object) -> None:
    """Print one result."""
    sys.stdout.write(f"{what}: {' '.join(map(str, facts))}\n")
    sys.stdout.flush()


def opened(data: bytes) -> str:
    """Format and size of an image file."""
    picture = Image.open(io.BytesIO(data))
    return f"{picture.format} {picture.size[0]}x{picture.size[1]}"


def main() -> None:
    """Every kind of request once."""
    client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key=KEY, max_retries=0)
    images = client.images
    say("models", [model.id for model in client.models.list()])
    answer = images.generate(model="dall-e-3", prompt=WORDS, size="256x256")
    url = (answer.data or [])[0].url or ""
    with urlopen(url) as file:  # noqa: S310  # the address our own server gave
        say("generate, url", url.partition("/files/")[2], opened(file.read()))
    answer = images.generate(model="gpt-image-1", prompt=WORDS, size="256x256", output_format="webp")
    say("generate, b64_json", opened(base64.b64decode((answer.data or [])[0].b64_json or "")))
    answer = images.generate(prompt=WORDS, size="256x256", n=2)
    say("generate, n=2", "seeds", [datum.to_dict()["seed"] for datum in answer.data or []])
    stream = images.generate(
        prompt=WORDS, size="256x256", stream=True, partial_images=3, extra_body={"seed": 5, "num_inference_steps": 40}
    )
    for event in stream:
        say("stream", event.type, opened(base64.b64decode(event.b64_json)))
    picture, mask = Image.new("RGB", (128, 128), "blue"), Image.new("RGBA", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 88, 88), fill="red")
    mask.paste((0, 0, 0, 0), (44, 44, 84, 84))
    files = [io.BytesIO(), io.BytesIO()]
    picture.save(files[0], "PNG"), mask.save(files[1], "PNG")
    answer = images.edit(
        image=("a.png", files[0].getvalue()),
        mask=("m.png", files[1].getvalue()),
        prompt="a yellow square on a red background",
        response_format="b64_json",
    )
    edited = Image.open(io.BytesIO(base64.b64decode((answer.data or [])[0].b64_json or ""))).convert("RGB")
    same = all(
        edited.getpixel((x, y)) == picture.getpixel((x, y))
        for x in range(128)
        for y in range(128)
        if not (44 <= x < 84 and 44 <= y < 84)
    )
    say("edit with mask", "outside exactly as sent:", same, "inside:", edited.getpixel((64, 64)))
    for what, more in (("size", {"size": "huge"}), ("background", {"background": "transparent"}), ("n", {"n": 99})):
        try:
            images.generate(prompt=WORDS, **more)  # type: ignore[arg-type]  # wrong on purpose
        except openai.UnprocessableEntityError as error:
            say(f"refused {what}", error.status_code, error.code, error.param)
    if KEY == "none":
        return
    try:
        client.with_options(api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        say("a wrong key", error.status_code, error.code)
    refused = 0
    started = time.monotonic()
    for _ in range(40):
        try:
            images.generate(prompt=WORDS, size="256x256")
        except openai.RateLimitError as error:
            refused += 1
            say("over the rate", error.status_code, error.code, "Retry-After", error.response.headers["retry-after"])
            break
    started = time.monotonic()
    client.with_options(max_retries=3).images.generate(prompt=WORDS, size="256x256")
    say("its own retry", f"drawn after {time.monotonic() - started:.1f} s, refusals before: {refused}")


if __name__ == "__main__":
    main()
