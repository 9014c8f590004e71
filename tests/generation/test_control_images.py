"""Control images: at most one decoded picture of a request is in memory at a time."""

from __future__ import annotations

import weakref
from typing import Any, cast

import numpy as np
from control_networks import KnownNetworks

from stable_diffusion_server.generation.control_images import ControlLayout
from stable_diffusion_server.generation.layout import InputLoader, lay_out_images
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.preprocessing import InProcessPreprocessor
from stable_diffusion_server.generation.resolver import GenerationOptions, resolve_request
from stable_diffusion_server.types import ControlKind, ControlUnit, GenerationRequest, ImageInput, Task

OPTIONS = GenerationOptions(RequestLimits(), "sdxl", "up", controlnets=KnownNetworks())


class Counting:
    """Decodes every source to a large picture, and counts those that are in memory."""

    def __init__(self) -> None:
        self.alive = self.most = self.decoded = 0

    async def decode(self, source: ImageInput, fetched: Any, share: str) -> Any:
        pixels = np.zeros((2048, 2048, 3), np.uint8)
        self.alive, self.decoded = self.alive + 1, self.decoded + 1
        self.most = max(self.most, self.alive)
        weakref.finalize(pixels, self._gone)
        return pixels

    def _gone(self) -> None:
        self.alive -= 1


async def test_pictures_of_units_are_decoded_one_after_the_other() -> None:
    """Four large pictures and four masks: two at most are in memory, and the results have the canvas size."""
    units = tuple(
        ControlUnit(
            kind=ControlKind.TILE,
            preprocess="none",
            image=ImageInput(f"controls[{number}].image", data=b"image"),
            mask=ImageInput(f"controls[{number}].mask", data=b"mask"),
        )
        for number in range(4)
    )
    resolved = resolve_request(GenerationRequest(Task.TEXT_TO_IMAGE, "a disc", 64, 64, controls=units), OPTIONS)
    inputs = Counting()
    layout = ControlLayout(cast(InputLoader, inputs), cast(Any, None), InProcessPreprocessor())
    guided = await layout.with_controls(lay_out_images(resolved), resolved, {}, "")
    sizes = {control.image.pixels.shape for control in guided.request.controls}
    assert (inputs.decoded, inputs.most <= 2, len(sizes)) == (8, True, 1)
    assert sizes == {(guided.canvas.height, guided.canvas.width, 3)}
