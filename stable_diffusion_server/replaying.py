"""A picture made here is drawn again: its record read and checked, its sources compared, the two laid side by side."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.history.entries import Entry
from stable_diffusion_server.image_processing import Pixels
from stable_diffusion_server.inscriptions import read_record
from stable_diffusion_server.orders import Caller, Order, Receipt
from stable_diffusion_server.resolving import Options, resolve
from stable_diffusion_server.service import Decode, Service

PICTURE = "picture_file"


@dataclass(frozen=True, slots=True)
class Memo:
    """What a picture made here says of itself: the task, the parameters of its door, SHA-256 of the files it came from."""

    task: str
    digest: str
    asked: Mapping[str, object]
    sources: Mapping[str, str]
    batched: bool


@dataclass(frozen=True, slots=True)
class Replayed:
    """A picture drawn again. `same_order`: by a model and parameters that are exactly those it was made with.

    `equal`: every pixel is the same; `decibels` is the peak signal-to-noise ratio where they differ.
    """

    receipt: Receipt
    same_order: bool
    equal: bool
    decibels: float | None


class Replays:
    """Reads what pictures say of themselves and has them drawn again."""

    def __init__(
        self, service: Service, decode: Decode, options: Options, find: Callable[[str, str], Entry | None]
    ) -> None:
        self._service = service
        self._decode = decode
        self._options = options
        self._find = find

    async def memo_of(self, picture: bytes) -> Memo:
        """What a picture says of itself, or the history of the digest it carries. Raises `InvalidInput`."""
        record = await asyncio.to_thread(read_record, picture)
        if record is not None and "asked" not in record and isinstance(record.get("digest"), str):
            entry = await asyncio.to_thread(self._find, "digest", str(record["digest"]))
            record = dict(entry.record) if entry is not None else None
        if record is None:
            raise InvalidInput(f"{PICTURE} does not tell how it was made; only pictures made here do.", field=PICTURE)
        task, digest, asked, sources = (record.get(name) for name in ("task", "digest", "asked", "sources"))
        if not (isinstance(asked, dict) and isinstance(sources, dict) and isinstance(task, str)):
            raise InvalidInput(f"{PICTURE} tells how it was made in a way that is not this server's.", field=PICTURE)
        return Memo(task, str(digest), asked, sources, record.get("batched") is True)

    async def draw(self, order: Order, memo: Memo, picture: bytes, caller: Caller) -> Replayed:
        """The picture of an order that was made from a memo, drawn and compared. Raises what drawing raises."""
        for name, source in (("image", order.image), ("mask", order.mask)):
            given = hashlib.sha256(source.data).hexdigest() if source and source.data else None
            if given != memo.sources.get(name):
                which = source.parameter if source else f"{name}_file"
                raise InvalidInput(f"{which} is not the file this picture was made from.", field=which)
        plan = await asyncio.to_thread(resolve, order, self._options)
        before = await self._decode(picture, PICTURE)
        receipt, data = await self._service.picture(order, caller=caller)
        after = await self._decode(data, PICTURE)
        decibels = await asyncio.to_thread(peak_signal_to_noise, before, after)
        return Replayed(receipt, plan.content == memo.digest, decibels is None, decibels)


def peak_signal_to_noise(one: Pixels, other: Pixels) -> float | None:
    """How alike two pictures (uint8) are, in decibels: 10 log10 of 255² over the mean square error; `None` if equal.

    Pictures of different sizes are 0 dB alike.
    """
    if one.shape != other.shape:
        return 0.0
    error = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2))
    return None if error == 0 else round(10 * float(np.log10(255**2 / error)), 2)
