"""Verification route: who made an image, whether it is intact, and what the history knows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import UrlOf, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.openapi.document import parameters_openapi
from stable_diffusion_server.api.schemas.params import File, params_from_request
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits, Verification, VerificationService
from stable_diffusion_server.types import Caller


class SignerBody(TypedDict):
    """Names in the certificate, as its owner wrote them; `time` where a time stamp says when it signed."""

    issuer: str
    common_name: str
    cert_serial_number: str
    time: str


class ActionBody(TypedDict):
    """One step, such as `c2pa.created` or `c2pa.edited`, with the software that did it."""

    action: str
    source_type: str
    software: str
    version: str
    when: str
    digest: str


class IngredientBody(TypedDict):
    """An input, with the label of its own manifest if it had one."""

    title: str
    relationship: str
    active_manifest: str


class ManifestBody(TypedDict):
    """What one signed manifest says."""

    label: str
    generator: str
    signer: SignerBody
    actions: list[ActionBody]
    ingredients: list[IngredientBody]


class KnownImageBody(TypedDict):
    """What the history says of an image that this server signed."""

    key: str
    url: str
    model: str
    task: str
    seed: int
    drawn_at: float


class VerificationBody(TypedDict):
    """Who made an image: `ours`, `anothers`, `tampered`, `unreadable` or `none`.

    `intact` is null where no credentials can be checked. `failures` are C2PA's codes.
    """

    made_by: str
    intact: bool | None
    failures: list[str]
    manifests: list[ManifestBody]
    history: KnownImageBody | None
    certificate_sha256: str


class VerifyParams(RequestParams):
    """An image, as a file or by its URL."""

    files: ClassVar[frozenset[str]] = frozenset({"image_file"})

    image_file: File = Field(None, description="The image: PNG, JPEG or WebP.")
    image_url: str | None = Field(None, description="URL of the image, in place of `image_file`.")


def verify_router(verifications: VerificationService, limits: RequestLimits, url_of: UrlOf) -> APIRouter:
    """Return the route; `url_of` makes the URL of an object key."""
    routes = APIRouter(tags=["draw"])
    read_params = params_from_request(VerifyParams)

    @routes.post(
        "/v1/verify",
        summary="Who made this image, and is it intact?",
        description="Read and check the Content Credentials (C2PA) of an image. Nothing is stored.",
        operation_id="verify",
        openapi_extra=parameters_openapi(VerifyParams, limits, "POST"),
        response_model=None,
        responses={200: {"model": described(VerificationBody)}},
    )
    async def verify(request: Request, params: VerifyParams = Depends(read_params)) -> Response:
        caller = caller_of(request)
        if (params.image_file is None) == (params.image_url is None):
            raise InvalidInput("Give image_file or image_url, and not both.", field="image_file")
        work = _verify(verifications, params, caller)
        if (found := await cancel_on_disconnect(request, work)) is None:
            return client_closed_request()
        return JSONResponse(_body_of(found, lambda key: url_of(request, key)))

    return routes


async def _verify(verifications: VerificationService, params: VerifyParams, caller: Caller) -> Verification:
    if params.image_file is not None:
        return await verifications.verify(params.image_file.data, "image_file", caller)
    file = await verifications.download(params.image_url or "", "image_url", caller)
    return await verifications.verify(file, "image_url", caller)


def _body_of(found: Verification, url_of: Callable[[str], str]) -> VerificationBody:
    known: KnownImageBody | None = None
    if found.entry is not None:
        entry = found.entry
        known = {
            "key": entry.key,
            "url": url_of(entry.key),
            "model": entry.model,
            "task": entry.task,
            "seed": entry.seed,
            "drawn_at": entry.drawn_at,
        }
    manifests: list[Any] = [asdict(manifest) for manifest in found.manifests]
    return {
        "made_by": found.verdict.value,
        "intact": found.intact,
        "failures": list(found.failures),
        "manifests": manifests,
        "history": known,
        "certificate_sha256": found.certificate,
    }
