"""Decodes images in base64 and changes them on threads, a few at a time and fairly by caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.base64_images import bytes_of, text_of
from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.request_parsing import read_json
from stable_diffusion_server.api.schemas.validation import raise_invalid
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import DEFAULT_QUALITY, DecodeImage
from stable_diffusion_server.imaging import DigitalSourceType, Pixels, encode_image, read_record, xmp_packet
from stable_diffusion_server.types import Format

# Requests that work at a time, each on a thread; maximum running and waiting requests per caller.
_CONCURRENCY, _MAX_PER_CALLER = 2, 16
# WebP cannot hold a longer side.
SIDE_MAX = 16_383

B = TypeVar("B", bound=BaseModel)
# Returns the width and height of the result from those of an image.
SizeOf = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ImageWorker:
    """Changes images without a model. At most two requests work at a time, so that memory is bounded."""

    context: DialectContext
    decode: DecodeImage
    queue: FairRequestQueue = field(
        default_factory=lambda: FairRequestQueue(
            _CONCURRENCY, _MAX_PER_CALLER, f"{_MAX_PER_CALLER} requests of yours change images already."
        )
    )

    async def change(
        self,
        request: Request,
        images: Sequence[str],
        parameter: str,
        size_of: SizeOf,
        change: Callable[[Pixels, int, int], Pixels],
        file_format: Format = Format.PNG,
    ) -> list[str]:
        """Return images, in base64 like those given, after `change` to the size that `size_of` returns.

        The record in a file stays in it. Raises the errors of decoding, and `InvalidInput` for `parameter` if the
        results would be too large for a response.
        """
        if not images:
            raise InvalidInput(f"{parameter} must hold an image in base64.", field=parameter)
        share, total = caller_of(request).share, 0
        changed: list[str] = []
        async with self.queue.hold(share):
            for image in images:
                data = await run_if_large(len(image), bytes_of, image, parameter)
                pixels = await self.decode(data, parameter, share=share)
                width, height = size_of(pixels.shape[1], pixels.shape[0])
                total += width * height
                self.check_size(width, height, total, parameter)
                changed.append(await run_in_threadpool(_changed, change, pixels, (width, height), data, file_format))
        return changed

    def check_size(self, width: int, height: int, total: int, parameter: str) -> None:
        """Raise `InvalidInput` for a result that is too long, and if all results have too many pixels (`total`)."""
        if max(width, height) > SIDE_MAX:
            sentence = f"The result would have {width} × {height} pixels; a side may have {SIDE_MAX}."
            raise InvalidInput(sentence, field=parameter)
        self.context.check_size(1, total, 1, parameter)


async def read_body(request: Request, model: type[B], pictures: frozenset[str]) -> B:
    """Read a JSON body as parameters; null stands for the default. Raises the errors of `read_json`, `InvalidInput`."""
    body = await read_json(request, pictures)
    given = {name: value for name, value in body.items() if value is not None}
    try:
        return await run_if_large(len(await request.body()), model.model_validate, given)
    except ValidationError as error:
        raise_invalid(error)


async def json_of(body: Mapping[str, object], images: Sequence[str]) -> JSONResponse:
    """Return a response that contains these images, encoded on a thread if they are large."""
    return await run_if_large(sum(map(len, images)), JSONResponse, body)


def _changed(
    change: Callable[[Pixels, int, int], Pixels], pixels: Pixels, size: tuple[int, int], data: bytes, target: Format
) -> str:
    """Return the changed image in base64, with the record in the file that it was made from."""
    record = read_record(data)
    xmp = "" if record is None else xmp_packet(DigitalSourceType.EDITED)
    return text_of(encode_image(change(pixels, *size), target, DEFAULT_QUALITY, record, xmp))
