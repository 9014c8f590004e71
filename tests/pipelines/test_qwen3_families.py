"""FLUX.2 klein and Z-Image draw what the stock pipelines draw, also where unlike requests share a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, draw_together, largest_difference, psnr
from tiny_qwen3 import MASK, PICTURE, REFERENCES, by_stock, klein, order, passes, z_image

from stable_diffusion_server.errors import InvalidInput, OutOfMemory
from stable_diffusion_server.types import ImageArray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LONG = "a small house by the sea, oil painting, evening light"


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    """Each variant once."""
    return {
        "klein": klein(),
        "klein base": klein("klein-base"),
        "z-image turbo": z_image(),
        "z-image": z_image("base"),
    }


@dataclass(frozen=True)
class Case:
    """A task of a family, and changes of its request that must show in the picture."""

    family: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[dict[str, Any], ...] = ({"prompt": "sea"},)


IMAGE, MASKED = {"image": PICTURE, "strength": 0.6}, {"image": PICTURE, "mask": MASK, "strength": 0.8}
OTHER_IMAGE = {"image": ImageArray(255 - PICTURE.pixels)}
ONE, TWO, THREE = ({"references": REFERENCES[:count]} for count in (1, 2, 3))
CASES = (
    Case("klein", "text", wrong=({"prompt": "sea"}, {"seed": 8})),
    Case("klein", "text, not square", {"width": 96}),
    Case("klein", "edit, 1 reference", ONE, ({"prompt": "sea"}, {"references": REFERENCES[1:2]}, {"references": ()})),
    Case("klein", "edit, 2 references", TWO, ({"prompt": "sea"}, {"references": REFERENCES[1::-1]}, ONE)),
    Case("klein", "edit, 3 references", THREE, ({"references": (*REFERENCES[1::-1], REFERENCES[2])}, TWO)),
    Case("klein", "image", IMAGE, ({"prompt": "sea"}, OTHER_IMAGE, {"strength": 0.8})),
    Case("klein", "inpaint", MASKED, ({"prompt": "sea"}, OTHER_IMAGE)),
    Case("klein", "inpaint, 1 reference", MASKED | ONE, ({"prompt": "sea"}, {"references": ()})),
    Case("klein base", "text", wrong=({"prompt": "sea"}, {"guidance_scale": 3.0})),
    Case("klein base", "text, no guidance", {"guidance_scale": 1.0}),
    Case("klein base", "edit, 2 references", TWO, ({"prompt": "sea"}, {"references": REFERENCES[1::-1]}, ONE)),
    Case("klein base", "inpaint", MASKED, ({"prompt": "sea"}, OTHER_IMAGE)),
    Case("z-image turbo", "text", wrong=({"prompt": "sea"}, {"seed": 8})),
    Case("z-image turbo", "image", IMAGE, ({"prompt": "sea"}, OTHER_IMAGE, {"strength": 0.8})),
    Case("z-image turbo", "inpaint", MASKED, ({"prompt": "sea"}, OTHER_IMAGE)),
    Case("z-image", "text", wrong=({"prompt": "sea"}, {"guidance_scale": 3.0})),
    Case("z-image", "text, negative prompt", {"negative_prompt": "sea"}, ({"negative_prompt": LONG},)),
    Case("z-image", "text, no guidance", {"guidance_scale": 0.0}),
    Case("z-image", "image", IMAGE, ({"prompt": "sea"}, OTHER_IMAGE)),
    Case("z-image", "inpaint", MASKED, ({"prompt": "sea"}, OTHER_IMAGE)),
)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Table rows to quote, printed at the end (`pytest -s`)."""
    rows: list[str] = []
    yield rows
    print("\n| family | task | largest difference of 255 | of a wrong request |\n| --- | --- | --- | --- |")  # noqa: T201  # the table
    print("\n".join(rows))  # noqa: T201  # prints the table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}: {case.name}")
def test_a_request_is_drawn_as_the_stock_pipeline_draws_it(
    case: Case, families: dict[str, Any], table: list[str]
) -> None:
    """To within 2 of 255 in any pixel; another prompt, reference, image or guidance is further away."""
    family = families[case.family]
    request = order(family, **case.changes)
    ours = draw(family, request)
    wrong = [largest_difference(ours, by_stock(family, request, **changes)) for changes in case.wrong]
    found = largest_difference(ours, by_stock(family, request))
    table.append(f"| {case.family} | {case.name} | {found} | {', '.join(map(str, wrong))} |")
    assert min(wrong) > 2, "the test would pass with a wrong request"
    assert found <= 2


MIXED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "klein, text": ("klein", [{"num_inference_steps": 3}, {"prompt": LONG, "seed": 8, "num_inference_steps": 5}, {}]),
    "klein, edits of equal shapes": (
        "klein",
        [
            TWO | {"num_inference_steps": 3},
            {"references": (REFERENCES[0], ImageArray(255 - REFERENCES[1].pixels)), "prompt": LONG},
        ],
    ),
    "klein, image and inpaint": ("klein", [IMAGE, MASKED | {"num_inference_steps": 7}]),
    "klein base, guided and not": ("klein base", [{}, {"guidance_scale": 1.0, "num_inference_steps": 6}]),
    "z-image, every task": (
        "z-image",
        [
            {"num_inference_steps": 3},
            {"guidance_scale": 0.0, "prompt": LONG, "num_inference_steps": 5},
            {"negative_prompt": LONG, "guidance_scale": 2.0},
            IMAGE,
            MASKED | {"num_inference_steps": 6},
        ],
    ),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_requests_of_one_shape_share_each_pass(mixed: str, families: dict[str, Any]) -> None:
    """As many passes as the longest has steps, and each picture as if it were alone, to 45 dB or better."""
    family, requests = families[MIXED[mixed][0]], [order(families[MIXED[mixed][0]], **c) for c in MIXED[mixed][1]]
    states = [family.prepare(request) for request in requests]
    assert len({state.shape for state in states}) == 1
    steps = [state.steps for state in states]
    assert passes(family, states) == [sum(count > done for count in steps) for done in range(max(steps))]
    pictures = [family.finish(state).pixels for state in states]
    assert min(psnr(own, draw(family, request)) for own, request in zip(pictures, requests, strict=True)) >= 45


def test_references_of_unlike_shapes_share_no_pass(families: dict[str, Any]) -> None:
    """The transformer takes the positions of the first row for all, so the shapes in their order must be equal."""
    family = families["klein"]
    wide = REFERENCES[2]
    tall = ImageArray(np.ascontiguousarray(wide.pixels.swapaxes(0, 1)))
    lists = ((), REFERENCES[:1], REFERENCES[1:2], REFERENCES[:2], REFERENCES[1::-1], (tall,), (wide,))
    shapes = [family.prepare(order(family, references=given)).shape for given in lists]
    assert len(set(shapes)) == len(lists)
    # The input image is a reference too.
    assert family.prepare(order(family, **IMAGE)).shape not in shapes


def test_a_large_reference_is_shrunk_as_the_stock_pipeline_shrinks_it(families: dict[str, Any]) -> None:
    """Over 1024² pixels, and sides that are no multiples of 16."""
    family = families["klein"]
    large = ImageArray(np.random.default_rng(1).integers(0, 256, (150, 1000, 3), np.uint8).repeat(8, 0))
    request = order(family, references=(large,), num_inference_steps=1)
    state = family.prepare(request)
    assert state.shape[-1] == ((70, 58),)
    family.step([state])
    assert largest_difference(family.finish(state).pixels, by_stock(family, request)) <= 2


@pytest.mark.parametrize("size", [(63, 200), (200, 63), (64, 513), (513, 64)])
def test_a_reference_that_is_too_small_or_too_narrow_is_refused(
    size: tuple[int, int], families: dict[str, Any]
) -> None:
    """The error names the reference and its size."""
    family = families["klein"]
    request = order(family, references=(REFERENCES[0], ImageArray(np.zeros((*size, 3), np.uint8))))
    with pytest.raises(InvalidInput) as refused:
        family.prepare(request)
    assert (refused.value.field, f"{size[1]} × {size[0]}" in refused.value.detail) == ("references[1]", True)


@pytest.mark.parametrize("name", ["klein", "klein base", "z-image turbo", "z-image"])
def test_refining_previews_tokens_and_edges(name: str, families: dict[str, Any]) -> None:
    """What every family has: a refining pass, previews at each step, a count of tokens; and no ControlNet yet."""
    family = families[name]
    state = family.prepare(order(family, refine=True, num_inference_steps=5))
    promised = state.steps
    while not state.done:
        family.step([state])
        assert family.preview(state).shape == (128, 128, 3)
        early = family.finish(state).pixels
    assert (state.steps, state.index) == (promised, promised)
    assert promised > 5
    assert early.shape == (64, 64, 3)
    # The template's own tokens and those of the words.
    assert family.count_tokens("") > 5
    assert family.count_tokens(LONG) > family.count_tokens("sea") > family.count_tokens("")
    with pytest.raises(InvalidInput) as refused:
        family.prepare(order(family, control=MASK))
    assert refused.value.field == "canny"


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_encoded_prompts_are_cached(name: str, families: dict[str, Any]) -> None:
    """The text encoder runs once for a prompt, and once for the negative one."""
    family, calls = families[name], []
    handle = family.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for seed in range(3):
            family.prepare(order(family, prompt="never drawn before", negative_prompt="nor this", seed=seed))
    finally:
        handle.remove()
    assert len(calls) == (2 if name == "z-image" else 1)


@pytest.mark.parametrize("name", ["klein", "z-image"])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_too_little_memory_is_reported_as_such(
    name: str, part: str, families: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While preparing, in a step and while decoding; the same request is drawn afterwards."""
    family = families[name]
    request = order(family, prompt=f"no memory in the {part}", **IMAGE)

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(getattr(family.pipeline, part), "decode" if part == "vae" else "forward", fails)
        with pytest.raises(OutOfMemory):
            draw(family, request)
    assert draw(family, request).shape == (64, 64, 3)


def test_a_batch_draws_each_edit_with_its_own_references(families: dict[str, Any]) -> None:
    """Two edits that differ in the pictures alone are as far apart together as alone."""
    family = families["klein"]
    one, other = (order(family, references=(image,)) for image in (PICTURE, ImageArray(255 - PICTURE.pixels)))
    together = draw_together(family, [one, other])
    assert psnr(together[0], draw(family, one)) >= 45
    assert largest_difference(*together) > 2
