"""Sends every kind of request with OpenAI's client: `SERVER=http://127.0.0.1:8000 KEY=… python with_openai.py`."""

from __future__ import annotations

from typing import Any

import openai
from cells import (
    KEY,
    SERVER,
    WORDS,
    ClientReport,
    cancels,
    check,
    circle,
    hole,
    outside_is_exact,
    picture_of,
    png,
)

SMALL: dict[str, Any] = {"prompt": WORDS, "size": "256x256"}
LONG = {"num_inference_steps": 100}
NAMES = (
    *("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2"),
    *("gpt-image-2-2026-04-21", "chatgpt-image-latest", "sdxl", "flux"),
)
# Values of OpenAI's own reference; none of them refuses a request here.
DOCUMENTED: tuple[dict[str, Any], ...] = (
    {"background": "transparent"},
    {"background": "opaque", "moderation": "low", "quality": "medium", "user": "someone"},
    {"output_format": "png", "output_compression": 100},
    {"output_format": "webp", "output_compression": 50},
    {"style": "vivid", "quality": "hd"},
    {"model": "gpt-image-2", "size": "auto", "quality": "auto", "background": "auto"},
)


def main() -> None:
    """Every column of the table."""
    report = ClientReport(f"openai (Python) {openai.__version__}")
    client = openai.OpenAI(base_url=f"{SERVER}/v1", api_key=KEY, max_retries=0)
    with report.cell("connect"):
        client.models.list()
    with report.cell("list"):
        check({"sdxl", "flux"} <= {model.id for model in client.models.list()}, "sdxl and flux are listed")
        check(client.models.retrieve("sdxl").id == "sdxl", "sdxl is described")
    draws(report, client.images)
    edits(report, client.images)
    follows(report, client)
    errors(report, client)


def draws(report: ClientReport, images: Any) -> None:
    """Models by every name, several images, every documented value."""
    for name in NAMES:
        with report.cell("draw"):
            picture = (images.generate(model=name, **SMALL).data or [])[0]
            wanted = "b64_json" if name.startswith(("gpt-image", "chatgpt-image")) else "url"
            check(getattr(picture, wanted), f"{name} answers {wanted}")
            check(picture_of(picture.url or picture.b64_json).size == (256, 256), f"{name} has the asked size")
    with report.cell("draw"):
        check(len(images.generate(n=10, **SMALL).data or []) == 10, "n=10 answers ten images")
    with report.cell("draw"):
        twice = [images.generate(response_format="b64_json", **SMALL).data[0].b64_json for _ in range(2)]
        check(twice[0] != twice[1], "the same prompt without a seed is a new image")
    for more in DOCUMENTED:
        with report.cell("draw"):
            images.generate(**{**SMALL, **more})


def edits(report: ClientReport, images: Any) -> None:
    """With a mask, with several images, as a variation."""
    with report.cell("edit"):
        answer = images.edit(image=("a.png", png(circle())), prompt="a yellow circle").data[0]
        check(picture_of(answer.b64_json).size == (128, 128), "an edit answers b64_json of the same size")
    with report.cell("edit"):
        mask = ("m.png", png(hole()))
        answer = images.edit(image=("a.png", png(circle())), mask=mask, prompt="a yellow square").data[0]
        check(outside_is_exact(picture_of(answer.b64_json)), "the outside of the mask is exact")
    with report.cell("edit"):
        several = [("a.png", png(circle())), ("b.png", png(circle()))]
        images.edit(model="gpt-image-2", image=several, prompt="a yellow circle", input_fidelity="high")
    with report.cell("edit"):
        check(len(images.create_variation(image=png(circle()), n=2).data or []) == 2, "two variations")


def follows(report: ClientReport, client: openai.OpenAI) -> None:
    """Streams, and requests that are given up."""
    images: Any = client.images
    with report.cell("progress"):
        events = list(images.generate(stream=True, partial_images=3, extra_body=LONG, **SMALL))
        check(events[-1].type == "image_generation.completed", "the last event is the image")
        check(len(events) > 1 and picture_of(events[0].b64_json), "partial images come before it")
    with report.cell("progress"):
        file = ("a.png", png(circle()))
        events = list(images.edit(image=file, prompt="a star", stream=True, partial_images=2, extra_body=LONG))
        check(events[-1].type == "image_edit.completed", "an edit can be streamed")
    with report.cell("cancel"):
        cancels(lambda: leave_early(images), lambda: None)
    with report.cell("cancel"):
        hasty = client.with_options(timeout=0.7).images
        cancels(lambda: hasty.generate(n=4, extra_body=LONG, **SMALL), lambda: None)


def leave_early(images: Any) -> None:
    """Close a stream after its first event."""
    with images.generate(stream=True, partial_images=1, n=4, extra_body=LONG, **SMALL) as stream:
        next(iter(stream))


def errors(report: ClientReport, client: openai.OpenAI) -> None:
    """Each error has its class, code and parameter, and the message names all faults."""
    images: Any = client.images
    for parameter, value in (("size", "huge"), ("n", 99), ("output_format", "gif")):
        with report.cell("errors"):
            try:
                images.generate(**{**SMALL, parameter: value})
            except openai.BadRequestError as error:
                check(error.param == parameter, f"the fault is in {parameter}, not {error.param}")
            else:
                check(False, f"{parameter}={value} is refused")
    with report.cell("errors"):
        try:
            images.generate(model="nonesuch", **SMALL)
        except (openai.NotFoundError, openai.BadRequestError) as error:
            check(error.code == "model_not_found", f"the code is {error.code}")
        else:
            check(False, "an unknown model is refused")
    with report.cell("errors"):
        try:
            images.generate(extra_body={"foo": 1, "bar": 2}, **SMALL)
        except openai.BadRequestError as error:
            check("foo" in error.message and "bar" in error.message, f"both are named, not {error.message}")
        else:
            check(False, "unknown parameters are refused")
    if KEY != "none":
        with report.cell("errors"):
            try:
                client.with_options(api_key="wrong").models.list()
            except openai.AuthenticationError as error:
                check(error.code == "invalid_api_key", f"the code is {error.code}")
            else:
                check(False, "a wrong key is refused")


if __name__ == "__main__":
    main()
