"""Parameters of a second pass over the enlarged image ("hires fix")."""

from __future__ import annotations

from pydantic import Field

from stable_diffusion_server.api.schemas.validation import RequestParams
from stable_diffusion_server.generation import NAME_MAX, TEXT_MAX


class HiresParams(RequestParams):
    """A second pass of every dialect with this server's parameters, for requests without a mask.

    `RequestLimits` checks its bounds, which are settings; a size is that of the result, and turns it on.
    """

    hires_scale: float | None = Field(
        None, description="Draws the image a second time, enlarged by this factor: a second pass ('hires fix')."
    )
    hires_width: int | None = Field(
        None, description="Width of the second pass in pixels, with `hires_height`, in place of `hires_scale`."
    )
    hires_height: int | None = Field(None, description="Height of the second pass in pixels.")
    hires_upscaler: str | None = Field(
        None,
        max_length=NAME_MAX,
        description=(
            "What enlarges the image: a name in `/sdapi/v1/upscalers`, or for its latents `latent`, "
            "`latent-antialiased`, `latent-bicubic`, `latent-bicubic-antialiased`, `latent-nearest` or "
            "`latent-nearest-exact`. If omitted, Lanczos."
        ),
    )
    hires_steps: int | None = Field(None, description="Steps of the second pass. If omitted, as in the first.")
    hires_strength: float | None = Field(
        None, description="How much the second pass changes, 0 to 1. If omitted, 0.75; latents need 0.5 or more."
    )
    hires_guidance: float | None = Field(None, description="Guidance of the second pass. If omitted, as in the first.")
    hires_scheduler: str | None = Field(
        None, max_length=NAME_MAX, description="Scheduler of the second pass. If omitted, as in the first."
    )
    hires_schedule: str | None = Field(
        None,
        max_length=NAME_MAX,
        description="Spacing of its steps. If omitted, as in the first pass where its scheduler takes that.",
    )
    hires_prompt: str | None = Field(
        None, max_length=TEXT_MAX, description="Prompt of the second pass. If omitted, that of the first."
    )
    hires_negative_prompt: str | None = Field(
        None, max_length=TEXT_MAX, description="Negative prompt of the second pass, likewise."
    )
