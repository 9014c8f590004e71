"""Z-Image follows edges as its stock ControlNet pipeline does, also where others of the batch do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
import torch
from drawing import draw, largest_difference, outline, psnr
from PIL import Image
from tiny_drawing import stock_call, tiny_row
from tiny_parts import SIDE
from tiny_qwen3 import MASK, PICTURE, order, passes

from stable_diffusion_server.pipelines.families.z_image import ZImage
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load
from stable_diffusion_server.types import DiffusionRequest, ImageArray

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KINDS = ("", "control_layers", "control_noise_refiner")
EDGES = outline(SIDE, SIDE)
CONTROL = {"control": EDGES, "control_scale": 0.75}


def family(refined: str, variant: str = "turbo") -> ZImage:
    """Z-Image with a ControlNet."""
    name = {"turbo": "z-image-turbo", "base": "z-image"}[variant]
    return ZImage(tiny_families.build(name), tiny_row("z-image", variant), tiny_families.z_image_control(refined))


def by_stock(model: ZImage, request: DiffusionRequest) -> Any:
    """What the stock ControlNet pipeline draws over the same components."""
    assert request.control is not None
    pipe = diffusers.ZImageControlNetPipeline(**model.pipeline.components, controlnet=model.controlnet)
    edges = Image.fromarray(np.repeat(np.atleast_3d(request.control.pixels), 3, axis=2))
    given = {"control_image": edges, "controlnet_conditioning_scale": request.control_scale}
    return stock_call(
        pipe, request, guidance_scale=request.guidance_scale, negative_prompt=request.negative_prompt, **given
    )


@pytest.mark.parametrize("variant", ["turbo", "base"])
@pytest.mark.parametrize("refined", KINDS)
def test_edges_are_followed_as_the_stock_pipeline_follows_them(refined: str, variant: str) -> None:
    """To within 2 of 255; other edges, another scale and none are further away."""
    model = family(refined, variant)
    request = order(model, **CONTROL)
    ours = draw(model, request)
    assert largest_difference(ours, by_stock(model, request)) <= 2
    others = [replace(request, control=ImageArray(255 - EDGES.pixels)), replace(request, control_scale=0.2)]
    assert min(largest_difference(ours, by_stock(model, other)) for other in others) > 2
    assert largest_difference(ours, draw(model, replace(request, control=None))) > 2


def by_pipeline(name: str, model: ZImage, request: DiffusionRequest) -> Any:
    """What a stock pipeline without edges draws when its transformer gets what a ControlNet says of them.

    There is no stock pipeline of these tasks with a ControlNet.
    """
    assert request.control is not None
    assert request.image is not None
    edges = torch.from_numpy(np.repeat(np.atleast_3d(request.control.pixels), 3, axis=2)[None]).permute(0, 3, 1, 2)
    pipe = getattr(diffusers, name)(**model.pipeline.components)
    vae, network = pipe.vae, model.controlnet
    hint = vae.encode(edges.float() / 127.5 - 1).latent_dist.mode()
    hint = ((hint - vae.config.shift_factor) * vae.config.scaling_factor).unsqueeze(2)
    hint = torch.nn.functional.pad(hint, (0, 0, 0, 0, 0, 0, 0, network.config.control_in_dim - hint.shape[1]))

    def guide(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        said = network(*given[:3], hint.repeat(len(given[0]), 1, 1, 1, 1), conditioning_scale=request.control_scale)
        return given, {**named, "controlnet_block_samples": said}

    handle = pipe.transformer.register_forward_pre_hook(guide, with_kwargs=True)
    try:
        arguments: dict[str, Any] = {"image": Image.fromarray(request.image.pixels), "strength": request.strength}
        arguments |= {} if request.mask is None else {"mask_image": Image.fromarray(request.mask.pixels)}
        return stock_call(
            pipe,
            request,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt,
            **arguments,
        )
    finally:
        handle.remove()


@pytest.mark.parametrize("refined", KINDS)
def test_an_image_is_changed_along_edges(refined: str) -> None:
    """As the stock image-to-image pipeline does with the ControlNet's residuals in each pass; edges have an effect."""
    model = family(refined, "base")
    request = order(model, image=PICTURE, strength=0.6, num_inference_steps=5, **CONTROL)
    ours = draw(model, request)
    assert largest_difference(ours, by_pipeline("ZImageImg2ImgPipeline", model, request)) <= 2
    assert largest_difference(ours, draw(model, replace(request, control=None))) > 2


def test_a_mask_is_repainted_along_edges_by_a_controlnet_that_reads_none() -> None:
    """The first ControlNet: as the stock inpaint pipeline, with residuals."""
    model = family("", "turbo")
    request = order(model, image=PICTURE, mask=MASK, strength=1.0, **CONTROL)
    ours = draw(model, request)
    assert largest_difference(ours, by_pipeline("ZImageInpaintPipeline", model, request)) <= 2


@pytest.mark.parametrize("refined", KINDS[1:])
def test_a_mask_is_repainted_as_the_stock_pipeline_does(refined: str) -> None:
    """ControlNets from 2.0 on are shown what is kept: another mask or image gives another picture, as stock."""
    model = family(refined, "base")
    request = order(model, image=PICTURE, mask=MASK, strength=1.0, **CONTROL)
    pictures = []
    for one in (
        request,
        replace(request, mask=ImageArray(255 - MASK.pixels)),
        replace(request, image=ImageArray(255 - PICTURE.pixels)),
    ):
        assert one.image is not None
        assert one.mask is not None
        pictures.append(draw(model, one))
        pipe = diffusers.ZImageControlNetInpaintPipeline(**model.pipeline.components, controlnet=model.controlnet)
        wanted = stock_call(
            pipe,
            one,
            guidance_scale=one.guidance_scale,
            negative_prompt=one.negative_prompt,
            image=Image.fromarray(one.image.pixels),
            mask_image=Image.fromarray(one.mask.pixels),
            control_image=Image.fromarray(np.repeat(np.atleast_3d(EDGES.pixels), 3, axis=2)),
            controlnet_conditioning_scale=one.control_scale,
        )
        assert largest_difference(pictures[-1], wanted) <= 2
    assert min(largest_difference(pictures[0], other) for other in pictures[1:]) > 2


@pytest.mark.parametrize("refined", KINDS)
def test_requests_with_and_without_edges_share_each_pass(refined: str) -> None:
    """Unlike prompts, scales and guidance: each as if it were alone, and the ControlNet runs for those it guides."""
    model = family(refined, "base")
    long = "a small house by the sea, oil painting, evening light, " * 4
    requests = [
        order(model, **CONTROL),
        order(model, prompt=long, guidance_scale=0.0, num_inference_steps=3),
        order(model, control=EDGES, control_scale=0.3, guidance_scale=0.0, seed=9),
        order(model, image=PICTURE, strength=0.8, **CONTROL),
        order(model, image=PICTURE, mask=MASK, strength=0.9, **CONTROL),
    ]
    guided: list[int] = []
    handle = model.controlnet.register_forward_pre_hook(lambda _, given: guided.append(len(given[0])))
    states = [model.prepare(request) for request in requests]
    steps = [state.steps for state in states]
    assert passes(model, states) == [sum(count > done for count in steps) for done in range(max(steps))]
    handle.remove()
    assert guided[0] == 7, "two rows of each guided request, one without guidance"
    pictures = [model.finish(state).pixels for state in states]
    assert min(psnr(own, draw(model, request)) for own, request in zip(pictures, requests, strict=True)) >= 45


def test_the_owners_spec_names_the_controlnet(tmp_path: Path) -> None:
    """Loaded with the model and counted; one of another model is left out, with a remark."""
    tiny_families.build("z-image-turbo").save_pretrained(tmp_path / "mine")
    tiny_families.z_image_control().save_pretrained(tmp_path / "edges")
    spec = 'native_size = 128\ndtype = "float32"\ncontrolnets = ["edges"]\n'
    (tmp_path / "mine.toml").write_text(spec)
    found = find_owned_models(tmp_path, [tmp_path]).specs["mine"]
    registry = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": found}, performance="safe"))
    loaded = registry.residents["mine"]
    assert loaded.info.follows_edges
    assert loaded.spec.control_revision
    alone = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": replace(found, control_folder=None)}))
    assert loaded.placement.needed > alone.residents["mine"].placement.needed
    model = family("")
    request = order(model, num_inference_steps=2, **CONTROL)
    assert largest_difference(draw(loaded.family, request), by_stock(model, request)) <= 2
    network = tiny_families.z_image_control()
    other = diffusers.ZImageControlNetModel.from_config({**network.config, "dim": 64, "n_heads": 4})
    other.save_pretrained(tmp_path / "edges")
    without = load(tmp_path, "cpu", 1, LoadOptions(models={"mine": found})).residents["mine"].info
    assert not without.follows_edges
    assert any("draws without its ControlNet" in remark for remark in without.remarks)


def test_a_controlnet_that_is_a_file_is_not_passed_over(tmp_path: Path) -> None:
    """A file does not say which layers its blocks belong to, so it is read from folders only; the model says so."""
    tiny_families.build("z-image-turbo").save_pretrained(tmp_path / "mine")
    tiny_families.z_image_control().save_pretrained(tmp_path / "network")
    (tmp_path / "network" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "edges.safetensors")
    spec = tiny_row("z-image", "turbo", folder="mine", control_folder="edges.safetensors", cpu_dtype="float32")
    info = load(tmp_path, "cpu", 1, LoadOptions(models={spec.name: spec})).residents[spec.name].info
    assert not info.follows_edges
    assert [remark for remark in info.remarks if "edges.safetensors is a file" in remark]
