"""What is stored for a request: its object key, file format and digests. Drawing and upscaling share it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from stable_diffusion_server.generation.limits import file_format_of, name_of
from stable_diffusion_server.generation.permissions import Ownership
from stable_diffusion_server.storage import object_key
from stable_diffusion_server.types import Format, GenerationRequest, ImageInput, digest

DEFAULT_QUALITY = 85


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedOutput:
    """The object that a request is stored as, decided without decoding its input images.

    `content_digest` identifies the image. `request_digest` identifies the request with its seed as requested.
    `sent_digest` is the same, but with the URLs of remote input images instead of their bytes.
    `source_digests` are the SHA-256 of the input files, or URLs before download. `seed` is 0 for what has none.
    """

    request: GenerationRequest
    seed: int
    file_format: Format
    quality: int
    key: str
    content_digest: str
    request_digest: str
    sent_digest: str
    source_digests: Mapping[str, str | None]

    @property
    def tag(self) -> str:
        """Identifies the object to store under the key: requests with equal key and tag share one task."""
        return f"{self.content_digest}/{self.file}/{self.request.overwrite}/{self.request.alone}"

    @property
    def file(self) -> str:
        """Format and quality of the stored file, such as `webp/90`."""
        return f"{self.file_format}/{self.quality}"

    @property
    def key_is_known(self) -> bool:
        """Whether the key does not depend on the input images, so that it is final before they are downloaded."""
        return self.request.save_path is not None and not self.request.named_by_content

    def matches(self, record: Mapping[str, str]) -> bool:
        """Whether the object with this record was made from this request, or has the same content digest."""
        known = {("sent", self.sent_digest), ("order", self.request_digest), ("digest", self.content_digest)}
        return record.get("file") == self.file and bool(known & set(record.items()))


class OutputPlace(NamedTuple):
    """Format, quality and object key of the file to store."""

    file_format: Format
    quality: int
    key: str


def place_of(
    request: GenerationRequest, content: str, request_digest: str, bucket_path: str, ownership: Ownership
) -> OutputPlace:
    """Where the image of a request is stored; `content` is its content digest. Raises `InvalidInput`."""
    file_format = file_format_of(request)
    # PNG is lossless, so its quality must not make two files differ.
    quality = DEFAULT_QUALITY if request.quality is None else request.quality
    quality = 100 if file_format is Format.PNG else quality
    conceal = ownership.conceal
    if request.save_path is not None:
        name = name_of(request, conceal(f"{request_digest}/{file_format}/{quality}", request))
    else:
        key_digest = conceal(digest({"content": content, "format": file_format, "quality": quality}), request)
        name = f"{request.folder}{key_digest[:32]}.{file_format}"
    return OutputPlace(file_format, quality, object_key(bucket_path, name))


def source_identities(request: GenerationRequest, fetched: Mapping[str, bytes] | None = None) -> dict[str, str | None]:
    """Return identities of the input images: SHA-256 of the bytes, or the URL as a placeholder if not `fetched`."""
    addresses = {source.parameter: source.url for source in request.sources if source.url is not None}
    given: Mapping[str, str | bytes] = fetched or addresses

    def identity(source: ImageInput | None) -> str | None:
        if source is None:
            return None
        known = source.data if source.data is not None else given[source.parameter]
        return hashlib.sha256(known).hexdigest() if isinstance(known, bytes) else known

    references = {reference_name(number): identity(source) for number, source in enumerate(request.references)}
    guiding = {name: identity(source) for name, source in guiding_images(request).items()}
    return {"image": identity(request.image), "mask": identity(request.mask), **references, **guiding}


def guiding_images(request: GenerationRequest) -> dict[str, ImageInput]:
    """Return the images of control units and image prompts by their names among the input images of a request."""
    return {
        f"{name}[{number}].{kind}": source
        for name, parts in (("controls", request.controls), ("image_prompts", request.image_prompts))
        for number, part in enumerate(parts)
        for kind in ("image", "mask")
        if (source := getattr(part, kind, None)) is not None
    }


def reference_name(number: int) -> str:
    """Return the name of a reference image among the input images of a request, counted from 0."""
    return f"reference_{number}"
