"""Draws and edits with litellm: `SERVER=http://127.0.0.1:8000 KEY=… python with_litellm.py`."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from importlib.metadata import version
from typing import Any

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

# Otherwise the import downloads a list of prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
litellm = importlib.import_module("litellm")
litellm.suppress_debug_info = True
WHERE: dict[str, Any] = {"api_base": f"{SERVER}/v1", "api_key": KEY, "max_retries": 0}
SMALL: dict[str, Any] = {"prompt": WORDS, "size": "256x256", **WHERE}


def main() -> None:
    """Every column of the table; litellm streams no images."""
    report = ClientReport(f"litellm {version('litellm')}")
    report.not_applicable("progress")
    with report.cell("connect"):
        litellm.image_generation(model="openai/sdxl", **SMALL)
    with report.cell("list"):
        names = litellm.get_valid_models(
            check_provider_endpoint=True, custom_llm_provider="openai", api_key=KEY, api_base=SERVER
        )
        check(any("sdxl" in name for name in names), f"sdxl is listed, not {names[:5]}")
    for name in ("sdxl", "flux", "dall-e-3", "gpt-image-1", "gpt-image-2"):
        with report.cell("draw"):
            answer = litellm.image_generation(model=f"openai/{name}", **SMALL).data[0]
            check(picture_of(answer.url or answer.b64_json).size == (256, 256), f"{name} has the asked size")
    with report.cell("draw"):
        several = litellm.image_generation(model="openai/gpt-image-1", n=10, quality="high", **SMALL)
        check(len(several.data) == 10, "ten images")
    for name in ("sdxl", "gpt-image-1", "gpt-image-2"):
        with report.cell("edit"):
            edit = litellm.image_edit(
                model=f"openai/{name}", image=png(circle()), mask=png(hole()), prompt="a yellow square", **WHERE
            ).data[0]
            check(outside_is_exact(picture_of(edit.b64_json or edit.url)), "the outside of the mask is exact")
    with report.cell("edit"):
        litellm.image_edit(
            model="openai/gpt-image-1", image=[png(circle()), png(circle())], prompt="a yellow circle", **WHERE
        )
    with report.cell("cancel"):
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        long = litellm.aimage_generation(model="openai/sdxl", n=4, extra_body={"num_inference_steps": 100}, **SMALL)
        task = asyncio.run_coroutine_threadsafe(long, loop)
        cancels(task.exception, task.cancel)
    with report.cell("errors"):
        try:
            litellm.image_generation(model="openai/sdxl", **{**SMALL, "size": "huge"})
        except litellm.BadRequestError as error:
            check("size" in str(error), "the message names size")
        else:
            check(False, "size=huge is refused")
    with report.cell("errors"):
        try:
            litellm.image_generation(model="openai/nonesuch", **SMALL)
        except (litellm.NotFoundError, litellm.BadRequestError) as error:
            check("nonesuch" in str(error), "the message names the model")
        else:
            check(False, "an unknown model is refused")


if __name__ == "__main__":
    main()
