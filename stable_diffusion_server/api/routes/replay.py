"""The door where a picture made here is drawn again from what it says of itself. Decides nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import caller_of, scope_to_caller
from stable_diffusion_server.api.dispatch import UrlOf
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.problems import client_gone
from stable_diffusion_server.api.request_parsing import read_parameters
from stable_diffusion_server.api.schemas.params import File, validated
from stable_diffusion_server.api.schemas.wire import documented, result_body
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import (
    IMAGE_FIELD,
    EmbeddedProvenance,
    ReplayService,
    RequestLimits,
    with_sources,
)
from stable_diffusion_server.types import Caller, Format, GenerationRequest


class ReplayParams(BaseModel):
    """A picture made here, the files it was made from, and where the new one goes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    files: ClassVar[frozenset[str]] = frozenset({IMAGE_FIELD, "image_file", "mask_file"})

    picture_file: File = Field(None, description="A picture made here, with the record that was put into it.")
    image_file: File = Field(None, description="The very file it was made from, where it was made from one.")
    mask_file: File = Field(None, description="The very mask it was made with, where there was one.")
    save_path: str | None = Field(None, description="Name of the new picture. Without it one below `replays/`.")
    overwrite: bool | None = Field(None, description="Draw even if the name is taken; so it is without `save_path`.")
    format: Format | None = Field(None, description="File format; without it that of the picture.")
    quality: int | None = Field(None, description="1 to 100; without it that of the picture.")
    timeout: float | None = Field(None, description="Seconds to wait for the picture at the most.")
    batch: Literal["any", "alone"] = Field("alone", description="`any` may share forward passes with others.")

    def order(self, memo: EmbeddedProvenance) -> GenerationRequest:
        """The order of the picture, to be stored elsewhere."""
        image, mask = (file.data if file is not None else None for file in (self.image_file, self.mask_file))
        order = with_sources(memo, image, mask)
        file_format = self.format or order.format or Format.WEBP
        return replace(
            order,
            save_path=self.save_path,
            overwrite=self.save_path is None if self.overwrite is None else self.overwrite,
            format=file_format,
            quality=order.quality if self.quality is None else self.quality,
            timeout=self.timeout,
            alone=self.batch == "alone",
        )


def replay_router(replays: ReplayService, limits: RequestLimits, url_of: UrlOf) -> APIRouter:
    """The door over what draws again; `url_of` makes the URL of a key for the client at hand."""
    routes = APIRouter(tags=["draw"])

    @routes.post(
        "/v1/replay",
        summary="Draw a picture made here again",
        description="Reads how a picture was made, draws it once more, and tells how alike the two are.",
        operation_id="replay",
        openapi_extra=documented(ReplayParams, limits, "POST"),
        response_model=None,
    )
    async def replay(request: Request) -> Response:
        asked = validated(ReplayParams, await read_parameters(request, ReplayParams.files))
        if asked.picture_file is None:
            raise InvalidInput(f"{IMAGE_FIELD} is missing.", field=IMAGE_FIELD)
        picture, caller = asked.picture_file.data, caller_of(request)
        memo = await replays.read_provenance(picture, caller)
        order = asked.order(memo)
        if asked.save_path is None:
            order = replace(order, **_name_for(caller, memo.digest, f".{order.format}"))
        work = replays.reproduce(memo, scope_to_caller(caller, order), picture, caller)
        if (done := await cancel_on_disconnect(request, work)) is None:
            return client_gone()
        told = {"same_order": done.same_request, "equal": done.equal, "decibels": done.decibels}
        return JSONResponse({**result_body(done.result, url_of(request, done.result.key)), "replay": told})

    return routes


def _name_for(caller: Caller, digest: str, ending: str) -> dict[str, Any]:
    """Where a replay without a name goes. The operator's are written over by the next of the same picture.

    Others could tell by such a name what was replayed before: theirs have a folder of the key's own, and those of
    anonymous callers a name each.
    """
    if caller.anonymous:
        return {"save_path": f"replays/{uuid4().hex}{ending}", "overwrite": False}
    own = f"{caller.name}/" if caller.name and not caller.prefix else ""
    return {"save_path": f"{caller.prefix}replays/{own}{digest[:32]}{ending}"}
