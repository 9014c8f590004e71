"""Parameters of OpenAI's image edits and variations, which start from an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.image_sources import ImageSource, OptionalSource, Source
from stable_diffusion_server.api.openai.protocol import ImagesParams
from stable_diffusion_server.api.schemas.params import File
from stable_diffusion_server.generation import TEXT_MAX, able
from stable_diffusion_server.types import Fit, GenerationRequest, ImageInput, RequestWarning, Task

_DEFAULT_STRENGTH = 0.6
# The model whose images had their own hole as a mask.
_HOLE_MODEL = "dall-e-2"
_OF_EDGES = frozenset({"canny", "canny_low", "canny_high", "control_scale", "feather"})


class FromImageParams(ImagesParams):
    """Parameters of the routes that start from an image."""

    files: ClassVar[frozenset[str]] = ImagesParams.files | {"image", "images"}
    lists: ClassVar[frozenset[str]] = ImagesParams.lists | {"image", "images"}
    pictures: ClassVar[frozenset[str]] = ImagesParams.pictures | {"image", "images"}
    other_names: ClassVar[Mapping[str, str]] = {**ImagesParams.other_names, "denoising_strength": "strength"}
    own: ClassVar[frozenset[str]] = ImagesParams.own | {"images"}

    image: tuple[Source, ...] = Field(
        (),
        description=(
            "The image. A model that edits by instruction looks at all images, in order; another ignores further ones, "
            "with a warning."
        ),
    )
    images: tuple[Source, ...] = Field((), description="The same as `image`, as JSON bodies name it.")
    strength: float | None = Field(None, description="How much is changed, 0 to 1. If omitted 0.6, with a mask 1.")
    canny: bool | None = Field(False, description="Keep the edges of the image, with a ControlNet.")
    canny_low: int = Field(100, description="Lower Canny threshold: pixels above it that touch an edge belong to it.")
    canny_high: int = Field(200, description="Upper Canny threshold: pixels above it are edges.")
    control_scale: float | None = Field(None, description="How strongly to keep the edges.")

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """All images of the request; the first is used."""
        return (*self.image, *self.images)

    def faults(self, context: DialectContext) -> list[tuple[str, str]]:
        """Return (parameter, sentence) of each value out of its bounds, and of a missing image."""
        sentence = "image must be sent as a file of a multipart form, or in JSON as an address or a data URL."
        return [*([] if self.sources else [("image", sentence)]), *super().faults(context)]

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image."""
        return self._request(None)

    def warnings(self, context: DialectContext) -> list[RequestWarning]:
        """Return warnings about parameters that were ignored."""
        if len(self.sources) == 1 or self.base(context).references:
            return super().warnings(context)
        sentence = f"One picture is edited, the first; of several, {able(Task.EDIT, context.models)}."
        return [*super().warnings(context), RequestWarning("images-unused", sentence)]

    def _references(self, context: DialectContext, *, masked: bool) -> tuple[ImageInput, ...]:
        """Return the images that the model looks at: none if it does not edit; with a mask all but the first."""
        spec = context.find_model(self.model)
        if spec is None or Task.EDIT not in spec.tasks:
            return ()
        inputs = (source.to_input(_name_of(number)) for number, source in enumerate(self.sources))
        return tuple(inputs)[int(masked) :]

    def _request(self, mask: ImageSource | None, references: tuple[ImageInput, ...] = ()) -> GenerationRequest:
        width, height = self.pixels()
        fields = self._shared()
        strength, refine = fields.pop("strength"), fields.pop("refine")
        if references and mask is None:
            return GenerationRequest(
                task=Task.EDIT, references=references, width=width, height=height, **_without_edges(fields)
            )
        return GenerationRequest(
            task=Task.INPAINT if mask else Task.IMAGE_TO_IMAGE,
            image=self.sources[0].to_input("image"),
            mask=mask.to_input("mask", transparency=True) if mask else None,
            strength=strength if strength is not None else (1.0 if mask else _DEFAULT_STRENGTH),
            refine=refine if "refine" in self.model_fields_set else bool(mask),
            references=references,
            fit=Fit.CROP,
            width=width,
            height=height,
            **fields,
        )


def _name_of(number: int) -> str:
    """Return the parameter of an image, unlike those of the others."""
    return f"image[{number}]" if number else "image"


def _without_edges(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _OF_EDGES}


class EditImageParams(FromImageParams):
    """Parameters of an edit by instruction, of image to image, or with a mask of inpainting.

    The transparent parts of a mask are repainted.
    """

    files: ClassVar[frozenset[str]] = FromImageParams.files | {"mask", "markup"}
    pictures: ClassVar[frozenset[str]] = FromImageParams.pictures | {"mask"}
    own: ClassVar[frozenset[str]] = FromImageParams.own | {"markup"}

    markup: File = Field(None, description="Accepted and ignored, with a warning.")
    mask: OptionalSource = Field(
        None,
        description=(
            "Image of any size whose transparent parts are repainted. If omitted, `dall-e-2` takes the transparent "
            "parts of the image."
        ),
    )
    feather: int = Field(0, description="Pixels over which the repainted part fades in from the border of the mask.")
    refine: bool = Field(
        False, description="Run a second pass at low strength over the image. If omitted, only with a mask."
    )

    @property
    def file_with_hole(self) -> bytes | None:
        """The file whose transparent parts are the mask, if it has such parts; `None` if that is not asked for."""
        named = (self.model or "").startswith(_HOLE_MODEL)
        return self.sources[0].data if named and self.mask is None else None

    def with_own_mask(self) -> EditImageParams:
        """Return the parameters with the image as its own mask."""
        return self.model_copy(update={"mask": self.sources[0]})

    def default_format(self, context: DialectContext) -> str:
        """Return the `response_format` of a request without one: url or b64_json."""
        return "b64_json" if context.response_format == "auto" else context.response_format

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request: an edit by instruction where the model does that, otherwise of the first image.

        `strength` and `canny` ask for image to image, which those parameters belong to.
        """
        if self.mask is None and {"strength", "canny"} & self.model_fields_set:
            return self._request(None)
        return self._request(self.mask, self._references(context, masked=self.mask is not None))

    def warnings(self, context: DialectContext) -> list[RequestWarning]:
        """Return warnings about parameters that were ignored."""
        unused = RequestWarning("not-honoured", "markup: only a mask says what is changed.")
        return [*super().warnings(context), *([unused] if self.markup is not None else [])]


class VaryImageParams(FromImageParams):
    """Parameters of variations: image to image, by default without a prompt."""

    prompt: str = Field("", max_length=TEXT_MAX, description="What the images show; OpenAI has no prompt here.")

    def base(self, context: DialectContext) -> GenerationRequest:
        """Return the request of the first image."""
        return replace(super().base(context), allow_empty_prompt=True)
