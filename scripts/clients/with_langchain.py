"""Draws with LangChain's tool for images: `SERVER=http://127.0.0.1:8000 KEY=… python with_langchain.py`."""

from __future__ import annotations

from importlib.metadata import version

import openai
from cells import KEY, SERVER, WORDS, ClientReport, check, picture_of
from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper


def wrapper(model: str, **more: object) -> DallEAPIWrapper:
    """LangChain's client of the Images API."""
    return DallEAPIWrapper(model=model, api_key=KEY, base_url=f"{SERVER}/v1", **more)


def main() -> None:
    """The columns that it has: it draws, by URL."""
    report = ClientReport(f"langchain-community {version('langchain-community')}")
    report.not_applicable("list", "edit", "progress", "cancel")
    with report.cell("connect"):
        wrapper("dall-e-2", size="256x256").run(WORDS)
    for name in ("dall-e-2", "dall-e-3", "sdxl"):
        with report.cell("draw"):
            url = wrapper(name, size="256x256").run(WORDS)
            check(picture_of(url).size == (256, 256), f"{name} answers a URL of an image")
    with report.cell("draw"):
        urls = wrapper("dall-e-2", size="256x256", n=3).run(WORDS)
        check(len(urls.split()) == 3, "n=3 answers three URLs")
    with report.cell("draw"):
        url = OpenAIDALLEImageGenerationTool(api_wrapper=wrapper("dall-e-3", quality="hd")).invoke(WORDS)
        check(picture_of(url).size == (1024, 1024), "the tool answers a URL of an image")
    with report.cell("errors"):
        try:
            wrapper("nonesuch").run(WORDS)
        except openai.OpenAIError as error:
            check("nonesuch" in str(error), "the message names the model")
        else:
            check(False, "an unknown model is refused")


if __name__ == "__main__":
    main()
