"""Parameters of the sampler: its schedule, its options, and the noise that an image starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.generation import NAME_MAX


class SamplingParams(RequestParams):
    """Options of a sampler, named as in `SAMPLING_OPTIONS`; `resolve_sampling` checks that the scheduler takes them."""

    subseed: int | None = Field(
        None, description="Seed of another noise. If omitted with `subseed_strength`, derived from the request."
    )
    subseed_strength: float | None = Field(
        None,
        description="How far the noise is turned to that of `subseed`; image i of a batch uses `subseed + i`.",
    )
    noise_source: Literal["cpu", "gpu"] | None = Field(
        None,
        description="Numbers that the image starts from: of torch on a CPU, or of a graphics card, as AUTOMATIC1111's.",
    )
    schedule: str | None = Field(
        None,
        max_length=NAME_MAX,
        description="Spacing of the steps, as the scheduler takes it. If omitted or `automatic`, the scheduler's own.",
    )
    eta: float | None = Field(None, description="Share of new noise in a step, for schedulers that add it.")
    s_churn: float | None = Field(None, description="Noise added before a step (Karras et al. 2022).")
    s_tmin: float | None = Field(None, description="Noise level below which `s_churn` adds none.")
    s_tmax: float | None = Field(None, description="Noise level above which `s_churn` adds none.")
    s_noise: float | None = Field(None, description="Factor of the noise that is added.")
    zero_snr: bool | None = Field(
        None,
        description="Whether the schedule ends in pure noise, for models with a UNet. If omitted, the model's.",
    )
    guidance_rescale: float | None = Field(
        None, description="How far guidance keeps the spread of the prediction, for models with a UNet: less exposure."
    )
    solver_order: int | None = Field(None, description="Order of the solver, for multistep samplers.")
    shift: float | None = Field(
        None,
        description="How far the noise levels are shifted up, for flows. If omitted, the model's, often by the size.",
    )
