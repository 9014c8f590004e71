"""Request parameters of the native route for inpainting and outpainting."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stable_diffusion_server.api.base64_images import input_images
from stable_diffusion_server.api.schemas.params import File, NativeParams
from stable_diffusion_server.generation import extension_fields, extension_of
from stable_diffusion_server.types import Extension, Fill, GenerationRequest, MaskMode, Task


class InpaintParams(NativeParams):
    """Parameters of inpainting and outpainting: white parts of the mask and new sides are repainted, the rest stays."""

    numbers: ClassVar[frozenset[str]] = NativeParams.numbers | frozenset(extension_fields(Extension()))
    files: ClassVar[frozenset[str]] = NativeParams.files | {"image_file", "mask_file"}
    pictures: ClassVar[frozenset[str]] = NativeParams.pictures | {"image_url", "mask_url"}

    image_url: str | None = Field(None, description="URL of the image to repaint, or a data URL; or send `image_file`.")
    image_file: File = Field(None, description="The image to repaint, a PNG, JPEG or WebP file.")
    mask_url: str | None = Field(
        None,
        description="URL of the mask, white where to repaint, or a data URL; or send `mask_file`, or extend a side.",
    )
    mask_file: File = Field(None, description="The mask, a PNG, JPEG or WebP file of any size.")
    strength: float = Field(1.0, description="How much is changed inside the mask, 0 to 1.")
    feather: int = Field(0, description="Pixels over which the repainted part fades in from the border of the mask.")
    refine: bool = Field(True, description="Run a second pass at low strength over the image.")

    mask_mode: MaskMode = Field(
        MaskMode.HARD,
        description="What grey in the mask says: `hard`, how old and new are blended; `soft`, how much is changed.",
    )
    extend_left: int = Field(0, description="Pixels to extend the image by on its left side, without or with a mask.")
    extend_right: int = Field(0, description="Pixels to extend it by on its right side.")
    extend_top: int = Field(0, description="Pixels to extend it by at its top.")
    extend_bottom: int = Field(0, description="Pixels to extend it by at its bottom.")
    extend_overlap: int = Field(
        0,
        description="Pixels of the image next to a new side over which the new picture fades in; at 0 it stays exact.",
    )
    fill: Fill = Field(
        Fill.ORIGINAL,
        description="What is under the repainted part at first; `original` on new sides: the repeated border.",
    )

    def to_request_fields(self) -> dict[str, Any]:
        """Return the fields of a `GenerationRequest`, without the images."""
        values = super().to_request_fields()
        values["extend"] = extension_of({name: values.pop(name) for name in extension_fields(Extension())})
        return values

    def to_request(self) -> GenerationRequest:
        """Return the request these parameters describe.

        Raises `InvalidInput` without exactly one image, and without exactly one mask unless a side is extended.
        """
        fields = self.to_request_fields()
        unmasked = fields["extend"] is not None and self.mask_url is None and self.mask_file is None
        image, *mask = input_images(self, *(("image",) if unmasked else ("image", "mask")))
        return GenerationRequest(task=Task.INPAINT, image=image, mask=mask[0] if mask else None, **fields)
