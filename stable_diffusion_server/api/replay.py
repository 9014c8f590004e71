"""The door where a picture made here is drawn again from what it says of itself. Decides nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from stable_diffusion_server.api.asked import File, Shape, checked, read_as
from stable_diffusion_server.api.callers import caller_of, within
from stable_diffusion_server.api.handlers import client_gone
from stable_diffusion_server.api.schemas import (
    Inpaint,
    Parameters,
    StyleTransfer,
    TextToImage,
    documented,
    receipt_body,
)
from stable_diffusion_server.api.uploads import UrlOf, unless_disconnected
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.limits import Limits
from stable_diffusion_server.orders import Format, Order, Task
from stable_diffusion_server.replaying import PICTURE, Memo, Replays

_DOORS: dict[str, type[Parameters]] = {
    Task.TEXT_TO_IMAGE: TextToImage,
    Task.IMAGE_TO_IMAGE: StyleTransfer,
    Task.INPAINT: Inpaint,
}
