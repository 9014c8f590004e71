"""IP-Adapters: equal the stock pipelines' `load_ip_adapter`, row by row, and leave other requests alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_families
import torch
import transformers
from checkpoint_stand_ins import sd15_pipeline, sdxl_pipeline
from drawing import Pixels, draw, draw_together, largest_difference, psnr
from image_prompt_files import adapter_file, vision_encoder
from PIL import Image
from single_file_specs import sd15_spec, sdxl_spec
from tiny_oracles import IMAGE, MASKED, OTHER, PICTURE, WIDE, WRONG, request_for

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.acceleration.torchscript import trace
from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.families.sd15 import Sd15
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.loader import LoadOptions, measure_model
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler
from stable_diffusion_server.pipelines.owned_models import find_owned_models
from stable_diffusion_server.pipelines.registry import load
from stable_diffusion_server.types import DiffusionRequest, ImageArray, PromptImage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SD15, SDXL = sd15_spec(("denoiser", "model.safetensors")), sdxl_spec(("denoiser", "model.safetensors"))
KINDS = ("plain", "plus", "full")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of each kind for both models, and their encoder."""
    found = {}
    for name, pipeline in (("sd15", sd15_pipeline(width=96)), ("sdxl", sdxl_pipeline())):
        folder = found[name] = tmp_path_factory.mktemp(name)
        vision_encoder(folder / "models" / "image_encoder")
        (folder / "ipadapter").mkdir()
        for number, kind in enumerate(KINDS):
            adapter_file(folder / "ipadapter" / f"{kind}.safetensors", pipeline.unet, kind, seed=number)
    return found


@pytest.fixture(scope="module")
def families(folders: dict[str, Path]) -> dict[str, Any]:
    """A small SD 1.5 and a small SDXL with their adapters."""
    made = {"sd15": Sd15(sd15_pipeline(width=96), SD15), "sdxl": Sdxl(sdxl_pipeline(), SDXL)}
    for name, family in made.items():
        family.offer_image_prompts(ImagePromptFolder([folders[name]]))
    return made


def prompted(
    family: Any, folder: Path, *images: tuple[str, ImageArray], weight: float = 0.8, **changes: Any
) -> DiffusionRequest:
    """A request with image prompts: the adapter and the picture of each."""
    found = ImagePromptFolder([folder])
    prompts = (PromptImage(name, found.find(name, family.spec).digest, image, weight) for name, image in images)
    return request_for(family.spec, image_prompts=tuple(prompts), **changes)


def stock(
    family: Any, folder: Path, request: DiffusionRequest, weights: Callable[[int], list[float]] | None = None
) -> Pixels:
    """What the stock pipeline draws; `weights` gives the scales of a step, by default the request's."""
    kind = type(family.pipeline).__name__.removesuffix("Pipeline")
    kind += "Inpaint" if request.mask else "Img2Img" if request.image else ""
    parts = {name: part for name, part in family.pipeline.components.items() if name != "image_encoder"}
    parts["unet"] = type(parts["unet"]).from_config(parts["unet"].config)
    parts["unet"].load_state_dict(family.pipeline.unet.state_dict())
    scheduler = scheduler_of(family.spec, request.scheduler, request.num_inference_steps)
    parts["scheduler"] = make_scheduler(scheduler, like=family.pipeline.scheduler)
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "models" / "image_encoder")
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {"add_watermarker": False}
    parts |= {"image_encoder": encoder, "feature_extractor": None}
    pipeline = getattr(diffusers, f"{kind}Pipeline")(**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    names = [f"{prompt.name}.safetensors" for prompt in request.image_prompts]
    pipeline.load_ip_adapter(str(folder), subfolder="ipadapter", weight_name=names)

    def scale(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if weights is not None:
            pipeline.set_ip_adapter_scale(weights(step + 1))
        return values

    first = [prompt.weight for prompt in request.image_prompts] if weights is None else weights(0)
    pipeline.set_ip_adapter_scale(first)
    given = {
        "image": None if request.image is None else Image.fromarray(request.image.pixels),
        "mask_image": None if request.mask is None else Image.fromarray(request.mask.pixels),
        "strength": request.strength,
    }
    given = {name: value for name, value in given.items() if value is not None and request.image is not None}
    size = (
        {} if request.image is not None and request.mask is None else {"height": request.height, "width": request.width}
    )
    made = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        ip_adapter_image=[Image.fromarray(prompt.image.pixels) for prompt in request.image_prompts],
        callback_on_step_end=scale,
        **given,
        **size,
    )
    return np.asarray(made.images[0])


CASES: dict[str, tuple[str, tuple[tuple[str, ImageArray], ...], dict[str, Any]]] = {
    "sdxl plain": ("sdxl", (("plain", PICTURE),), {"guidance_scale": 5.0}),
    "sdxl plain, no guidance": ("sdxl", (("plain", PICTURE),), {"guidance_scale": 1.0}),
    "sdxl plus": ("sdxl", (("plus", WIDE),), {"guidance_scale": 5.0}),
    "sdxl full": ("sdxl", (("full", PICTURE),), {"guidance_scale": 5.0}),
    "sdxl two adapters": ("sdxl", (("plain", PICTURE), ("plus", OTHER)), {"guidance_scale": 5.0}),
    "sdxl two images": ("sdxl", (("plain", PICTURE), ("plain", OTHER)), {"guidance_scale": 5.0}),
    "sd15 plain": ("sd15", (("plain", PICTURE),), {}),
    "sd15 plus": ("sd15", (("plus", PICTURE),), {}),
    "sd15 full": ("sd15", (("full", WIDE),), {}),
    "sd15 image to image": ("sd15", (("plus", OTHER),), IMAGE),
    "sdxl inpaint": ("sdxl", (("plain", OTHER),), MASKED),
}


@pytest.mark.parametrize("case", CASES)
def test_image_prompts_draw_as_stock(case: str, families: dict[str, Any], folders: dict[str, Path]) -> None:
    """Each kind of adapter, two of them, two images; other images, weights and no image give another picture."""
    name, images, changes = CASES[case]
    family, folder = families[name], folders[name]
    request = prompted(family, folder, *images, **changes)
    expected, drawn = stock(family, folder, request), draw(family, request)
    wrong = [
        replace(request, image_prompts=()),
        replace(request, image_prompts=(replace(request.image_prompts[0], weight=0.2), *request.image_prompts[1:])),
        prompted(family, folder, (images[0][0], ImageArray(255 - images[0][1].pixels)), *images[1:], **changes),
    ]
    furthest = min(largest_difference(draw(family, other), expected) for other in wrong)
    print(f"| {case} | {largest_difference(drawn, expected)} | {furthest} |")  # noqa: T201  # the table
    assert largest_difference(drawn, expected) <= 2 < furthest


def test_a_range_of_steps_counts_as_scales_set_by_step(families: dict[str, Any], folders: dict[str, Path]) -> None:
    """Steps that lie within start and end as a whole, by the stock call's callback."""
    family, folder = families["sdxl"], folders["sdxl"]
    request = prompted(family, folder, ("plain", PICTURE), ("plus", OTHER), guidance_scale=5.0)
    first, second = request.image_prompts
    request = replace(request, image_prompts=(replace(first, end=0.5), replace(second, start=0.3, end=0.8)))
    table = [[0.8, 0.0], [0.8, 0.0], [0.0, 0.8], [0.0, 0.0], [0.0, 0.0]]
    expected = stock(family, folder, request, lambda step: table[step])
    whole = replace(request, image_prompts=(first, second))
    assert largest_difference(draw(family, request), expected) <= 2 < largest_difference(draw(family, whole), expected)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_rows_with_and_without_image_prompts_share_a_pass(
    name: str, families: dict[str, Any], folders: dict[str, Path]
) -> None:
    """As drawn alone; and the rows without them are bit for bit what they are beside rows without any."""
    family, folder = families[name], folders[name]
    plain = request_for(family.spec, prompt=WRONG, seed=9)
    requests = [
        prompted(family, folder, ("plain", PICTURE), seed=3, num_inference_steps=3),
        plain,
        prompted(family, folder, ("plus", OTHER), ("plain", WIDE), ("plain", OTHER), weight=0.5),
        prompted(family, folder, ("plus", WIDE), guidance_scale=1.0, prompt=WRONG),
    ]
    assert len({family.prepare(request).shape for request in requests}) == 1
    together = draw_together(family, requests)
    alone = [draw(family, request) for request in requests]
    assert min(psnr(one, other) for one, other in zip(alone, together, strict=True)) >= 45
    without = [replace(request, image_prompts=()) for request in requests]
    assert np.array_equal(draw_together(family, without)[1], together[1])


def test_a_request_without_image_prompts_draws_what_it_drew_before(folders: dict[str, Path]) -> None:
    """Bit for bit, before any image prompt came and after it."""
    family = Sdxl(sdxl_pipeline(), SDXL)
    family.offer_image_prompts(ImagePromptFolder([folders["sdxl"]]))
    plain = request_for(SDXL)
    before = draw(family, plain)
    draw(family, prompted(family, folders["sdxl"], ("plus", PICTURE)))
    assert np.array_equal(draw(family, plain), before)


def test_image_prompts_reach_a_traced_network(families: dict[str, Any], folders: dict[str, Path]) -> None:
    """What was traced knows no image prompts, and such a pass runs without it."""
    family = Sd15(sd15_pipeline(width=96), SD15)
    family.offer_image_prompts(ImagePromptFolder([folders["sd15"]]))
    request = prompted(family, folders["sd15"], ("plain", PICTURE))
    expected = draw(families["sd15"], request)
    trace(family.pipeline.unet)
    for _ in range(2):
        draw(family, replace(request, image_prompts=(), num_inference_steps=2))
    assert np.array_equal(draw(family, request), expected)


def test_tokens_are_kept_by_everything_they_are_made_of(families: dict[str, Any], folders: dict[str, Path]) -> None:
    """The second request reads no image; another image, adapter or dtype does."""
    family, folder = families["sd15"], folders["sd15"]
    reader = family.images
    request = prompted(family, folder, ("plain", PICTURE))
    reads: list[bool] = []
    encoder = reader._encoder_of(reader._hold(request.image_prompts[0], torch.float32).file, torch.float32)
    usual = encoder.read
    encoder.read = lambda image, *, pooled: reads.append(pooled) or usual(image, pooled=pooled)
    try:
        image = ImageArray(PICTURE.pixels[::-1].copy())
        for wanted in (("plain", image), ("plain", image), ("plus", image), ("plain", WIDE)):
            reader.use(prompted(family, folder, wanted), torch.float32, guided=True)
        assert reads[:2] == [True, False]
        used = reader.use(prompted(family, folder, ("plain", image)), torch.float32, guided=False)
        assert (used[0].tokens.shape, family.prompt_cache.bytes > 0) == ((1, 4, 96), True)
    finally:
        del encoder.read


def test_an_adapter_of_another_model_is_refused(
    families: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """By its shapes; one that was replaced after the request was resolved, too; other requests go on."""
    vision_encoder(tmp_path / "image_encoder")
    adapter_file(tmp_path / "plain.safetensors", families["sdxl"].pipeline.unet)
    family = Sd15(sd15_pipeline(width=96), SD15)
    family.offer_image_prompts(ImagePromptFolder([tmp_path]))
    request = prompted(family, tmp_path, ("plain", PICTURE))
    with pytest.raises(InvalidInput, match=r"image_prompts\[0\].model: plain.safetensors has weights for"):
        family.prepare(request)
    old = replace(request.image_prompts[0], revision="0" * 64)
    with pytest.raises(InvalidInput, match="was replaced while the order waited"):
        family.prepare(replace(request, image_prompts=(old,)))
    assert draw(family, replace(request, image_prompts=())).any()


def test_a_model_without_a_folder_refuses_image_prompts(folders: dict[str, Path]) -> None:
    """A sentence."""
    family = Sd15(sd15_pipeline(width=96), SD15)
    with pytest.raises(InvalidInput, match="nothing here that reads image prompts"):
        family.prepare(prompted(family, folders["sd15"], ("plain", PICTURE)))


def test_a_loaded_model_draws_by_them_and_counts_them(tmp_path: Path) -> None:
    """From folders, with the usual optimizations; the adapter's bytes belong to what the model takes."""
    pipeline = tiny_families.sd15(768)
    pipeline.save_pretrained(tmp_path / "small")
    vision_encoder(tmp_path / "clip_vision" / "encoder")
    (tmp_path / "ipadapter").mkdir()
    file = adapter_file(tmp_path / "ipadapter" / "plain.safetensors", pipeline.unet)
    spec = find_owned_models(tmp_path, (tmp_path,)).specs["small"]
    options = LoadOptions({"small": spec}, image_prompts=ImagePromptFolder([tmp_path]), performance="safe")
    assert measure_model(spec, tmp_path, torch.device("cpu"), options).adapters == file.stat().st_size
    family = load(tmp_path, "cpu", 1, options).residents["small"].family
    request = prompted(family, tmp_path, ("plain", PICTURE))
    assert largest_difference(draw(family, request), draw(family, replace(request, image_prompts=()))) > 2
