"""Control units are followed as the stock ControlNet pipelines follow them, for each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from drawing import draw, largest_difference
from guided_families import BLOCKS, EDGES, Guided, guided, pil
from tiny_oracles import MASK, PICTURE, request_for

from stable_diffusion_server.types import ControlKind, DiffusionRequest, ImageArray

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CANNY, DEPTH, TILE, INPAINT = ControlKind.CANNY, ControlKind.DEPTH, ControlKind.TILE, ControlKind.INPAINT
FROM_TEXT = {
    "sd15": "StableDiffusionControlNetPipeline",
    "sdxl": "StableDiffusionXLControlNetPipeline",
    "sd3": "StableDiffusion3ControlNetPipeline",
    "flux": "FluxControlNetPipeline",
    "z-image": "ZImageControlNetPipeline",
}
LATE = {"start": 0.25, "end": 0.75}
PAINTED = {"image": PICTURE, "strength": 0.8}
# SDXL's stock inpainting blends by the VAE's channels, which are four here as in the real one.
MASKED = {**PAINTED, "mask": MASK}


@dataclass(frozen=True)
class Case:
    """Units, a stock class and the arguments that say the same to it: network, kind, image and changes of each unit."""

    family: str
    units: Sequence[tuple[str, ControlKind, ImageArray, dict[str, Any]]]
    stock: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    # Numbers that the stock union is told.
    modes: tuple[int, ...] = ()

    def __str__(self) -> str:
        kinds = " + ".join(
            f"{name} by {kind}{' ' + '/'.join(more) if more else ''}" for name, kind, _, more in self.units
        )
        return f"{self.family}: {kinds} {' '.join(self.request)}".strip()


def one(name: str, kind: ControlKind = CANNY, image: ImageArray = EDGES, **more: Any) -> Any:
    return (name, kind, image, more)


CASES = [
    *(
        Case(family, units)
        for family in ("sd15", "sdxl", "flux")
        for units in (
            [one("canny", weight=0.7)],
            [one("depth", DEPTH, BLOCKS, weight=1.2, **LATE)],
            [one("canny", weight=0.6, end=0.5), one("depth", DEPTH, BLOCKS, weight=0.9, start=0.25)],
        )
    ),
    Case("sd15", [one("canny", weight=0.7)], request={"guidance_scale": 1.0}),
    Case("sd15", [one("canny")], "StableDiffusionControlNetImg2ImgPipeline", PAINTED),
    Case("sdxl", [one("canny", weight=0.7)], request={"negative_prompt": "sea"}),
    Case("sdxl", [one("canny")], "StableDiffusionXLControlNetImg2ImgPipeline", PAINTED),
    Case("sdxl", [one("canny", **LATE)], "StableDiffusionXLControlNetInpaintPipeline", MASKED),
    Case("sdxl", [one("promax", weight=0.8)], "StableDiffusionXLControlNetUnionPipeline", modes=(3,)),
    Case("sdxl", [one("promax", DEPTH, BLOCKS, **LATE)], "StableDiffusionXLControlNetUnionPipeline", modes=(1,)),
    Case("sdxl", [one("promax", TILE)], "StableDiffusionXLControlNetUnionImg2ImgPipeline", PAINTED, modes=(6,)),
    Case("flux", [one("union", weight=0.8)], modes=(0,)),
    Case("flux", [one("union"), one("union", DEPTH, BLOCKS, weight=0.5)], modes=(0, 2)),
    Case("flux", [one("canny"), one("union", DEPTH, BLOCKS, weight=0.5, **LATE)], modes=(-1, 2)),
    Case("sd3", [one("canny", weight=0.7)]),
    Case("sd3", [one("depth", DEPTH, BLOCKS, weight=0.8, **LATE)], request={"negative_prompt": "sea"}),
    Case("sd3", [one("canny", weight=0.6), one("canny", DEPTH, BLOCKS, weight=0.9, start=0.25)]),
    Case("z-image", [one("union", weight=0.75)]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Guided]:
    """Each family by name, made when it is asked for."""
    folder = tmp_path_factory.mktemp("models")
    return lambda family: guided(family, folder / family)


def by_stock(model: Guided, case: Case, request: DiffusionRequest) -> Any:
    """The stock call with the same networks, images, weights and shares of the steps."""
    networks = [model.networks[f"{name}-{case.family}"] for name, *_ in case.units]
    images = [pil(image) for _, _, image, _ in case.units]
    given: dict[str, Any] = {
        "controlnet": networks,
        "controlnet_conditioning_scale": [float(more.get("weight", 1.0)) for *_, more in case.units],
        "control_guidance_start": [more.get("start", 0.0) for *_, more in case.units],
        "control_guidance_end": [more.get("end", 1.0) for *_, more in case.units],
        "control_image": images,
        "image": images if request.image is None else pil(request.image),
        "mask_image": pil(request.mask),
    }
    if case.modes:
        given["control_mode"] = [None if mode < 0 else mode for mode in case.modes]
    if len(networks) == 1:
        given |= {name: value[0] for name, value in given.items() if isinstance(value, list)}
    return model.stock(request, case.stock or FROM_TEXT[case.family], **given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_units_are_followed_as_the_stock_pipeline_follows_them(
    case: Case, models: Callable[[str], Guided], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To within 2 of 255; without them, and with another image, the picture is another."""
    if case.family == "sd3":  # its stock call samples the control image's latents by no seed; ours takes their mean
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda latents, generator=None: latents.mode())
    model = models(case.family)
    units = tuple(model.unit(f"{name}-{case.family}", kind, image, **more) for name, kind, image, more in case.units)
    request = request_for(model.family.spec, controls=units, **case.request)
    ours = draw(model.family, request)
    assert largest_difference(ours, by_stock(model, case, request)) <= 2
    other = ImageArray(255 - units[-1].image.pixels)
    for changed in (units[:-1], (*units[:-1], replace(units[-1], image=other))):
        assert largest_difference(ours, draw(model.family, replace(request, controls=changed))) > 2
    assert np.ptp(ours) > 20, "a flat picture would prove nothing"
