"""Draws and edits with Replicate's client: `SERVER=http://127.0.0.1:8000 KEY=… python with_replicate.py`."""

from __future__ import annotations

import io
from importlib.metadata import version

import replicate
from cells import KEY, SERVER, WORDS, ClientReport, cancels, check, circle, picture_of, png
from replicate.exceptions import ReplicateError
from replicate.prediction import Prediction

SMALL = {"prompt": WORDS, "width": 256, "height": 256}


def file_of(data: bytes) -> io.BytesIO:
    """An open file as the client takes it."""
    file = io.BytesIO(data)
    file.name = "circle.png"
    return file


def draw(report: ClientReport, client: replicate.Client) -> None:
    """The columns connect, list, draw and edit."""
    with report.cell("connect"):
        client.run("local/sdxl", input=SMALL)
    with report.cell("list"):
        check(len(client.predictions.list().results) > 0, "predictions are listed")
    for name in ("local/sdxl", "local/flux", "stability-ai/sdxl", "local/sdxl:sdxl"):
        with report.cell("draw"):
            (url,) = client.run(name, input={**SMALL, "seed": 7, "output_format": "png"})
            check(picture_of(url).size == (256, 256), f"{name} answers the URL of an image")
    with report.cell("draw"):
        seen = [event.event.value for event in client.stream("local/sdxl", input={**SMALL, "seed": 8})]
        check(seen[-2:] == ["output", "done"], "the stream has the output and ends")
    for more in ({}, {"prompt_strength": 0.4}, {"mask": png(circle().convert("L"))}):
        with report.cell("edit"):
            files = {"image": file_of(png(circle()))} | ({"mask": file_of(more["mask"])} if "mask" in more else more)
            made = client.predictions.create(
                "sdxl", {"prompt": WORDS, **files}, wait=60, file_encoding_strategy="base64"
            )
            made.wait()
            check(made.status == "succeeded", str(made.error))


def control(report: ClientReport, client: replicate.Client) -> None:
    """The columns progress, cancel and errors."""
    long = {"prompt": WORDS, "width": 1024, "height": 1024, "num_inference_steps": 100}
    made: list[Prediction] = []

    def start() -> None:
        made.append(client.models.predictions.create("local/sdxl", long))

    def stop() -> None:
        with report.cell("progress"):
            while made[0].progress is None or made[0].progress.current == 0:
                made[0].reload()
            check(made[0].progress.total == 100, "the logs have the steps")
        made[0].cancel()
        check(made[0].status == "canceled", "the prediction is cancelled")

    with report.cell("cancel"):
        cancels(start, stop)
    for name, given, word in (("local/sdxl", {"width": 9}, "width"), ("local/nonesuch", {}, "nonesuch")):
        with report.cell("errors"):
            try:
                client.run(name, input={**SMALL, **given})
            except ReplicateError as error:
                check(word in str(error.detail), f"the error names {word}")
            else:
                check(False, f"{word} is refused")


def main() -> None:
    """All columns."""
    client = replicate.Client(api_token=KEY, base_url=SERVER)
    report = ClientReport(f"replicate (Python) {version('replicate')}")
    draw(report, client)
    control(report, client)


if __name__ == "__main__":
    main()
