"""Tiny pipelines of each family drawn here and by their stock calls: same components, seed and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from drawing import draw, draw_together, largest_difference, psnr
from tiny_oracles import IMAGE, MASKED, OTHER, PICTURE, WIDE, WRONG, TinyCase, request_for, stock_picture
from tiny_parts import SIDE

from stable_diffusion_server.errors import OutOfMemory
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import Kind, ModelTask
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Tiny pipeline → family class, and (family, variant, task) of its row.
FAMILIES: dict[str, tuple[Any, tuple[str, str, ModelTask]]] = {
    "sd15": (Sd15, ("sd15", "", ModelTask.NORMAL)),
    "sd15-inpaint": (Sd15, ("sd15", "", ModelTask.INPAINT)),
    "flux-dev": (Flux, ("flux", "dev", ModelTask.NORMAL)),
    "flux-fill": (Flux, ("flux", "fill", ModelTask.FILL)),
    "flux-kontext": (Flux, ("flux", "kontext", ModelTask.EDIT)),
}
TRUE = {"negative_prompt": "sea", "extra": (("true_cfg_scale", 3.0),)}
EDIT = {"references": (PICTURE,)}
SD, SD_IMAGE, SD_INPAINT = (f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
CASES = [
    TinyCase("text", "sd15", SD),
    TinyCase("text, negative prompt", "sd15", SD, {"negative_prompt": "sea"}),
    TinyCase("text, no guidance", "sd15", SD, {"guidance_scale": 1.0}),
    TinyCase("text, not square", "sd15", SD, {"width": 128}),
    *(
        TinyCase(f"text, {name}", "sd15", SD, {"scheduler": name})
        for name in ("euler", "euler_a", "ddim", "dpm", "unipc")
    ),
    TinyCase("image", "sd15", SD_IMAGE, IMAGE),
    TinyCase("image, whole strength", "sd15", SD_IMAGE, {**IMAGE, "strength": 1.0}),
    TinyCase("image, ancestral", "sd15", SD_IMAGE, {**IMAGE, "scheduler": "euler_a"}),
    TinyCase("inpaint", "sd15", SD_INPAINT, MASKED),
    TinyCase("inpaint, whole strength", "sd15", SD_INPAINT, {**MASKED, "strength": 1.0}),
    TinyCase("inpaint, ancestral", "sd15", SD_INPAINT, {**MASKED, "scheduler": "euler_a"}),
    TinyCase("9 channels", "sd15-inpaint", SD_INPAINT, MASKED),
    TinyCase("9 channels, whole strength", "sd15-inpaint", SD_INPAINT, {**MASKED, "strength": 1.0}),
    TinyCase("text", "flux-dev", "FluxPipeline"),
    TinyCase("text, second prompt", "flux-dev", "FluxPipeline", {"prompt_2": "sea"}, {"prompt_2": "sea"}),
    TinyCase("text, true guidance", "flux-dev", "FluxPipeline", TRUE, {"true_cfg_scale": 3.0}),
    TinyCase("image, true guidance", "flux-dev", "FluxImg2ImgPipeline", {**IMAGE, **TRUE}, {"true_cfg_scale": 3.0}),
    TinyCase("inpaint, true guidance", "flux-dev", "FluxInpaintPipeline", {**MASKED, **TRUE}, {"true_cfg_scale": 3.0}),
    TinyCase("fill", "flux-fill", "FluxFillPipeline", {**MASKED, "strength": 1.0}),
    TinyCase("fill, less strength", "flux-fill", "FluxFillPipeline", MASKED),
    TinyCase("text", "flux-kontext", "FluxKontextPipeline", {}, {"max_area": SIDE**2}),
    TinyCase("edit", "flux-kontext", "FluxKontextPipeline", EDIT, {"max_area": SIDE**2}),
    TinyCase(
        "edit, wide, true guidance",
        "flux-kontext",
        "FluxKontextPipeline",
        {**TRUE, "references": (WIDE,), "width": 128},
        {"true_cfg_scale": 3.0, "max_area": 2 * SIDE**2},
    ),
]
# Requests that share passes: unlike steps, guidance, prompts, seeds and tasks.
BATCHES: dict[str, list[dict[str, Any]]] = {
    "sd15": [
        {"num_inference_steps": 3, "guidance_scale": 1.0},
        {"num_inference_steps": 5, "prompt": WRONG, "seed": 8, "negative_prompt": "sea"},
        {**IMAGE, "guidance_scale": 3.0},
        {**MASKED, "scheduler": "euler_a"},
    ],
    "flux-dev": [
        {"num_inference_steps": 3, "guidance_scale": 1.5},
        {**TRUE, "num_inference_steps": 5, "prompt": WRONG, "seed": 8},
        {**IMAGE, "guidance_scale": 7.0},
        {**MASKED, **TRUE},
    ],
    "flux-fill": [{**MASKED, "num_inference_steps": 5}, {**MASKED, "image": OTHER, "guidance_scale": 3.0}],
    "flux-kontext": [
        {**EDIT, "num_inference_steps": 5},
        {**TRUE, "references": (OTHER,), "prompt": WRONG},
        {**EDIT, "guidance_scale": 7.0, "seed": 8},
    ],
    "sd15-inpaint": [{**MASKED, "num_inference_steps": 5}, {**MASKED, "image": OTHER, "guidance_scale": 1.0}],
}


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Any]:
    """A tiny family by name, made once."""
    made: dict[str, Any] = {}

    def family(name: str) -> Any:
        if name not in made:
            kind, (of, variant, task) = FAMILIES[name]
            row = family_row(FileIdentity(Kind.PIPELINE, (of,), variant, task))
            assert row is not None
            made[name] = kind(tiny_families.build(name), replace(row, text_tokens=min(row.text_tokens, 77)))
        return made[name]

    return family


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext's references at small sizes, here and in the stock pipeline, which has this table."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(48, 80), (64, 64), (96, 48)])


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Table rows to quote, printed at the end (`pytest -s`)."""
    rows: list[str] = []
    yield rows
    print("\n| family | task | largest difference of 255 | of a wrong one |\n| --- | --- | --- | --- |")  # noqa: T201  # the table
    print("\n".join(rows))  # noqa: T201  # prints the table


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_request_is_drawn_as_the_stock_pipeline_draws_it(
    case: TinyCase, tiny: Callable[[str], Any], table: list[str]
) -> None:
    """To within 2 of 255 in any pixel; a wrong prompt, and a wrong image where there is one, give more than that."""
    family = tiny(case.family)
    request = request_for(family.spec, **case.request)
    stock = stock_picture(family, case, request)
    wrong = [replace(request, prompt=WRONG)]
    if request.image is not None:
        wrong.append(replace(request, image=OTHER))
    if request.references:
        wrong.append(replace(request, references=(OTHER, *request.references[1:])))
    furthest = min(largest_difference(draw(family, other), stock) for other in wrong)
    nearest = largest_difference(draw(family, request), stock)
    table.append(f"| {case.family} | {case.name} | {nearest} | {furthest} |")
    assert stock.std() > 5, "a flat picture would prove nothing"
    assert nearest <= 2 < furthest


@pytest.mark.parametrize("name", BATCHES)
def test_unlike_requests_share_their_passes(
    name: str, tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many passes as the longest request takes, and each picture as if it were drawn alone (45 dB or more)."""
    family = tiny(name)
    requests = [request_for(family.spec, **changes) for changes in BATCHES[name]]
    alone = [draw(family, request) for request in requests]
    denoiser = getattr(family.pipeline, family.spec.denoiser_part)
    rows: list[int] = []
    forward = denoiser.forward

    def counted(*given: Any, **named: Any) -> Any:
        rows.append(len(given[0] if given else next(iter(named.values()))))
        return forward(*given, **named)

    monkeypatch.setattr(denoiser, "forward", counted)
    together = draw_together(family, requests)
    monkeypatch.undo()
    assert len(rows) == max(sum(len(segment.timesteps) for segment in family.prepare(one).segments) for one in requests)
    assert rows[0] >= len(requests)
    assert min(psnr(one, other) for one, other in zip(alone, together, strict=True)) >= 45
    assert min(psnr(alone[0], other) for other in alone[1:]) < 45, "unlike requests give unlike pictures"


@pytest.mark.parametrize("name", FAMILIES)
def test_too_little_memory_is_said(name: str, tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step and in the end; the state stays as it was, and draws on."""
    family = tiny(name)
    request = request_for(family.spec, **({} if Task.TEXT_TO_IMAGE in family.spec.tasks else MASKED))
    state = family.prepare(request)
    while not state.done:
        before = (state.index, state.latents)
        _run_out_of_memory(monkeypatch, getattr(family.pipeline, family.spec.denoiser_part), "forward")
        with pytest.raises(OutOfMemory):
            family.step([state])
        monkeypatch.undo()
        assert (state.index, state.latents) == before
        family.step([state])
    _run_out_of_memory(monkeypatch, family.pipeline.vae, "decode")
    with pytest.raises(OutOfMemory):
        family.finish(state)
    monkeypatch.undo()
    assert np.array_equal(family.finish(state).pixels, draw(family, request))


def _run_out_of_memory(monkeypatch: pytest.MonkeyPatch, network: Any, method: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("the allocator says so")

    monkeypatch.setattr(network, method, fail)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preview_shows_a_state(name: str, tiny: Callable[[str], Any]) -> None:
    """A small picture before the first step and after it."""
    family = tiny(name)
    state = family.prepare(request_for(family.spec, **({} if Task.TEXT_TO_IMAGE in family.spec.tasks else MASKED)))
    before = family.preview(state)
    family.step([state])
    after = family.preview(state)
    assert (before.shape[-1], before.dtype) == (3, np.uint8)
    assert (before != after).any()
    assert family.count_tokens("a house") > 2
