"""Replay route: generates an image again from its embedded provenance, and compares the two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal
from uuid import uuid4

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import UrlOf, caller_of, scope_to_caller
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.openapi.document import parameters_openapi
from stable_diffusion_server.api.schemas.control_params import ListedFile
from stable_diffusion_server.api.schemas.params import File, params_from_request
from stable_diffusion_server.api.schemas.responses import ReplayComparisonBody, ReplayResultBody, described, result_body
from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import (
    IMAGE_FIELD,
    EmbeddedProvenance,
    ReplayService,
    RequestLimits,
    with_sources,
)
from stable_diffusion_server.types import Caller, Format, GenerationRequest


class ReplayParams(RequestParams):
    """An image made here, its input files, and where to store the new image."""

    files: ClassVar[frozenset[str]] = frozenset({IMAGE_FIELD, "image_file", "mask_file", "control_file"})
    lists: ClassVar[frozenset[str]] = frozenset({"image_file", "control_file"})

    picture_file: File = Field(None, description="An image made here, with its embedded record.")
    image_file: tuple[ListedFile, ...] = Field(
        (), description="The input image it was made from, if there was one: the same file; for an edit all, in order."
    )
    mask_file: File = Field(None, description="The mask it was made with, if there was one: the same file.")
    control_file: tuple[ListedFile, ...] = Field(
        (),
        description="The files of its control units, if it had any: the same files, images and masks in their order.",
    )
    save_path: str | None = Field(
        None, description="Object key of the new image. If omitted, a key that starts with `replays/`."
    )
    overwrite: bool | None = Field(
        None, description="Generate even if the key exists. The default without `save_path`."
    )
    format: Format | None = Field(None, description="File format. If omitted, that of the image.")
    quality: int | None = Field(None, description="1 to 100. If omitted, that of the image.")
    timeout: float | None = Field(None, description="Maximum seconds to wait for the image.")
    batch: Literal["any", "alone"] = Field("alone", description="`any` may share forward passes with other requests.")

    def to_request(self, provenance: EmbeddedProvenance) -> GenerationRequest:
        """Return the request of the image, with its new object key and format."""
        mask = self.mask_file.data if self.mask_file is not None else None
        original = with_sources(
            provenance, [file.data for file in self.image_file], mask, [file.data for file in self.control_file]
        )
        file_format = self.format or original.format or Format.WEBP
        return replace(
            original,
            save_path=self.save_path,
            overwrite=self.save_path is None if self.overwrite is None else self.overwrite,
            format=file_format,
            quality=original.quality if self.quality is None else self.quality,
            timeout=self.timeout,
            alone=self.batch == "alone",
        )


def replay_router(replays: ReplayService, limits: RequestLimits, url_of: UrlOf) -> APIRouter:
    """Return the route; `url_of` makes the URL of an object key."""
    routes = APIRouter(tags=["draw"])
    read_params = params_from_request(ReplayParams)

    @routes.post(
        "/v1/replay",
        summary="Generate an image made here again",
        description="Read how an image was made, generate it again, and compare the two.",
        operation_id="replay",
        openapi_extra=parameters_openapi(ReplayParams, limits, "POST"),
        response_model=None,
        responses={200: {"model": described(ReplayResultBody)}},
    )
    async def replay(request: Request, params: ReplayParams = Depends(read_params)) -> Response:
        if params.picture_file is None:
            raise InvalidInput(f"{IMAGE_FIELD} is missing.", field=IMAGE_FIELD)
        picture, caller = params.picture_file.data, caller_of(request)
        provenance = await replays.read_provenance(picture, caller)
        generation = params.to_request(provenance)
        if params.save_path is None:
            generation = replace(generation, **_default_place(caller, provenance.digest, f".{generation.format}"))
        work = replays.reproduce(provenance, scope_to_caller(caller, generation), picture, caller)
        if (done := await cancel_on_disconnect(request, work)) is None:
            return client_closed_request()
        comparison: ReplayComparisonBody = {
            "same_order": done.same_request,
            "equal": done.equal,
            "decibels": done.decibels,
        }
        return JSONResponse({**result_body(done.result, url_of(request, done.result.key)), "replay": comparison})

    return routes


def _default_place(caller: Caller, digest: str, ending: str) -> dict[str, Any]:
    """Return key and overwrite of a replay without `save_path`: by the digest, so that the next replay replaces it.

    A shared object key would reveal which images other callers replayed. So each API key has its own folder, and each
    replay of an anonymous caller a random object key.
    """
    if caller.anonymous:
        return {"save_path": f"replays/{uuid4().hex}{ending}", "overwrite": False}
    own = f"{caller.name}/" if caller.name and not caller.prefix else ""
    return {"save_path": f"{caller.prefix}replays/{own}{digest[:32]}{ending}"}
