"""What is kept of an order is kept with all it was made from: when one of these changes, so does the plan."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from fakes import FakeDenoiser, until

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.storage.memory import MemoryBucket
from stable_diffusion_server.types import DiffusionRequest, GenerationRequest, StoredObject, Task, image_digest

ORDER = GenerationRequest(Task.TEXT_TO_IMAGE, "a red square", 64, 64)


class ResolverHarness:
    """A service over painted squares whose models and adapters can be exchanged while it runs."""

    def __init__(self) -> None:
        self.painter = FakeDenoiser()
        self.models: dict[str, ModelSpec] = dict(MODELS)
        self.loras: dict[str, str] = {"ink": "1a"}
        self.bucket = MemoryBucket()
        self.engine: Engine[Any] = Engine(lambda: self.painter, queue_limit=64, max_batch=4)
        self.engine.start()
        until(lambda: self.engine.state is EngineState.READY)
        self.decoder = DecoderPool(max_bytes=1_000_000, max_pixels=1_000_000, max_side=2048)
        self.service = GenerationService(
            self.bucket,
            self.engine,
            self.painter.count_tokens,
            GenerationOptions(
                RequestLimits(), "sdxl", "up", models=MappingProxyType(self.models), loras=lambda: self.loras
            ),
            fetch=self.fetch,
            decode=self.decoder.decode,
            known=self.known,
        )

    async def fetch(self, url: str, parameter: str) -> bytes:
        raise AssertionError("nothing is fetched here")

    def known(self, key: str) -> StoredObject | None:
        return self.bucket.stat(key)

    def change(self, **facts: Any) -> None:
        self.models["sdxl"] = replace(self.models["sdxl"], **facts)


@pytest.fixture
async def rooms() -> AsyncIterator[ResolverHarness]:
    """One of them."""
    made = ResolverHarness()
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
async def test_a_model_that_became_another_is_drawn_anew(
    fact: str, value: Any, told: str, rooms: ResolverHarness
) -> None:
    """Loading may put another in its place: neither its identity nor its defaults are those of the plan before."""
    first = await rooms.service.generate(ORDER)
    assert rooms.service.lookup_cached(ORDER) is not None
    rooms.change(**{fact: value})
    assert rooms.service.lookup_cached(ORDER) is None
    second = await rooms.service.generate(ORDER)
    assert (second.cached, second.key == first.key, len(rooms.painter.finished)) == (False, False, 2)
    assert getattr(second, told) == (value if told != "model" else "sdxl")
    rooms.change(**{fact: getattr(MODELS["sdxl"], fact)})
    again = rooms.service.lookup_cached(ORDER)
    assert again is not None
    assert again.key == first.key


@pytest.mark.fault(162)
async def test_a_model_that_is_no_longer_here_draws_nothing_from_memory(rooms: ResolverHarness) -> None:
    """The usual model became another family, and a named one went: neither is answered from what was kept."""
    first = await rooms.service.generate(ORDER)
    named = replace(ORDER, model="sdxl")
    assert (await rooms.service.generate(named)).key == first.key
    del rooms.models["sdxl"]
    assert rooms.service.lookup_cached(ORDER) is None
    assert (await rooms.service.generate(ORDER)).model == "flux"
    for ask in (rooms.service.lookup_cached, rooms.service.check_open):
        if ask == rooms.service.lookup_cached:
            with pytest.raises(InvalidInput, match="not a model here"):
                ask(named)
    with pytest.raises(InvalidInput, match="not a model here"):
        await rooms.service.generate(named)


@pytest.mark.fault(162)
async def test_an_adapter_with_other_content_is_another_picture_at_once(rooms: ResolverHarness) -> None:
    """The same order, in the same process: drawn again, under another name, and the job says which content is meant."""
    order = replace(ORDER, loras=(("ink", 1.0),))
    first = await rooms.service.generate(order)
    assert (await rooms.service.generate(order)).cached
    rooms.loras["ink"] = "2b"
    second = await rooms.service.generate(order)
    assert (second.cached, second.key == first.key) == (False, False)
    assert [job.lora_digests for job in rooms.painter.finished] == [("1a",), ("2b",)]


@pytest.mark.fault(162)
def test_jobs_with_other_adapter_contents_share_neither_flight_nor_forward_pass() -> None:
    """Equal names, unequal contents: unlike pictures, and unlike shapes."""
    jobs = [
        DiffusionRequest(
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
    assert len({image_digest(job) for job in jobs}) == 3
    assert len({job.shape for job in jobs}) == 3


@pytest.mark.fault(162)
async def test_a_name_is_looked_up_off_the_event_loop(rooms: ResolverHarness) -> None:
    """What is remembered is answered without reading any file, so an order with adapters is never answered from it."""
    order = replace(ORDER, loras=(("ink", 1.0),))
    await rooms.service.generate(order)
    rooms.loras = _Unread()
    assert rooms.service.lookup_cached(order) is None


class _Unread(dict[str, str]):
    """Adapters that may not be asked for."""

    def __getitem__(self, name: str) -> str:
        raise AssertionError("read on the event loop")


@pytest.mark.fault(162)
def test_no_adapters_are_told_apart_from_an_unknown_one(tmp_path: Path) -> None:
    """An empty folder offers nothing; the mapping reads no file to say so."""
    offered = LoraFolder(tmp_path).available({"unet"})
    assert (len(offered), "ink" in offered) == (0, False)
    with pytest.raises(KeyError):
        offered["ink"]
