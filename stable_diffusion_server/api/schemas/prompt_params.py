"""The parameters that say what an image shows: prompts, how they are written, and what they are expanded with."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, StringConstraints

from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.generation import NAME_MAX, STYLES_MAX, TEXT_MAX
from stable_diffusion_server.types import PromptSyntax


class PromptParams(RequestParams):
    """Prompts of every dialect with this server's parameters."""

    lists: ClassVar[frozenset[str]] = frozenset({"styles"})

    prompt: str = Field(
        max_length=TEXT_MAX, description="What the image shows.", examples=["a red circle on a blue background"]
    )
    negative_prompt: str | None = Field(
        None, max_length=TEXT_MAX, description="What the image must not show, for models that support it."
    )
    prompt_2: str | None = Field(
        None,
        description="What the second text encoder reads in place of `prompt`. For SDXL, SD3 and FLUX.1 (there T5).",
    )
    prompt_syntax: PromptSyntax | None = Field(
        None,
        description=(
            "How the prompts are written: with weights as AUTOMATIC1111 or compel has them, or as plain text. "
            "If omitted a1111 for SD 1.5, SDXL, SD3 and FLUX.1, else plain."
        ),
    )
    styles: tuple[Annotated[str, StringConstraints(max_length=NAME_MAX)], ...] = Field(
        (),
        max_length=STYLES_MAX,
        description="Styles of STYLES_FILE to put the prompts in, by name, one after the other.",
    )
    wildcards: bool | None = Field(
        None,
        description=(
            "Whether options in braces and lists such as `__colour__` in the prompts are picked, as the seed says. "
            "If omitted as EXPAND_WILDCARDS says."
        ),
    )
