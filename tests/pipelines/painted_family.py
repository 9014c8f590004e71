"""A complete model family in one file and one catalogue row: it paints the canvas in one colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.base import DecodedImage
from stable_diffusion_server.pipelines.family import LoadedFamily, LoadedModelInfo
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest

COLOUR = (215, 40, 40)

ROW = ModelSpec(
    name="painted",
    family="painted_family:PaintedFamily",
    folder="painted",
    pipeline_class="PaintedPipeline",
    revision="painted-1",
    weights="none",
    native_pixels=64 * 64,
    min_side=64,
    text_tokens=16,
    default_steps=2,
    default_guidance=0.0,
    default_scheduler="euler",
    schedulers=("euler",),
    takes_negative_prompt=False,
    denoiser_part="brush",
)


@dataclass(slots=True)
class PaintedState:
    """A canvas between two steps."""

    request: DiffusionRequest
    index: int = 0

    @property
    def shape(self) -> tuple[object, ...]:
        return self.request.shape

    @property
    def steps(self) -> int:
        return self.request.num_inference_steps

    @property
    def done(self) -> bool:
        return self.index >= self.steps


class PaintedFamily:
    """Paints the canvas red, a little with every step."""

    @classmethod
    def load(cls, spec: ModelSpec, models_dir: Path, device: Any, options: Any) -> LoadedFamily:
        """There is nothing to load."""
        info = LoadedModelInfo(
            name=spec.name,
            folder=spec.folder,
            revision=spec.revision,
            device=str(device),
            dtype="float32",
            residency="resident",
            quantization="none",
            bytes=0,
            follows_edges=False,
            loras=(),
        )
        family: Any = cls()
        return LoadedFamily(family, spec, info)

    def prepare(self, request: DiffusionRequest) -> PaintedState:
        return PaintedState(request)

    def step(self, states: Sequence[PaintedState]) -> None:
        for state in states:
            state.index += 1

    def finish(self, state: PaintedState) -> DecodedImage:
        return DecodedImage(self.preview(state), redecoded=False)

    def preview(self, state: PaintedState) -> NDArray[np.uint8]:
        shade = np.array(COLOUR) * state.index // state.steps
        pixels = np.broadcast_to(shade.astype(np.uint8), (state.request.height, state.request.width, 3))
        return np.ascontiguousarray(pixels)

    def shrink(self, state: PaintedState) -> bool:
        return False

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())
