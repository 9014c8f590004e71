"""Detail repair: what a detector finds in a finished image is drawn again at full size, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeImageDenoiser, disc, file_of
from service_harness import OPTIONS, ServiceHarness

from stable_diffusion_server.errors import InvalidInput, ServerError
from stable_diffusion_server.generation.repair_requests import (
    ChosenDetector,
    DetectedPart,
    chosen_parts,
    part_mask,
)
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import DetailRepair, GenerationRequest, ImageInput, Task

FOUND = DetectedPart((16.0, 16.0, 48.0, 48.0), 0.9, "disc")


@dataclass
class ListedParts:
    """A detector that finds the parts of a list in every image."""

    parts: Sequence[DetectedPart] = (FOUND,)
    fault: ServerError | None = None
    seen: list[Pixels] = field(default_factory=list)

    def find(self, name: str, field: str) -> ChosenDetector:
        if name not in ("faces", "hands"):
            raise InvalidInput(f"{name!r} is not a detector here; there are faces, hands.", field=field)
        return ChosenDetector(name, f"digest of {name}")

    async def detect(self, name: str, pixels: Pixels, field: str, *, share: str = "") -> Sequence[DetectedPart]:
        self.seen.append(pixels)
        if self.fault is not None:
            raise self.fault
        return self.parts


class RepairHarness(ServiceHarness):
    """A service over a fake model, with detectors, on one event loop."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, FakeImageDenoiser())
        self.runner = asyncio.Runner()
        self.services = [self.service]

    def with_detector(self, detector: ListedParts) -> GenerationService:
        """Another service with this detector."""
        self.services.append(
            GenerationService(
                self.bucket,
                self.engine,
                self.painter.count_tokens,
                replace(OPTIONS, detector=detector),
                fetch=self.fetcher.fetch,
                decode=self.decoder.decode,
            )
        )
        return self.services[-1]

    def close(self) -> None:
        """Stop threads and processes."""
        self.engine.stop(10)
        self.fetcher.close()
        self.runner.run(self.decoder.close())
        self.runner.close()
        for service in self.services:
            service.close()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[RepairHarness]:
    """A service over a fake model."""
    made = RepairHarness(tmp_path)
    yield made
    made.close()


def request(prompt: str = "a red square", **more: Any) -> GenerationRequest:
    values = {"width": 128, "height": 64, "seed": 0, "save_path": "a.png", "repairs": (DetailRepair("faces"),)}
    return GenerationRequest(**{"task": Task.TEXT_TO_IMAGE, "prompt": prompt, **values, **more})


def image_of(harness: RepairHarness, service: GenerationService, asked: GenerationRequest) -> tuple[Any, Pixels]:
    async def run() -> tuple[Any, Pixels]:
        result, data = await service.generate_with_bytes(asked)
        return result, await harness.decoder.decode(data, "image")

    return harness.runner.run(run())


def test_only_what_was_found_is_drawn_again(harness: RepairHarness) -> None:
    """The part has the colour of its own prompt, the rest stays as it was, and the receipt says what was done."""
    blue = DetailRepair("faces", prompts=("a blue square",), feather=0, dilation=0)
    detector = ListedParts()
    result, pixels = image_of(harness, harness.with_detector(detector), request(repairs=(blue,)))
    changed = np.zeros((64, 128), bool)
    changed[16:48, 16:48] = True
    assert (pixels[changed] != detector.seen[0][changed]).any(axis=-1).all()
    assert (pixels[~changed] == detector.seen[0][~changed]).all()
    assert ("repaired", "faces found 1 of what was drawn again.") in [(w.code, w.message) for w in result.warnings]


def test_a_repaired_image_is_that_of_inpainting_each_part_at_full_size(harness: RepairHarness) -> None:
    """Equal to a request that sends the image back with the part as a mask."""
    detector = ListedParts()
    _, repaired = image_of(harness, harness.with_detector(detector), request(repairs=(DetailRepair("faces"),)))
    mask = part_mask(FOUND, DetailRepair("faces"), 128, 64)
    again = request(
        task=Task.INPAINT,
        image=ImageInput("image_file", data=file_of(detector.seen[0])),
        mask=ImageInput("mask_file", data=file_of(mask)),
        only_masked=32,
        feather=4,
        strength=0.4,
        seed=2,
        width=256,
        height=256,
        repairs=(),
        save_path="b.png",
    )
    _, inpainted = image_of(harness, harness.with_detector(detector), again)
    assert (repaired == inpainted).all()
    assert (repaired != detector.seen[0]).any()


def test_a_part_is_drawn_at_the_size_of_the_model_with_its_own_steps_and_strength(harness: RepairHarness) -> None:
    """Its seed is the image's plus 2, plus one for each further part."""
    repair = DetailRepair("faces", steps=7, strength=0.6, most=2)
    parts = (FOUND, DetectedPart((80.0, 8.0, 120.0, 40.0), 0.8))
    image_of(harness, harness.with_detector(ListedParts(parts)), request(repairs=(repair,)))
    first, *again = harness.painter.finished
    assert [(part.task, part.width, part.height, part.seed) for part in again] == [
        (Task.INPAINT, 256, 256, first.seed + 2),
        (Task.INPAINT, 256, 256, first.seed + 3),
    ]
    assert {(part.num_inference_steps, part.strength) for part in again} == {(7, 0.6)}


def test_parts_take_their_prompts_in_turn_and_the_last_one_for_all_further_ones(harness: RepairHarness) -> None:
    """A part without a prompt of its own takes the request's."""
    parts = [replace(FOUND, score=0.9 - number / 10) for number in range(3)]
    repairs = (DetailRepair("faces", prompts=("a green one", "a blue one")), DetailRepair("hands", most=1))
    image_of(harness, harness.with_detector(ListedParts(parts)), request(repairs=repairs))
    assert [part.prompt for part in harness.painter.finished[1:]] == [
        *("a green one", "a blue one", "a blue one"),
        "a red square",
    ]


def test_a_second_repair_sees_what_the_first_one_drew(harness: RepairHarness) -> None:
    """Detectors run one after the other."""
    repairs = (DetailRepair("faces", prompts=("a blue square",)), DetailRepair("hands"))
    detector = ListedParts()
    image_of(harness, harness.with_detector(detector), request(repairs=repairs))
    assert (detector.seen[0][32, 32] != detector.seen[1][32, 32]).any()


@pytest.mark.parametrize(
    "second", [{"hires_width": 256, "hires_height": 128}, {"hires_scale": 2.0, "hires_guidance": 1.5, "hires_steps": 3}]
)
def test_a_repair_follows_the_second_pass_and_has_none_itself(harness: RepairHarness, second: dict[str, Any]) -> None:
    """The detector sees the enlarged image, and each part is drawn once."""
    detector = ListedParts()
    image_of(harness, harness.with_detector(detector), request(hires_strength=0.5, **second))
    assert detector.seen[0].shape == (128, 256, 3)
    assert [drawn.task for drawn in harness.painter.finished] == [Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT]


def test_an_image_in_which_nothing_is_found_stays_as_it_is(harness: RepairHarness) -> None:
    """The receipt says so."""
    detector = ListedParts(())
    result, pixels = image_of(harness, harness.with_detector(detector), request())
    assert (pixels == detector.seen[0]).all()
    assert "nothing-found" in [warning.code for warning in result.warnings]
    assert len(harness.painter.finished) == 1


def test_a_repair_after_inpainting_leaves_everything_else_exact(harness: RepairHarness) -> None:
    """The image is composed before the detector sees it."""
    picture, mask = disc(128, 64), np.zeros((64, 128, 3), np.uint8)
    mask[:, 96:] = 255
    asked = request(
        "a green square",
        image=ImageInput("image_file", data=file_of(picture)),
        mask=ImageInput("mask_file", data=file_of(mask)),
        repairs=(DetailRepair("faces", feather=0, dilation=0),),
    )
    _, pixels = image_of(harness, harness.with_detector(ListedParts()), replace(asked, task=Task.INPAINT))
    untouched = np.ones((64, 128), bool)
    untouched[:, 96:], untouched[16:48, 16:48] = False, False
    assert (pixels[untouched] == picture[untouched]).all()


def test_a_detector_that_fails_costs_its_request_alone(harness: RepairHarness) -> None:
    """Nothing is stored; the next request is drawn."""
    detector = ListedParts(fault=InvalidInput("faces.onnx cannot be used.", field="repairs[0].detector"))
    service = harness.with_detector(detector)
    with pytest.raises(InvalidInput, match="cannot be used"):
        image_of(harness, service, request())
    assert harness.bucket.stat("static/uploads/a.png") is None
    detector.fault = None
    image_of(harness, service, request())
    assert harness.bucket.stat("static/uploads/a.png") is not None


@pytest.mark.parametrize(
    ("repair", "fields"),
    [
        (DetailRepair("nobody"), {"repairs[0].detector"}),
        (DetailRepair("../faces"), {"repairs[0].detector"}),
        (DetailRepair("faces", confidence=1.5, padding=-1), {"repairs[0].confidence", "repairs[0].padding"}),
        (DetailRepair("faces", confidence=float("nan")), {"repairs[0].confidence"}),
        (DetailRepair("faces", most=10**9), {"repairs[0].most"}),
        (DetailRepair("faces", least_area=0.5, most_area=0.4), {"repairs[0].least_area"}),
        (DetailRepair("faces", steps=10**6), {"repairs[0].num_inference_steps"}),
        (DetailRepair("faces", width=10**6, height=64), {"repairs[0].width"}),
        (DetailRepair("faces", prompts=("a",) * 17), {"repairs[0].prompt"}),
        (DetailRepair("faces", prompts=("a\x00b", "x" * 40_000)), {"repairs[0].prompt"}),
    ],
)
def test_a_wrong_repair_is_refused_before_anything_is_drawn(
    harness: RepairHarness, repair: DetailRepair, fields: set[str]
) -> None:
    """Every field at fault is named."""
    with pytest.raises(InvalidInput) as refused:
        image_of(harness, harness.with_detector(ListedParts()), request(repairs=(repair,)))
    assert {name for name, _ in refused.value.faults} == fields
    assert not harness.painter.finished


def test_more_than_four_repairs_are_refused(harness: RepairHarness) -> None:
    """Four are drawn."""
    four = (DetailRepair("faces"),) * 4
    image_of(harness, harness.with_detector(ListedParts()), request(repairs=four))
    with pytest.raises(InvalidInput, match="more than 4 entries"):
        image_of(harness, harness.with_detector(ListedParts()), request(repairs=(*four, DetailRepair("hands"))))


def test_the_file_of_the_detector_is_part_of_the_identity(harness: RepairHarness) -> None:
    """Another content under the same name draws another image."""
    from stable_diffusion_server.generation.resolver import resolve_request

    class Other(ListedParts):
        def find(self, name: str, field: str) -> ChosenDetector:
            return ChosenDetector(name, "other weights")

    asked = request(save_path=None)
    keys = {resolve_request(asked, replace(OPTIONS, detector=found)).key for found in (ListedParts(), Other())}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("box", "dilation", "expected"),
    [
        ((10.2, 4.0, 20.0, 8.9), 0, (10, 4, 20, 9)),
        ((10.0, 4.0, 20.0, 8.0), 4, (6, 0, 24, 12)),
        ((10.0, 4.0, 20.0, 8.0), -100, (15, 6, 16, 7)),
        ((0.0, 0.0, 64.0, 32.0), 128, (0, 0, 64, 32)),
        ((63.9, 31.9, 64.0, 32.0), -50, (63, 31, 64, 32)),
    ],
)
def test_the_mask_of_a_part_lies_within_the_image(
    box: tuple[float, float, float, float], dilation: int, expected: tuple[int, int, int, int]
) -> None:
    """Grown or shrunk, it covers one pixel at least."""
    mask = part_mask(DetectedPart(box, 1.0), DetailRepair("faces", dilation=dilation), 64, 32)[..., 0]
    rows, columns = np.nonzero(mask)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == expected


def test_parts_are_chosen_by_score_size_and_place() -> None:
    """Boxes that are no numbers, outside, or too small are left out; equal scores go by place."""
    nan = float("nan")
    parts = [
        DetectedPart((0, 0, 10, 10), 0.2),
        DetectedPart((nan, 0, 10, 10), 0.9),
        DetectedPart((200, 0, 300, 10), 0.9),
        DetectedPart((20, 0, 10, 10), 0.9),
        DetectedPart((0, 0, 1, 1), 0.9),
        DetectedPart((50, 0, 80, 30), 0.5),
        DetectedPart((-5, -5, 30, 30), 0.5),
        DetectedPart((0, 60, 50, 100), 0.7),
    ]
    repair = DetailRepair("faces", least_area=0.01, most_area=0.5, most=2)
    assert [part.box for part in chosen_parts(parts, repair, 100, 100)] == [(0, 60, 50, 100), (0, 0, 30, 30)]
