"""A picture made here is drawn again: its record read and checked, its sources compared, the two laid side by side."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import cv2
import numpy as np
from pydantic import TypeAdapter, ValidationError

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.interfaces import DecodeImage
from stable_diffusion_server.generation.provenance import NOT_RECORDED
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.imaging import Pixels, read_record
from stable_diffusion_server.storage import HistoryEntry
from stable_diffusion_server.types import (
    LORA_NAME_PATTERN,
    Caller,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    Task,
)

IMAGE_FIELD = "picture_file"
_ORDERS = TypeAdapter(GenerationRequest)
_ASKED = frozenset(part.name for part in fields(GenerationRequest)) - NOT_RECORDED
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SOURCES: dict[Task, set[str]] = {
    Task.TEXT_TO_IMAGE: set(),
    Task.IMAGE_TO_IMAGE: {"image"},
    Task.INPAINT: {"image", "mask"},
}
_MOST_MARGIN = 16_384
_LORA_NAME = re.compile(LORA_NAME_PATTERN)


@dataclass(frozen=True, slots=True)
class EmbeddedProvenance:
    """What a picture made here says of itself: the order with its pictures left out, and the digest of the whole.

    `sources` are the SHA-256 of the files it was made from, `image` and `mask`.
    """

    request: GenerationRequest
    digest: str
    sources: Mapping[str, object]
    transparency: bool


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """A picture drawn again. `same_order`: by a model and parameters that are exactly those it was made with.

    `equal`: every pixel is the same; `decibels` is the peak signal-to-noise ratio where they differ.
    """

    result: GenerationResult
    same_request: bool
    equal: bool
    decibels: float | None


class ReplayService:
    """Reads what pictures say of themselves, and has them drawn again.

    `find` looks into the history, for pictures that carry nothing but a digest, as far as a caller may read it.
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
        """What a picture says of itself, or the history to this caller, as far as an order can say it.

        Raises `InvalidInput`, the same for a picture of which nothing is known as for another caller's.
        """
        record = await asyncio.to_thread(self._record_of, picture, caller)
        asked = record.get("asked")
        sources, digest = record.get("sources"), str(record.get("digest"))
        if not isinstance(asked, dict) or not isinstance(sources, dict) or not _DIGEST.fullmatch(digest):
            raise _refused("tells how it was made in words that are not this server's")
        return EmbeddedProvenance(_order_of(asked), digest, sources, record.get("transparency") is True)

    async def reproduce(
        self, memo: EmbeddedProvenance, order: GenerationRequest, picture: bytes, caller: Caller
    ) -> ReplayResult:
        """The picture of an order made from a memo, drawn and compared. Raises what drawing raises, `InvalidInput`."""
        _check_sources(memo, order)
        plan = await asyncio.to_thread(resolve_request, order, self._options)
        before = await self._decode(picture, IMAGE_FIELD, share=caller.share)
        receipt, data = await self._service.generate_with_bytes(order, caller=caller)
        after = await self._decode(data, IMAGE_FIELD, share=caller.share)
        decibels = await asyncio.to_thread(peak_signal_to_noise, before, after)
        return ReplayResult(receipt, plan.content_digest == memo.digest, decibels is None, decibels)

    def _record_of(self, picture: bytes, caller: Caller) -> dict[str, Any]:
        record = read_record(picture)
        if record is not None and "asked" not in record and isinstance(record.get("digest"), str):
            entry = self._find(str(record["digest"]), caller)
            record = dict(entry.record) if entry is not None else None
        if record is None:
            raise _refused("does not tell how it was made, as pictures made here do")
        return record


def with_sources(memo: EmbeddedProvenance, image: bytes | None, mask: bytes | None) -> GenerationRequest:
    """The memo's order with the pictures it is to be made from."""
    return replace(
        memo.request,
        image=ImageInput("image_file", data=image) if image is not None else None,
        mask=ImageInput("mask_file", data=mask, transparency=memo.transparency) if mask is not None else None,
    )


def peak_signal_to_noise(one: Pixels, other: Pixels) -> float | None:
    """Peak signal-to-noise ratio of two uint8 images in dB; `None` for equal ones, which have no finite ratio.

    0 dB for images of different sizes.
    """
    if one.shape != other.shape:
        return 0.0
    return None if np.array_equal(one, other) else round(float(cv2.PSNR(one, other)), 2)


def _order_of(asked: Mapping[str, object]) -> GenerationRequest:
    """The order a record tells, its types checked here and its bounds wherever an order is resolved."""
    if unknown := sorted(set(asked) - _ASKED):
        raise _refused(f"was asked for with what is not known here: {', '.join(unknown)[:100]}")
    try:
        order = _ORDERS.validate_python(dict(asked))
    except ValidationError as error:
        names = sorted({str(fault["loc"][0])[:100] for fault in error.errors(include_input=False) if fault["loc"]})
        raise _refused(f"was asked for with values that are none: {', '.join(names)}") from error
    if not all(_LORA_NAME.fullmatch(name) for name, _ in order.loras):
        raise _refused("names an adapter that is none")
    if order.only_masked is not None and not 0 <= order.only_masked <= _MOST_MARGIN:
        raise _refused("has a margin around its mask that is none")
    if order.task is Task.TEXT_TO_IMAGE and (order.width is None or order.height is None):
        raise _refused("has no size")
    return order


def _check_sources(memo: EmbeddedProvenance, order: GenerationRequest) -> None:
    if set(memo.sources) != _SOURCES[order.task]:
        raise _refused("was made from other files than its task needs")
    for name, source in (("image", order.image), ("mask", order.mask)):
        given = hashlib.sha256(source.data or b"").hexdigest() if source is not None else None
        wanted = memo.sources.get(name)
        if given == wanted:
            continue
        field = f"{name}_file"
        if wanted is None:
            raise InvalidInput(f"{field} is not needed: the picture was made without it.", field=field)
        raise InvalidInput(f"{field} has to be the file the picture was made from (SHA-256 {wanted}).", field=field)


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"{IMAGE_FIELD} {why}.", field=IMAGE_FIELD)
