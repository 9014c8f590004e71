"""FLUX.1 Redux as `image_prompts`: weights as the stock prior's scales, in passes shared with plain requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
import torch
from drawing import Pixels, draw, draw_together, largest_difference, psnr
from PIL import Image
from test_redux import SPEC, redux
from tiny_oracles import OTHER, PICTURE, WIDE, WRONG, request_for

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.types import DiffusionRequest, ImageArray, PromptImage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SEEN = replace(SPEC, added_parts=(), dtype="float32", cpu_dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Redux."""
    place = tmp_path_factory.mktemp("models")
    redux().save_pretrained(place / "redux")
    return place


@pytest.fixture(scope="module")
def family(folder: Path) -> Any:
    """The tiny dev that may be prompted by images."""
    made = Flux(tiny_families.build("flux-dev"), SEEN)
    made.offer_image_prompts(ImagePromptFolder([folder]))
    return made


def prompted(folder: Path, *images: tuple[ImageArray, float], **changes: Any) -> DiffusionRequest:
    """A request with image prompts: the picture and the weight of each."""
    file = ImagePromptFolder([folder]).find(None, SEEN)
    prompts = (PromptImage(file.name, file.digest, image, weight) for image, weight in images)
    return request_for(SEEN, image_prompts=tuple(prompts), **changes)


def stock(family: Any, request: DiffusionRequest) -> Pixels:
    """The two stock calls, with a scale for each image."""
    pipe = family.pipeline
    texts = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    prior = diffusers.FluxPriorReduxPipeline(**redux().components | texts)
    images = [Image.fromarray(prompt.image.pixels) for prompt in request.image_prompts]
    scales = [prompt.weight for prompt in request.image_prompts]
    words = [request.prompt] * len(images)
    found = prior(images, prompt=words, prompt_embeds_scale=scales, pooled_prompt_embeds_scale=[1.0] * len(images))
    drawing = diffusers.FluxPipeline(**pipe.components)
    drawing.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": request.num_inference_steps, "guidance_scale": request.guidance_scale}
    size = {"height": request.height, "width": request.width}
    seed = torch.Generator().manual_seed(request.seed)
    return np.asarray(drawing(**found, **given, **size, generator=seed).images[0])


@pytest.mark.parametrize("images", [((PICTURE, 1.0),), ((PICTURE, 0.6), (WIDE, 0.8))], ids=["one", "two, weighted"])
def test_weights_are_the_scales_of_the_stock_prior(images: Any, family: Any, folder: Path) -> None:
    """Other images, other weights and no images give another picture."""
    request = prompted(folder, *images)
    expected, drawn = stock(family, request), draw(family, request)
    wrong = [
        prompted(folder, (OTHER, images[0][1]), *images[1:]),
        prompted(folder, (images[0][0], 0.3), *images[1:]),
        replace(request, image_prompts=()),
    ]
    furthest = min(largest_difference(draw(family, other), expected) for other in wrong)
    print(f"| flux-dev | redux, {len(images)} | {largest_difference(drawn, expected)} | {furthest} |")  # noqa: T201  # the table
    assert largest_difference(drawn, expected) <= 2 < furthest


def test_requests_of_one_length_share_their_passes(family: Any, folder: Path) -> None:
    """As drawn alone; a request without images has a shorter prompt, and so passes of its own."""
    requests = [prompted(folder, (PICTURE, 1.0)), prompted(folder, (OTHER, 0.5), prompt=WRONG, seed=8)]
    shapes = {family.prepare(request).shape for request in requests}
    assert len(shapes) == 1
    assert family.prepare(request_for(SEEN)).shape not in shapes
    alone = [draw(family, request) for request in requests]
    together = draw_together(family, requests)
    assert min(psnr(one, other) for one, other in zip(alone, together, strict=True)) >= 45


def test_what_does_not_fit_is_refused(family: Any, folder: Path, tmp_path: Path) -> None:
    """A replaced folder, references beside it, a damaged folder: each in a sentence."""
    request = prompted(folder, (WIDE, 1.0))
    old = replace(request.image_prompts[0], revision="0" * 64, image=ImageArray(WIDE.pixels[::-1].copy()))
    with pytest.raises(InvalidInput, match="was replaced while the order waited"):
        _fresh(family, folder).prepare(replace(request, image_prompts=(old,)))
    with pytest.raises(InvalidInput, match="beside references"):
        family.prepare(replace(request, references=(PICTURE,)))
    redux().save_pretrained(tmp_path / "redux")
    (tmp_path / "redux" / "image_embedder" / "config.json").write_text("{}")
    broken = Flux(family.pipeline, SEEN)
    broken.offer_image_prompts(ImagePromptFolder([tmp_path]))
    with pytest.raises(InvalidInput, match=r"image_prompts\[0\].model: "):
        broken.prepare(prompted(tmp_path, (PICTURE, 1.0)))


def _fresh(family: Any, folder: Path) -> Any:
    """The same model that has read nothing yet."""
    made = Flux(family.pipeline, SEEN)
    made.offer_image_prompts(ImagePromptFolder([folder]))
    return made
