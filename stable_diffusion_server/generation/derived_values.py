"""Decides what follows from a request and its digest: the seed, the object name, the file format."""

from __future__ import annotations

from secrets import randbelow
from uuid import NAMESPACE_OID, uuid5

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import SEED_MAX, Format, GenerationRequest

_EXTENSIONS = {"webp": Format.WEBP, "png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG}
# Extensions of image files that this server does not produce.
_OTHER_IMAGE_EXTENSIONS = frozenset("gif svg bmp tif tiff avif heic heif jxl ico pdf psd jp2 ppm tga".split())


def seed_of(request: GenerationRequest, request_digest: str) -> int:
    """Return the requested seed, a random one, or one derived from the digest (equal requests, equal images)."""
    if request.seed == "random":
        return randbelow(SEED_MAX + 1)
    return int(request_digest[:8], 16) if request.seed is None else (request.seed + request.variation) % (SEED_MAX + 1)


def object_name(request: GenerationRequest, request_digest: str) -> str:
    """Return `save_path`; with `named_by_content`, the file name gets a prefix of 8 digits of a UUIDv5."""
    name = request.save_path or ""
    if not request.named_by_content or not name:
        return name
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{str(uuid5(NAMESPACE_OID, request_digest))[:8]}-{file}" if file else name


def file_format_of(request: GenerationRequest) -> Format:
    """Return the requested format, or that of the extension of `save_path`, or WebP. Raises `InvalidInput`."""
    name = (request.save_path or "").rsplit("/", 1)[-1]
    ending = name.rsplit(".", 1)[1].lower() if "." in name else ""
    if ending in _OTHER_IMAGE_EXTENSIONS:
        raise InvalidInput(f"save_path ends in .{ending}; there are .webp, .png and .jpg.", field="save_path")
    promised = _EXTENSIONS.get(ending)
    if request.format and promised and request.format is not promised:
        raise InvalidInput(f"format is {request.format}, and save_path ends in .{ending}.", field="format")
    return request.format or promised or Format.WEBP
