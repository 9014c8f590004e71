"""GenerationService: resolution, deduplication, warnings. Runs on a fake model."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import COLOURS, Canvas, FakeDenoiser, FakePixels, until
from PIL import Image
from service_harness import OPTIONS, ServiceHarness, order

from stable_diffusion_server.errors import DeadlineExceeded, InvalidInput, StorageUnavailable
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.provenance import RECORDED_WARNINGS
from stable_diffusion_server.generation.resolver import resolve_request
from stable_diffusion_server.imaging import read_record
from stable_diffusion_server.pipelines import SAMPLING_NUMBERS
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.types import (
    EngineEventKind,
    Extension,
    Format,
    GenerationProgress,
    GenerationRequest,
    PromptSyntax,
)

HarnessOf = Callable[..., ServiceHarness]


@pytest.fixture
async def harness_of(tmp_path: Path) -> AsyncIterator[HarnessOf]:
    """Make a service over a fake model."""
    made: list[ServiceHarness] = []

    def make(painter: FakeDenoiser | None = None) -> ServiceHarness:
        made.append(ServiceHarness(tmp_path / "bucket", painter or FakeDenoiser()))
        return made[-1]

    yield make
    for harness in made:
        if harness.painter.gate is not None:
            harness.painter.gate.set()
        await asyncio.to_thread(harness.engine.stop, 10)
        harness.fetcher.close()
        await harness.decoder.close()


async def test_the_second_order_of_a_name_draws_nothing(harness_of: HarnessOf) -> None:
    """The existence check comes first, and the result describes the stored image."""
    harness = harness_of()
    first = await harness.service.generate(order(save_path="a.webp"))
    second = await harness.service.generate(order(save_path="a.webp"))
    assert harness.drawn == 1
    assert (first.cached, second.cached) == (False, True)
    assert (first.key, first.seed, first.scheduler) == (second.key, second.seed, second.scheduler)
    assert not second.warnings or {w.code for w in second.warnings} == {w.code for w in first.warnings}


async def test_equal_orders_without_a_name_meet(harness_of: HarnessOf) -> None:
    """Without a name the key is derived from the request.

    Equal requests, ignoring prompt whitespace, give the same image.
    """
    harness = harness_of()
    first = await harness.service.generate(order("a red  square"))
    second = await harness.service.generate(order(" a red square "))
    other = await harness.service.generate(order("a red square", num_inference_steps=5))
    assert first.key == second.key != other.key
    assert harness.drawn == 2


@pytest.mark.fault(60)
async def test_a_hundred_identical_orders_at_once_are_one_generation(harness_of: HarnessOf) -> None:
    """One image generated, one object stored, a hundred equal responses, ninety-nine of them marked as shared."""
    harness = harness_of(FakeDenoiser(seconds_per_step=0.01))
    receipts = await asyncio.gather(*(harness.service.generate(order()) for _ in range(100)))
    assert harness.drawn == 1
    assert len({(receipt.key, receipt.seed) for receipt in receipts}) == 1
    assert sum(receipt.coalesced or receipt.cached for receipt in receipts) == 99


async def test_everyone_who_shares_a_picture_gets_its_progress(harness_of: HarnessOf) -> None:
    """Two names of one image, and a late joiner: all get the steps, the late one the latest step at once."""
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    heard: dict[str, list[GenerationProgress]] = {"a.webp": [], "b.webp": [], "late": []}
    waiting = [
        asyncio.create_task(harness.service.generate(order(save_path=name, seed=1), watch=heard[name].append))
        for name in ("a.webp", "b.webp")
    ]
    await asyncio.to_thread(until, lambda: bool(harness.painter.batches))
    late = harness.service.generate(order(save_path="a.webp", seed=1), watch=heard["late"].append)
    waiting.append(asyncio.create_task(late))
    await asyncio.sleep(0.05)
    assert [news.kind for news in heard["late"]] == [EngineEventKind.STARTED]
    harness.painter.gate.set()
    await asyncio.gather(*waiting)
    for name in heard:
        steps = [news for news in heard[name] if news.kind is EngineEventKind.STEP]
        assert [(news.step, news.steps) for news in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert harness.drawn == 1


async def test_the_same_picture_under_two_names_is_drawn_once(harness_of: HarnessOf) -> None:
    """The image digest and the storage key are separate identities."""
    harness = harness_of(FakeDenoiser(seconds_per_step=0.05))
    names = [harness.service.generate(order(save_path=name, seed=1)) for name in ("a.webp", "b.png")]
    receipts = await asyncio.gather(*names)
    assert harness.drawn == 1
    assert {receipt.key.rsplit("/", 1)[1] for receipt in receipts} == {"a.webp", "b.png"}


async def test_another_request_under_a_taken_name_gets_what_is_stored_and_a_warning(
    harness_of: HarnessOf,
) -> None:
    """The key identifies the object; a warning says that another request made it."""
    harness = harness_of()
    red = await harness.service.generate(order("a red square", save_path="a.webp"))
    blue = await harness.service.generate(order("a blue square", save_path="a.webp"))
    assert harness.drawn == 1
    assert [warning.code for warning in blue.warnings] == ["different-request"]
    assert blue.seed == red.seed


async def test_another_request_under_a_name_that_is_generated_waits_for_it(harness_of: HarnessOf) -> None:
    """Concurrently: one is generated, the other waits and gets a warning, and nothing is overwritten."""
    harness = harness_of(FakeDenoiser(seconds_per_step=0.02))
    asked = (order("a red square", save_path="a.webp"), order("a blue square", save_path="a.webp"))
    receipts = await asyncio.gather(*map(harness.service.generate, asked))
    assert harness.drawn == 1
    assert sorted(receipt.cached for receipt in receipts) == [False, True]
    assert [w.code for receipt in receipts if receipt.cached for w in receipt.warnings] == ["different-request"]


async def test_overwrite_draws_again_under_the_same_name(harness_of: HarnessOf) -> None:
    """The new image replaces the old one and its record."""
    harness = harness_of()
    await harness.service.generate(order("a red square", save_path="a.webp"))
    receipt = await harness.service.generate(order("a blue square", save_path="a.webp", overwrite=True))
    again = await harness.service.generate(order("a blue square", save_path="a.webp"))
    assert harness.drawn == 2
    assert not receipt.cached
    assert (again.cached, again.seed, again.warnings) == (True, receipt.seed, receipt.warnings)


@pytest.mark.fault(41)
async def test_two_processes_store_one_object(harness_of: HarnessOf) -> None:
    """Without shared memory the bucket decides: both generate, one stores, both return the stored image."""
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    other = harness.another_process()
    both = [
        asyncio.create_task(service.generate(order(prompt, save_path="a.webp")))
        for service, prompt in ((harness.service, "a red square"), (other, "a blue square"))
    ]
    await asyncio.to_thread(until, lambda: harness.engine.running + harness.engine.waiting == 2)
    assert harness.painter.gate is not None
    harness.painter.gate.set()
    receipts = await asyncio.gather(*both)
    assert harness.drawn == 2
    assert sorted(receipt.cached for receipt in receipts) == [False, True]
    assert len({receipt.seed for receipt in receipts}) == 1


async def test_a_caller_who_leaves_takes_the_job_along_and_stores_nothing(
    harness_of: HarnessOf,
) -> None:
    """The last waiter that leaves frees the device."""
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    call = asyncio.create_task(harness.service.generate(order(save_path="a.webp", num_inference_steps=50)))
    await asyncio.to_thread(until, lambda: harness.engine.running == 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert harness.painter.gate is not None
    harness.painter.gate.set()
    await asyncio.to_thread(until, lambda: harness.engine.running == 0)
    assert len(harness.painter.batches) <= 2
    assert harness.bucket.stat("static/uploads/a.webp") is None


class SlowBucket(LocalBucket):
    """A local bucket on a slow disk."""

    def overwrite(self, *given: Any) -> Any:
        time.sleep(0.2)
        return super().overwrite(*given)

    def read(self, key: str) -> bytes:
        time.sleep(0.2)
        return super().read(key)


async def test_a_write_that_was_given_up_never_lands_after_a_later_one(harness_of: HarnessOf, tmp_path: Path) -> None:
    """A caller that overwrites a name and gets a result finds that image there, whatever was cancelled before."""
    harness = harness_of()
    harness.bucket = SlowBucket(tmp_path / "bucket")
    service = harness.another_process()
    given_up = asyncio.create_task(service.generate(order("a red square", save_path="a.webp", overwrite=True)))
    await asyncio.to_thread(until, lambda: harness.drawn == 1)
    await asyncio.sleep(0.05)
    given_up.cancel()
    kept = await service.generate(order("a blue square", save_path="a.webp", overwrite=True))
    await asyncio.sleep(0.3)
    stored = harness.bucket.stat("static/uploads/a.webp")
    assert stored is not None
    assert stored.record["seed"] == str(kept.seed)


async def test_each_order_is_answered_with_its_own_picture(harness_of: HarnessOf, tmp_path: Path) -> None:
    """Three overwrite one name concurrently on a slow disk: each gets the bytes it generated, not the last one's."""
    harness = harness_of()
    harness.bucket = SlowBucket(tmp_path / "bucket")
    service = harness.another_process()
    colours = ("red", "green", "blue")
    asked = [order(f"a {c} square", save_path="a.png", overwrite=True, seed=0) for c in colours]
    answers = await asyncio.gather(*map(service.generate_with_bytes, asked))
    shown = [Image.open(io.BytesIO(data)).getpixel((32, 32)) for _, data in answers]
    assert shown == [COLOURS[c] for c in colours]


async def test_a_follower_gets_the_warnings_of_its_own_request(harness_of: HarnessOf) -> None:
    """Sharing a generation does not share warnings about another request's parameters."""
    harness = harness_of(FakeDenoiser(seconds_per_step=0.02))
    with_negative, without = (
        order("a red square", model="flux", negative_prompt="blur"),
        order("a red square", model="flux"),
    )
    leader, follower = await asyncio.gather(harness.service.generate(with_negative), harness.service.generate(without))
    assert harness.drawn == 1
    assert "negative-prompt-ignored" in {warning.code for warning in leader.warnings}
    assert "negative-prompt-ignored" not in {warning.code for warning in follower.warnings}


async def test_another_kind_of_file_under_a_taken_name_is_reported(harness_of: HarnessOf) -> None:
    """The same image as WebP is not the requested PNG."""
    harness = harness_of()
    await harness.service.generate(order(save_path="no-ending"))
    receipt = await harness.service.generate(order(save_path="no-ending", format=Format.PNG))
    assert receipt.cached
    assert [warning.code for warning in receipt.warnings if warning.code == "different-request"]


async def test_a_cached_answer_remembers_that_the_prompt_was_shortened(
    harness_of: HarnessOf,
) -> None:
    """The second caller gets the truncation warning as well."""
    harness = harness_of()
    asked = order("a red square " + "with the very best of details " * 120, save_path="a.webp")
    codes = [{w.code for w in (await harness.service.generate(asked)).warnings} for _ in range(2)]
    assert all("prompt-shortened" in reported for reported in codes)


class FullBucket(LocalBucket):
    """A local bucket without free space."""

    def check_capacity(self) -> None:
        raise StorageUnavailable("The disk is full.")


async def test_a_full_storage_is_reported_before_drawing(harness_of: HarnessOf, tmp_path: Path) -> None:
    """503 before the device works; stored images are still returned."""
    harness = harness_of()
    await harness.service.generate(order("a red square", save_path="a.webp"))
    harness.bucket = FullBucket(tmp_path / "bucket")
    service = harness.another_process()
    with pytest.raises(StorageUnavailable, match="disk is full"):
        await service.generate(order("a blue square"))
    assert (await service.generate(order("a red square", save_path="a.webp"))).cached
    assert harness.drawn == 1


async def test_a_record_of_someone_elses_making_does_no_harm(harness_of: HarnessOf) -> None:
    """Invalid numbers are left out of the result, and the name still works."""
    harness = harness_of()
    harness.bucket.create(
        "static/uploads/odd.webp", b"data", "image/webp", {"width": "12px", "seed": "None", "steps": "nan"}
    )
    receipt = await harness.service.generate(order(save_path="odd.webp"))
    assert (receipt.cached, receipt.width, receipt.seed, receipt.num_inference_steps) == (True, None, None, None)


async def test_a_twin_stays_when_the_other_leaves(harness_of: HarnessOf) -> None:
    """Cancelling one waiter does not affect the other, which gets the image."""
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    leaver, stayer = (asyncio.create_task(harness.service.generate(order())) for _ in range(2))
    await asyncio.to_thread(until, lambda: harness.engine.running == 1)
    leaver.cancel()
    await asyncio.sleep(0.01)
    assert harness.painter.gate is not None
    harness.painter.gate.set()
    assert (await stayer).coalesced
    assert harness.drawn == 1


async def test_a_deadline_ends_the_wait_and_the_job(harness_of: HarnessOf) -> None:
    """After `timeout` seconds the caller gets an error, and the device is free."""
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    with pytest.raises(DeadlineExceeded, match=r"0\.05 seconds"):
        await harness.service.generate(order(timeout=0.05))
    assert harness.painter.gate is not None
    harness.painter.gate.set()
    await asyncio.to_thread(until, lambda: harness.engine.running == 0)
    assert harness.drawn == 0


@pytest.mark.fault(44)
async def test_a_storage_that_fails_is_reported_as_such(harness_of: HarnessOf, tmp_path: Path) -> None:
    """A folder replaced by a file is a 503 of the storage, not an unknown error."""
    harness = harness_of()
    folder = tmp_path / "bucket" / "tmp"
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(StorageUnavailable):
        await harness.service.generate(order(save_path="a.webp"))
    folder.unlink()
    folder.mkdir()
    assert not (await harness.service.generate(order(save_path="a.webp"))).cached


async def test_a_prompt_that_is_too_long_is_shortened_and_reported(harness_of: HarnessOf) -> None:
    """No silent truncation: the result has the prompt that was used."""
    harness = harness_of()
    words = "a red square " + "with the very best of details " * 120
    receipt = await harness.service.generate(order(words, prompt_syntax=PromptSyntax.PLAIN))
    assert receipt.prompt_used is not None
    assert receipt.prompt_used.startswith("red square best details")
    assert len(receipt.prompt_used.split()) == 75
    assert "prompt-shortened" in {warning.code for warning in receipt.warnings}
    in_chunks = await harness.service.generate(order(words, negative_prompt=words))
    assert in_chunks.prompt_used is not None
    assert in_chunks.prompt_used.split() == ["red", "square", *["best", "details"] * 120]
    said = [warning.message for warning in in_chunks.warnings if warning.code == "prompt-shortened"]
    assert said == [
        "sdxl reads 600 tokens; see prompt_used.",
        "The negative prompt was shortened: sdxl reads 600 tokens.",
    ]


class LeavingOut(FakeDenoiser):
    """Says that it left out two things."""

    def finish(self, state: Canvas) -> FakePixels:
        return replace(super().finish(state), warnings=("One half was left out.", "The other, too."))


async def test_what_a_model_did_not_use_is_reported_and_recorded(harness_of: HarnessOf) -> None:
    """Each sentence is a warning of its own and in the file; a later hit points there."""
    harness = harness_of(LeavingOut())
    receipt, file = await harness.service.generate_with_bytes(order())
    again = await harness.service.generate(order())
    said = [warning.message for warning in receipt.warnings if warning.code == "not-used"]
    assert said == ["One half was left out.", "The other, too."]
    assert (read_record(file) or {})["warnings"] == said
    assert again.cached
    assert [w.message for w in again.warnings if w.code == "not-used"] == [RECORDED_WARNINGS["not-used"]]


@pytest.mark.fault(10)
def test_the_seed_comes_from_the_order() -> None:
    """Equal requests have equal seeds, different ones differ, and a given seed is used."""
    seeds = [resolve_request(asked, OPTIONS).seed for asked in (order(), order(), order("another"), order(seed=5))]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[3] == 5


def test_a_random_seed_is_another_picture_each_time() -> None:
    """Two requests with seed=random share neither seed nor name."""
    first, second = (resolve_request(order(seed="random"), OPTIONS) for _ in range(2))
    assert first.seed != second.seed
    assert first.key != second.key
    assert first.request_digest == second.request_digest


@pytest.mark.parametrize(
    ("more", "file_format"),
    [
        ({}, Format.WEBP),
        ({"save_path": "a.png"}, Format.PNG),
        ({"save_path": "a.JPG"}, Format.JPEG),
        ({"save_path": "a.b/c"}, Format.WEBP),
        ({"save_path": "v1.2", "format": Format.PNG}, Format.PNG),
        ({"format": Format.JPEG}, Format.JPEG),
    ],
)
def test_the_format_is_the_one_asked_for_or_promised_by_the_name(more: dict[str, Any], file_format: Format) -> None:
    """`format` wins, then the extension of the name, then WebP."""
    assert resolve_request(order(**more), OPTIONS).file_format is file_format


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"save_path": "a.gif"}, "save_path"),
        ({"save_path": "a.webp", "format": Format.PNG}, "format"),
        ({"model": "../sdxl"}, "model"),
        ({"scheduler": "warp"}, "scheduler"),
        ({"scheduler": "flow_euler"}, "scheduler"),
        ({"prompt": " \u200b "}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"negative_prompt": "\ud800"}, "negative_prompt"),
        ({"save_path": "../a"}, "save_path"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    """Every error names its parameter."""
    with pytest.raises(InvalidInput) as refused:
        resolve_request(order(**{"prompt": "a red square", **more}), OPTIONS)
    assert refused.value.field == field


@pytest.mark.fault(7, 8, 9, 10)
@pytest.mark.parametrize(
    ("name", "low", "high"), [(name, *bounds) for name, bounds in RequestLimits().bounds().items()]
)
def test_every_bound_holds_on_both_sides_of_its_edge(name: str, low: float, high: float) -> None:
    """At each bound a value is accepted, one step beyond it is refused and named; so are NaN and infinity."""
    step = 1 if isinstance(low, int) and isinstance(high, int) else 0.0005
    limits = RequestLimits()

    def asked(value: float) -> GenerationRequest:
        if name.startswith("extend_"):
            other = "right" if name == "extend_left" else "left"
            return order(extend=Extension(**{other: 64, name.removeprefix("extend_"): value}))
        return order(sampling=((name, value),)) if name in SAMPLING_NUMBERS else order(**{name: value})

    for inside in (low, high):
        limits.check(asked(inside))
    for outside in (low - step, high + step, float("nan"), float("inf")):
        with pytest.raises(InvalidInput) as refused:
            limits.check(asked(outside))
        assert refused.value.field == name


@pytest.mark.fault(4)
def test_the_longest_prompt_is_taken_and_one_character_more_is_not() -> None:
    """For the prompt and the negative prompt alike."""
    limits = RequestLimits(max_prompt_characters=10)
    limits.check(order("x" * 10, negative_prompt="x" * 10))
    for more in ({"prompt": "x" * 11}, {"prompt": "x", "negative_prompt": "x" * 11}):
        with pytest.raises(InvalidInput):
            limits.check(order(**more))


def test_several_faults_are_reported_at_once() -> None:
    """The response lists all invalid fields at once."""
    with pytest.raises(InvalidInput) as refused:
        RequestLimits().check(order(width=1, height=9999, quality=0))
    assert [field for field, _ in refused.value.faults] == ["width", "height", "quality"]


def test_a_negative_prompt_no_model_uses_is_reported() -> None:
    """Flux ignores a negative prompt; the request succeeds with a warning."""
    plan = resolve_request(order(model="flux", negative_prompt="blur"), OPTIONS)
    assert plan.parameters.negative_prompt is None
    assert "negative-prompt-ignored" in {warning.code for warning in plan.parameters.warnings}


async def test_what_is_known_is_answered_without_asking_the_bucket(harness_of: HarnessOf) -> None:
    """The same result as with a bucket check.

    Nothing for a key that is unknown, to be overwritten, or being overwritten.
    """
    harness = harness_of(FakeDenoiser(gate=threading.Event()))
    service = harness.another_process()
    asked = order(save_path="a.webp")
    assert service.lookup_cached(asked) is None
    harness.painter.gate.set()  # type: ignore[union-attr]  # made with a gate above
    await service.generate(asked)
    service._known = harness.bucket.cached
    assert service.lookup_cached(asked) == await service.generate(asked)
    assert service.lookup_cached(order("a blue square", save_path="a.webp")) is not None
    assert service.lookup_cached(order(save_path="a.webp", overwrite=True)) is None
    harness.painter.gate.clear()  # type: ignore[union-attr]  # made with a gate above
    under_way = asyncio.create_task(service.generate(order(save_path="a.webp", overwrite=True)))
    await asyncio.to_thread(until, lambda: len(harness.painter.prepared) == 2)
    assert service.lookup_cached(asked) is None
    harness.painter.gate.set()  # type: ignore[union-attr]  # made with a gate above
    await under_way
    harness.bucket.delete("static/uploads/a.webp")
    assert service.lookup_cached(asked) is None


async def test_a_picture_others_deleted_is_drawn_again(harness_of: HarnessOf, tmp_path: Path) -> None:
    """The cache says stored, but the object is gone: the caller still gets an image."""
    harness = harness_of()
    service = harness.another_process()
    service._known = harness.bucket.cached
    await service.generate(order(save_path="a.webp"))
    (tmp_path / "bucket" / "objects" / "static" / "uploads" / "a.webp").unlink()
    receipt, data = await service.generate_with_bytes(order(save_path="a.webp"))
    assert (receipt.cached, data[8:12], harness.drawn) == (False, b"WEBP", 2)
