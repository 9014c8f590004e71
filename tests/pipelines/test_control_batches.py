"""Requests with unlike control units share passes, and each is drawn as if it were alone; modes and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import draw, draw_together, largest_difference, psnr
from guided_families import BLOCKS, Guided, guided
from tiny_oracles import PICTURE, request_for
from tiny_parts import SIDE

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import ControlImage, ControlKind, ControlMode, DiffusionRequest, ImageArray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CANNY, DEPTH = ControlKind.CANNY, ControlKind.DEPTH
HALF = np.zeros((SIDE, SIDE), np.uint8)
HALF[:, : SIDE // 2] = 255
LEFT, RIGHT = ImageArray(HALF), ImageArray(255 - HALF)
ALL, NOTHING = ImageArray(np.full_like(HALF, 255)), ImageArray(np.zeros_like(HALF))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Guided]:
    """Each family by name, made when it is asked for."""
    folder = tmp_path_factory.mktemp("models")
    return lambda family: guided(family, folder / family)


def units_of(model: Guided) -> list[ControlImage]:
    """Two units of unlike networks, and of a union one more."""
    names = [*model.networks]
    units = [model.unit(names[0], CANNY), model.unit(names[1], DEPTH if len(names) > 1 else CANNY, BLOCKS, weight=0.6)]
    return [*units, *(model.unit(name, CANNY, weight=0.7) for name in names[2:])]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "z-image"])
def test_six_requests_with_unlike_units_share_passes(family: str, models: Callable[[str], Guided]) -> None:
    """Each as if it were alone, to 45 dB or better; each network runs once a step over its rows."""
    model = models(family)
    first, second, *more = units_of(model)
    spec = model.family.spec
    requests = [
        request_for(spec, seed=1),
        request_for(spec, seed=2, controls=(first,)),
        request_for(spec, seed=3, controls=(replace(second, end=0.5),)),
        request_for(spec, seed=4, controls=(first, second), image=PICTURE, strength=1.0),
        request_for(spec, seed=5, controls=(*more, replace(first, mask=LEFT))),
        request_for(spec, seed=6, controls=(replace(second, mode=ControlMode.CONTROL),), guidance_scale=2.0),
    ]
    assert len({request.shape for request in requests}) == 1
    runs: list[tuple[str, int]] = []
    states = [model.family.prepare(request) for request in requests]
    handles = [
        network.register_forward_pre_hook(lambda module, given, named=name: runs.append((named, 1)))
        for name, network in zip(model.networks, model.family.controlnets.networks, strict=False)
    ]
    model.family.step(states)
    for handle in handles:
        handle.remove()
    assert len(runs) <= len(model.family.controlnets.networks) + 1
    alone = [draw(model.family, request) for request in requests]
    together = draw_together(model.family, requests)
    assert min(psnr(own, mixed) for own, mixed in zip(alone, together, strict=True)) >= 45
    assert largest_difference(alone[1], draw(model.family, replace(requests[1], controls=()))) > 2


@pytest.mark.parametrize("family", ["sd15", "flux", "z-image"])
def test_an_unguided_row_is_the_same_to_the_bit(family: str, models: Callable[[str], Guided]) -> None:
    """Beside a row with units, and beside the same row without: the residuals of the others are zeros."""
    model = models(family)
    plain = request_for(model.family.spec, seed=1)
    guided_one = request_for(model.family.spec, seed=2, controls=(units_of(model)[0],))
    beside = [
        draw_latents(model, [plain, replace(guided_one, controls=units)])[0] for units in ((), guided_one.controls)
    ]
    assert torch.equal(*beside)


def draw_latents(model: Guided, requests: list[DiffusionRequest]) -> list[torch.Tensor]:
    """The latents after all steps of a batch."""
    states = [model.family.prepare(request) for request in requests]
    while not states[0].done:
        model.family.step(states)
    return [state.latents for state in states]


@pytest.mark.parametrize("family", ["sd15", "flux", "z-image"])
def test_masks_say_where_a_unit_is_followed(family: str, models: Callable[[str], Guided]) -> None:
    """White everywhere is no mask, black everywhere no unit, and the halves of a unit are the unit."""
    model = models(family)
    unit = units_of(model)[0]

    def drawn(*units: ControlImage) -> torch.Tensor:
        return draw_latents(model, [request_for(model.family.spec, controls=units)])[0]

    # Not without the unit: Flux draws the noise after the control image was encoded.
    whole, none = drawn(unit), drawn(replace(unit, weight=0.0))
    assert (whole - none).abs().max() > 0.05
    torch.testing.assert_close(drawn(replace(unit, mask=ALL)), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn(replace(unit, mask=NOTHING)), none, atol=1e-4, rtol=1e-4)
    if family != "flux":  # two units are two samples of the VAE
        halves = drawn(replace(unit, mask=LEFT), replace(unit, mask=RIGHT))
        torch.testing.assert_close(halves, whole, atol=1e-3, rtol=1e-3)
    assert (drawn(replace(unit, mask=LEFT)) - whole).abs().max() > 0.01


def test_modes_weigh_the_residuals_of_a_unet_as_the_extension_does(models: Callable[[str], Guided]) -> None:
    """Prompt: 0.825 ** (12 - i) on both rows; control: the same on the prompt's row alone; balanced: one on both."""
    model = models("sdxl")
    unit = model.unit("canny-sdxl", CANNY, weight=0.8)
    seen: dict[ControlMode, list[torch.Tensor]] = {}

    def keep(module: Any, given: Any, named: Any) -> None:
        seen[mode] = [*named["down_block_additional_residuals"], named["mid_block_additional_residual"]]

    handle = model.family.pipeline.unet.register_forward_pre_hook(keep, with_kwargs=True)
    for mode in ControlMode:
        request = request_for(model.family.spec, controls=(replace(unit, mode=mode),), guidance_scale=5.0)
        model.family.step([model.family.prepare(request)])
    handle.remove()
    for place, whole in enumerate(seen[ControlMode.BALANCED]):
        factor = 0.825 ** (12 - place)
        torch.testing.assert_close(seen[ControlMode.PROMPT][place], factor * whole, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(seen[ControlMode.CONTROL][place][1:], factor * whole[1:], atol=1e-4, rtol=1e-3)
        assert not seen[ControlMode.CONTROL][place][0].any()
    assert len(seen[ControlMode.BALANCED]) == 10


def test_a_unit_that_changed_or_does_not_fit_is_refused(models: Callable[[str], Guided]) -> None:
    """Another revision than accepted; a kind that a union lacks; a network of another family."""
    model = models("sdxl")
    unit = model.unit("promax-sdxl", CANNY)
    for wrong, words in (
        (replace(unit, revision="0" * 64), "was changed"),
        (replace(unit, kind=ControlKind.BLUR), "does not follow blur"),
        (replace(unit, network="canny-flux"), "is not a ControlNet for"),
    ):
        with pytest.raises(InvalidInput, match=words):
            model.family.prepare(request_for(model.family.spec, controls=(wrong,)))
