"""The cache of resolved requests is keyed by all its inputs: when one changes, so does the resolved request."""

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
    """A service over a fake model whose models and LoRAs can be exchanged at run time."""

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
async def app() -> AsyncIterator[ResolverHarness]:
    """One harness."""
    made = ResolverHarness()
    yield made
    await asyncio.to_thread(made.engine.stop, 10)
    await made.decoder.close()


@pytest.mark.fault(162)
@pytest.mark.parametrize(
    ("fact", "value", "reported"),
    [
        ("revision", "other-weights", "model"),
        ("default_steps", 7, "num_inference_steps"),
        ("default_guidance", 5.5, "guidance_scale"),
        ("default_scheduler", "ddim", "scheduler"),
    ],
)
async def test_a_model_that_became_another_draws_again(
    fact: str, value: Any, reported: str, app: ResolverHarness
) -> None:
    """Loading may replace a model: the new one's identity and defaults apply."""
    first = await app.service.generate(ORDER)
    assert app.service.lookup_cached(ORDER) is not None
    app.change(**{fact: value})
    assert app.service.lookup_cached(ORDER) is None
    second = await app.service.generate(ORDER)
    assert (second.cached, second.key == first.key, len(app.painter.finished)) == (False, False, 2)
    assert getattr(second, reported) == (value if reported != "model" else "sdxl")
    app.change(**{fact: getattr(MODELS["sdxl"], fact)})
    again = app.service.lookup_cached(ORDER)
    assert again is not None
    assert again.key == first.key


@pytest.mark.fault(162)
async def test_a_model_that_is_no_longer_here_draws_nothing_from_memory(app: ResolverHarness) -> None:
    """The default model changed its family, a named one was removed: the cache answers for neither."""
    first = await app.service.generate(ORDER)
    named = replace(ORDER, model="sdxl")
    assert (await app.service.generate(named)).key == first.key
    del app.models["sdxl"]
    assert app.service.lookup_cached(ORDER) is None
    assert (await app.service.generate(ORDER)).model == "flux"
    for ask in (app.service.lookup_cached, app.service.check_open):
        if ask == app.service.lookup_cached:
            with pytest.raises(InvalidInput, match="not a model here"):
                ask(named)
    with pytest.raises(InvalidInput, match="not a model here"):
        await app.service.generate(named)


@pytest.mark.fault(162)
async def test_an_adapter_with_other_content_is_another_picture_at_once(app: ResolverHarness) -> None:
    """The same request in the same process.

    Generated again, under another name, with the new content's digest in the job.
    """
    order = replace(ORDER, loras=(("ink", 1.0),))
    first = await app.service.generate(order)
    assert (await app.service.generate(order)).cached
    app.loras["ink"] = "2b"
    second = await app.service.generate(order)
    assert (second.cached, second.key == first.key) == (False, False)
    assert [job.lora_digests for job in app.painter.finished] == [("1a",), ("2b",)]


@pytest.mark.fault(162)
def test_jobs_with_other_adapter_contents_share_a_forward_pass_and_no_generation() -> None:
    """Equal names, unequal contents: different images, whose rows of one pass have LoRAs of their own."""
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
    assert len({job.shape for job in jobs}) == 1


@pytest.mark.fault(162)
async def test_a_name_is_looked_up_off_the_event_loop(app: ResolverHarness) -> None:
    """A cached answer reads no file, so a request with LoRAs never uses it."""
    order = replace(ORDER, loras=(("ink", 1.0),))
    await app.service.generate(order)
    app.loras = _Unread()
    assert app.service.lookup_cached(order) is None


class _Unread(dict[str, str]):
    """LoRAs that must not be read."""

    def __getitem__(self, name: str) -> str:
        raise AssertionError("read on the event loop")


@pytest.mark.fault(162)
def test_no_adapters_differ_from_an_unknown_one(tmp_path: Path) -> None:
    """An empty folder has no LoRAs; finding that out reads no file."""
    offered = LoraFolder(tmp_path).available({"unet"})
    assert (len(offered), "ink" in offered) == (0, False)
    with pytest.raises(KeyError):
        offered["ink"]
