"""What is kept of an order is kept with all it was made from: when one of these changes, so does the plan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from fakes import PaintedSquares, until

from stable_diffusion_server.engine import Engine, Phase
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import Limits
from stable_diffusion_server.generation.resolver import Options
from stable_diffusion_server.generation.service import Service
from stable_diffusion_server.imaging.sandbox.pool import Decoder
from stable_diffusion_server.pipelines.catalog import MODELS, ModelFacts
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.types import Job, Order, Stored, Task, picture_digest

ORDER = Order(Task.TEXT_TO_IMAGE, "a red square", 64, 64)


class Rooms:
    """A service over painted squares whose models and adapters can be exchanged while it runs."""

    def __init__(self) -> None:
        self.painter = PaintedSquares()
        self.models: dict[str, ModelFacts] = dict(MODELS)
        self.loras: dict[str, str] = {"ink": "1a"}
        self.bucket = MemoryBucket()
        self.engine: Engine[Any, Any] = Engine(lambda: self.painter, queue_limit=64, max_batch=4)
        self.engine.start()
        until(lambda: self.engine.phase is Phase.READY)
        self.decoder = Decoder(max_bytes=1_000_000, max_pixels=1_000_000, max_side=2048)
        self.service = Service(
            self.bucket,
            self.engine,
            self.painter.count_tokens,
            Options(Limits(), "sdxl", "up", models=MappingProxyType(self.models), loras=lambda: self.loras),
            fetch=self.fetch,
            decode=self.decoder.decode,
            known=self.known,
        )

    async def fetch(self, url: str, parameter: str) -> bytes:
        raise AssertionError("nothing is fetched here")

    def known(self, key: str) -> Stored | None:
        return self.bucket.stat(key)

    def change(self, **facts: Any) -> None:
        self.models["sdxl"] = replace(self.models["sdxl"], **facts)


@pytest.fixture
async def rooms() -> AsyncIterator[Rooms]:
    """One of them."""
    made = Rooms()
    yield made
    await asyncio.to_thread(made.engine.stop, 10)
    await made.decoder.close()


@pytest.mark.fault(162)
@pytest.mark.parametrize(
    ("fact", "value", "told"),
    [
        ("revision", "other-weights", "model"),
        ("default_steps", 7, "num_inference_steps"),
        ("default_guidance", 5.5, "guidance_scale"),
        ("default_scheduler", "ddim", "scheduler"),
    ],
)
async def test_a_model_that_became_another_is_drawn_anew(fact: str, value: Any, told: str, rooms: Rooms) -> None:
    """Loading may put another in its place: neither its identity nor its defaults are those of the plan before."""
    first = await rooms.service.fulfil(ORDER)
    assert rooms.service.remembered(ORDER) is not None
    rooms.change(**{fact: value})
    assert rooms.service.remembered(ORDER) is None
    second = await rooms.service.fulfil(ORDER)
    assert (second.cached, second.key == first.key, len(rooms.painter.finished)) == (False, False, 2)
    assert getattr(second, told) == (value if told != "model" else "sdxl")
    rooms.change(**{fact: getattr(MODELS["sdxl"], fact)})
    again = rooms.service.remembered(ORDER)
    assert again is not None
    assert again.key == first.key


@pytest.mark.fault(162)
async def test_a_model_that_is_no_longer_here_draws_nothing_from_memory(rooms: Rooms) -> None:
    """The usual model became another family, and a named one went: neither is answered from what was kept."""
    first = await rooms.service.fulfil(ORDER)
    named = replace(ORDER, model="sdxl")
    assert (await rooms.service.fulfil(named)).key == first.key
    del rooms.models["sdxl"]
    assert rooms.service.remembered(ORDER) is None
    assert (await rooms.service.fulfil(ORDER)).model == "flux"
    for ask in (rooms.service.remembered, rooms.service.check_open):
        if ask == rooms.service.remembered:
            with pytest.raises(InvalidInput, match="not a model here"):
                ask(named)
    with pytest.raises(InvalidInput, match="not a model here"):
        await rooms.service.fulfil(named)


@pytest.mark.fault(162)
async def test_an_adapter_with_other_content_is_another_picture_at_once(rooms: Rooms) -> None:
    """The same order, in the same process: drawn again, under another name, and the job says which content is meant."""
    order = replace(ORDER, loras=(("ink", 1.0),))
    first = await rooms.service.fulfil(order)
    assert (await rooms.service.fulfil(order)).cached
    rooms.loras["ink"] = "2b"
    second = await rooms.service.fulfil(order)
    assert (second.cached, second.key == first.key) == (False, False)
    assert [job.lora_digests for job in rooms.painter.finished] == [("1a",), ("2b",)]


@pytest.mark.fault(162)
def test_jobs_with_other_adapter_contents_share_neither_flight_nor_forward_pass() -> None:
    """Equal names, unequal contents: unlike pictures, and unlike shapes."""
    jobs = [
        Job(
            Task.TEXT_TO_IMAGE,
            "sdxl",
            "r",
            "a disc",
            None,
            64,
            64,
            1,
            4,
            1.0,
            "euler",
            loras=(("ink", 1.0),),
            lora_digests=d,
        )
        for d in (("1a",), ("2b",), ())
    ]
    assert len({picture_digest(job) for job in jobs}) == 3
    assert len({job.shape for job in jobs}) == 3


@pytest.mark.fault(162)
async def test_a_name_is_looked_up_off_the_event_loop(rooms: Rooms) -> None:
    """What is remembered is answered without reading any file, so an order with adapters is never answered from it."""
    order = replace(ORDER, loras=(("ink", 1.0),))
    await rooms.service.fulfil(order)
    rooms.loras = _Unread()
    assert rooms.service.remembered(order) is None


class _Unread(dict[str, str]):
    """Adapters that may not be asked for."""

    def __getitem__(self, name: str) -> str:
        raise AssertionError("read on the event loop")


@pytest.mark.fault(162)
def test_no_adapters_are_told_apart_from_an_unknown_one(tmp_path: Path) -> None:
    """An empty folder offers nothing; the mapping reads no file to say so."""
    offered = LoraFolder(tmp_path).offered({"unet"})
    assert (len(offered), "ink" in offered) == (0, False)
    with pytest.raises(KeyError):
        offered["ink"]
