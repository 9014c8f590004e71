"""Replay: reads how an image was made, generates it again, and compares the two."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import cv2
import numpy as np
from pydantic import TypeAdapter, ValidationError

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.interfaces import DecodeImage
from stable_diffusion_server.generation.permissions import permitted_request
from stable_diffusion_server.generation.provenance import NOT_RECORDED
from stable_diffusion_server.generation.resolved_output import guiding_images, reference_name
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.imaging import Pixels, read_record
from stable_diffusion_server.storage import HistoryEntry
from stable_diffusion_server.types import (
    LORA_NAME_PATTERN,
    Caller,
    ControlUnit,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    PromptSyntax,
    Task,
)

IMAGE_FIELD = "picture_file"
_CONTROL_FILES, _UNIT_PARTS = "control_file", ("image", "mask")
_REQUESTS = TypeAdapter(GenerationRequest)
_RECORDED = frozenset(part.name for part in fields(GenerationRequest)) - NOT_RECORDED
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SOURCES: dict[Task, set[str]] = {
    Task.TEXT_TO_IMAGE: set(),
    Task.IMAGE_TO_IMAGE: {"image"},
    Task.INPAINT: {"image", "mask"},
}
_MAX_MARGIN = 16_384
_LORA_NAME = re.compile(LORA_NAME_PATTERN)


@dataclass(frozen=True, slots=True)
class EmbeddedProvenance:
    """The request in an image's metadata, without its input images, and the digest of the whole.

    `sources` has the SHA-256 of the input files: `image`, `mask`, `reference_0` and so on.
    """

    request: GenerationRequest
    digest: str
    sources: Mapping[str, object]
    transparency: bool


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The outcome of a replay. `same_request`: the digest is unchanged, so model and parameters are the same.

    `equal`: all pixels are equal; otherwise `decibels` is the peak signal-to-noise ratio.
    """

    result: GenerationResult
    same_request: bool
    equal: bool
    decibels: float | None


class ReplayService:
    """Reads the metadata of images, and generates them again.

    `find` looks a digest up in the history, for images whose metadata hold only a digest; `None` if the caller may not
    read the entry.
    """

    def __init__(
        self,
        service: GenerationService,
        decode: DecodeImage,
        options: GenerationOptions,
        find: Callable[[str, Caller], HistoryEntry | None],
    ) -> None:
        self._service = service
        self._decode = decode
        self._options = options
        self._find = find

    async def read_provenance(self, picture: bytes, caller: Caller) -> EmbeddedProvenance:
        """Return the provenance in an image, or in the history if the caller may read it.

        Raises the same `InvalidInput` for an unknown image and for an image of another caller.
        """
        record = await asyncio.to_thread(self._record_of, picture, caller)
        requested = record.get("asked")
        sources, digest = record.get("sources"), str(record.get("digest"))
        if not isinstance(requested, dict) or not isinstance(sources, dict) or not _DIGEST.fullmatch(digest):
            raise _refused("has metadata in a format that this server did not write")
        return EmbeddedProvenance(_request_of(requested), digest, sources, record.get("transparency") is True)

    async def reproduce(
        self, provenance: EmbeddedProvenance, request: GenerationRequest, picture: bytes, caller: Caller
    ) -> ReplayResult:
        """Generate the request of a provenance, and compare. Raises `InvalidInput`, and the errors of generation."""
        request = permitted_request(request, caller, self._options)
        _check_sources(provenance, request)
        resolved = await asyncio.to_thread(resolve_request, request, self._options)
        before = await self._decode(picture, IMAGE_FIELD, share=caller.share)
        result, data = await self._service.generate_with_bytes(request, caller=caller)
        after = await self._decode(data, IMAGE_FIELD, share=caller.share)
        decibels = await asyncio.to_thread(peak_signal_to_noise, before, after)
        return ReplayResult(result, resolved.content_digest == provenance.digest, decibels is None, decibels)

    def _record_of(self, picture: bytes, caller: Caller) -> dict[str, Any]:
        record = read_record(picture)
        if record is not None and "asked" not in record and isinstance(record.get("digest"), str):
            entry = self._find(str(record["digest"]), caller)
            record = dict(entry.record) if entry is not None else None
        if record is None:
            raise _refused("does not tell how it was made, as pictures made here do")
        return record


def with_sources(
    provenance: EmbeddedProvenance, images: Sequence[bytes], mask: bytes | None, controls: Sequence[bytes] = ()
) -> GenerationRequest:
    """Return the request of a provenance with its input images, and those of its control units in their order.

    Raises `InvalidInput` for several where one belongs.
    """
    edits = provenance.request.task is Task.EDIT
    if len(images) > 1 and not edits:
        raise InvalidInput("image_file is one file: the picture was made from one at most.", field="image_file")
    names = [f"image_file[{number}]" for number in range(len(images))] if edits else ["image_file"]
    inputs = tuple(ImageInput(name, data=data) for name, data in zip(names, images, strict=False))
    return replace(
        provenance.request,
        references=inputs if edits else (),
        image=inputs[0] if inputs and not edits else None,
        mask=ImageInput("mask_file", data=mask, transparency=provenance.transparency) if mask is not None else None,
        controls=_with_control_files(provenance.request.controls, provenance.sources, controls),
    )


def _control_names(controls: Sequence[ControlUnit], sources: Mapping[str, object]) -> list[str]:
    """Return the names of the units' own files among the recorded `sources`, in the order of the units."""
    names = [f"controls[{number}].{part}" for number in range(len(controls)) for part in _UNIT_PARTS]
    return [name for name in names if name in sources]


def _with_control_files(
    controls: Sequence[ControlUnit], sources: Mapping[str, object], files: Sequence[bytes]
) -> tuple[ControlUnit, ...]:
    """Return the units with their files, given in the order of `_control_names`.

    Raises `InvalidInput` for another number of files. Their content is compared with the record later.
    """
    names = _control_names(controls, sources)
    if len(files) != len(names):
        needed = f"the files of {', '.join(names)}, in this order" if names else "none: the picture was made without it"
        raise InvalidInput(f"{_CONTROL_FILES} must be {needed}.", field=_CONTROL_FILES)
    given = {name: ImageInput(name, data=data) for name, data in zip(names, files, strict=True)}
    return tuple(
        replace(unit, image=given.get(f"controls[{number}].image"), mask=given.get(f"controls[{number}].mask"))
        for number, unit in enumerate(controls)
    )


def peak_signal_to_noise(one: Pixels, other: Pixels) -> float | None:
    """Return the peak signal-to-noise ratio of two uint8 images in dB; `None` for equal images: it would be infinite.

    0 dB for images of different sizes.
    """
    if one.shape != other.shape:
        return 0.0
    return None if np.array_equal(one, other) else round(float(cv2.PSNR(one, other)), 2)


def _request_of(requested: Mapping[str, object]) -> GenerationRequest:
    """Return the recorded request. Checks types only; `resolve_request` checks the bounds."""
    if unknown := sorted(set(requested) - _RECORDED):
        raise _refused(f"was asked for with what is not known here: {', '.join(unknown)[:100]}")
    try:
        request = _REQUESTS.validate_python({"prompt_syntax": PromptSyntax.PLAIN, **requested, "wildcards": False})
    except ValidationError as error:
        names = sorted({str(fault["loc"][0])[:100] for fault in error.errors(include_input=False) if fault["loc"]})
        raise _refused(f"was asked for with values that are none: {', '.join(names)}") from error
    if not all(_LORA_NAME.fullmatch(name) for name, _ in request.loras):
        raise _refused("names an adapter that is none")
    if request.only_masked is not None and not 0 <= request.only_masked <= _MAX_MARGIN:
        raise _refused("has a margin around its mask that is none")
    if any(unit.image is not None or unit.mask is not None for unit in request.controls):
        raise _refused("names images of control units, which are given as files")
    if request.task is Task.TEXT_TO_IMAGE and (request.width is None or request.height is None):
        raise _refused("has no size")
    return request


def _check_sources(provenance: EmbeddedProvenance, request: GenerationRequest) -> None:
    guiding = _control_names(request.controls, provenance.sources)
    wanted_names = _SOURCES.get(request.task, set())
    if request.task is Task.EDIT:  # as many as there are, without a gap
        wanted_names = {reference_name(number) for number in range(max(1, len(provenance.sources) - len(guiding)))}
    if request.task is Task.INPAINT and request.extend is not None:  # its new sides are a mask
        wanted_names = {"image", *({"mask"} & set(provenance.sources))}
    wanted_names = wanted_names | set(guiding)
    if set(provenance.sources) != wanted_names:
        raise _refused("was made from other files than its task needs")
    given = {reference_name(number): source for number, source in enumerate(request.references)}
    given |= {name: source for name, source in (("image", request.image), ("mask", request.mask)) if source is not None}
    given |= guiding_images(request)
    for name in dict.fromkeys([*sorted(wanted_names), *given]):
        source, wanted = given.get(name), provenance.sources.get(name)
        if wanted == (hashlib.sha256(source.data or b"").hexdigest() if source is not None else None):
            continue
        field = "mask_file" if name == "mask" else _CONTROL_FILES if name in guiding else "image_file"
        if wanted is None:
            raise InvalidInput(f"{field} is not needed: the picture was made without it.", field=field)
        raise InvalidInput(f"{field} has to be the file the picture was made from (SHA-256 {wanted}).", field=field)


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"{IMAGE_FIELD} {why}.", field=IMAGE_FIELD)
