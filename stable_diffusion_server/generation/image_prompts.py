"""Resolves image prompts, that is what reads each, and decodes their pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import Pixels, shrink_to_area
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import GenerationRequest, ImageArray, ImageInput, ImagePrompt, PromptImage

# Encoders look at 224 × 224 pixels, or 384 × 384; larger pictures are shrunk, so that waiting requests hold no more.
_MOST_PIXELS = 1024 * 1024


class ImagePromptAdapter(Protocol):
    """What reads image prompts: its name, and the SHA-256 of its weights and its encoder's."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights and its encoder's."""

    @property
    def takes_range(self) -> bool:
        """Whether it may count for a part of the steps."""


class ImagePromptAdapters(Protocol):
    """What reads image prompts on this server. Its methods read files, and block."""

    def usable(self, spec: ModelSpec, /) -> Sequence[str]:
        """Return the names of those for a model."""

    def find(self, name: str | None, spec: ModelSpec, /) -> ImagePromptAdapter:
        """Return the one of a name, or the first. Raises `InvalidInput`."""


@dataclass(frozen=True, slots=True)
class ResolvedImagePrompt:
    """An image prompt, and the adapter that reads it with the SHA-256 of it and its encoder."""

    prompt: ImagePrompt
    adapter: str
    revision: str

    @property
    def identity(self) -> dict[str, object]:
        """All that decides how it counts, except its image."""
        steps = (self.prompt.start, self.prompt.end)
        return {"adapter": self.revision, "weight": self.prompt.weight, "steps": steps}


def resolve_image_prompts(
    request: GenerationRequest, spec: ModelSpec, adapters: ImagePromptAdapters
) -> tuple[ResolvedImagePrompt, ...]:
    """Return what reads each image prompt of a request. Reads files; blocks.

    Raises `InvalidInput` that names every field at fault.
    """
    if request.image_prompts and not adapters.usable(spec):
        raise InvalidInput(f"{spec.name} has nothing here that reads image prompts.", field="image_prompts")
    resolved, faults = [], []
    for number, prompt in enumerate(request.image_prompts):
        field = f"image_prompts[{number}].model"
        try:
            found = adapters.find(prompt.model, spec)
        except InvalidInput as error:
            faults.append((field, f"{field}: {error.detail}"))
            continue
        if not found.takes_range and (prompt.start, prompt.end) != (0, 1):
            field = f"image_prompts[{number}].{'start' if prompt.start else 'end'}"
            faults.append((field, f"{field}: {found.name} counts at all steps."))
        resolved.append(ResolvedImagePrompt(prompt, found.name, found.digest))
    if faults:
        raise InvalidInput.from_faults(faults)
    return tuple(resolved)


async def prompt_images(
    prompts: Sequence[ResolvedImagePrompt], decode: Callable[[ImageInput], Awaitable[Pixels]]
) -> tuple[PromptImage, ...]:
    """Return image prompts as the model takes them, decoded one after the other. Raises the errors of decoding."""
    images = []
    for one in prompts:
        pixels = await decode(one.prompt.image)
        image = ImageArray(await asyncio.to_thread(shrink_to_area, pixels, _MOST_PIXELS))
        prompt = one.prompt
        images.append(PromptImage(one.adapter, one.revision, image, prompt.weight, prompt.start, prompt.end))
    return tuple(images)
