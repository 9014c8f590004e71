"""FLUX.1 dev with a ControlNet and true guidance: as the stock pipeline, alone and in batches with other requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
import torch
from drawing import draw, largest_difference, outline, psnr
from PIL import Image
from tiny_oracles import PICTURE, TinyCase, request_for, stock_picture
from tiny_parts import SIDE

from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EDGES = outline(SIDE, SIDE)
CONTROL = {"control": EDGES, "control_scale": 0.7}
TRUE = {"negative_prompt": "sea", "extra": (("true_cfg_scale", 3.0),)}


def family(distilled: bool = True) -> Flux:
    """A tiny dev with a ControlNet that has weights everywhere; `distilled` ones take the guidance too."""
    pipeline = tiny_families.build("flux-dev")
    row = family_row(FileIdentity(Kind.PIPELINE, ("flux",), "dev"))
    assert row is not None
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    config |= {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": distilled}
    network = diffusers.FluxControlNetModel.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return Flux(pipeline, replace(row, text_tokens=77), network.eval().requires_grad_(False))


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("more", [{}, TRUE], ids=["guidance", "true guidance"])
def test_edges_are_followed_as_the_stock_pipeline_follows_them(distilled: bool, more: dict[str, Any]) -> None:
    """To within 2 of 255, also beside a negative prompt, which takes the residuals of the prompt."""
    model = family(distilled)
    request = request_for(model.spec, **CONTROL, **more)
    arguments = {
        "control_image": Image.fromarray(np.repeat(np.atleast_3d(EDGES.pixels), 3, axis=2)),
        "controlnet_conditioning_scale": 0.7,
        "true_cfg_scale": 3.0,
    }
    case = TinyCase("edges", "flux-dev", "FluxControlNetPipeline", arguments=arguments)
    drawn, stock = draw(model, request), stock_picture(model, case, request)
    assert largest_difference(drawn, stock) <= 2
    others = [replace(request, control=None), replace(request, control_scale=0.2)]
    others += [replace(request, negative_prompt="a bright house")] if more else []
    assert min(largest_difference(draw(model, other), stock) for other in others) > 2


def test_requests_with_and_without_edges_and_negative_prompts_share_passes() -> None:
    """Each as if it were alone; the ControlNet runs once for each request with edges."""
    model = family()
    requests = [
        request_for(model.spec, **CONTROL, **TRUE),
        request_for(model.spec, **TRUE, seed=8),
        request_for(model.spec, **CONTROL, prompt="the sea", seed=9),
        request_for(model.spec, image=PICTURE, strength=1.0, **CONTROL, **TRUE),
    ]
    read: list[int] = []
    handle = model.controlnet.register_forward_pre_hook(
        lambda _, given, named: read.append(len(named["hidden_states"])), with_kwargs=True
    )
    states = [model.prepare(request) for request in requests]
    while not states[0].done:
        model.step(states)
    handle.remove()
    assert set(read) == {3}
    pictures = [model.finish(state).pixels for state in states]
    assert min(psnr(own, draw(model, request)) for own, request in zip(pictures, requests, strict=True)) >= 45
