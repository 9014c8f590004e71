"""Shared code of the step-batched families: how a request becomes a state, and how states take a step together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic

import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    C,
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    await_device,
    encode,
    seeded,
    to_tensor,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.catalog import refine_steps_skipped, scheduler_of, steps_skipped
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, remarks_of
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.enlarged_latents import enlarged
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler
from stable_diffusion_server.pipelines.loading.schedules import follow
from stable_diffusion_server.pipelines.scheduler_rows import SCHEDULERS
from stable_diffusion_server.pipelines.vae_tiles import VaeTiling
from stable_diffusion_server.pipelines.wrapping import wrapping
from stable_diffusion_server.types import DiffusionRequest


class NativeFamily(DiffusersFamily, Generic[C]):
    """A family with a denoising loop of our own. `C` is what it computes from the prompt.

    A subclass says how a request becomes a state (`_state_of`), a schedule (`_segment`), and what its network predicts
    (`_predicted`).
    """

    _smaller_tiling: VaeTiling | None = None
    # Whether the first dimension of all layers' inputs is the batch, so that rows may have different LoRAs.
    _mixes_loras = True

    def prepare(self, request: DiffusionRequest) -> PipelineState[C]:
        """Encode the prompt and the input images, draw the noise, set the timesteps.

        An input image that finds too little memory is encoded in tiles, and the result is decoded in tiles too. Raises
        `InvalidInput` for a strength that leaves no step, an unknown LoRA, or edges without a ControlNet.
        """
        self._smaller_tiling = None
        if request.control is not None and self.controlnet is None:
            raise InvalidInput(f"{self.spec.name} has no ControlNet here to follow edges with.", field="canny")
        with translate_torch_errors():
            skipped = (
                steps_skipped(self.spec, request.num_inference_steps, request.strength)
                if request.starts_from_image
                else 0
            )
            loras = self.loras.use(request.loras, request.lora_digests, request.lora_parts)
            with self.loras.applied(loras), wrapping(request.tiling):
                state = self._state_of(request, skipped, loras)
        if request.soft and state.inpaint is None:
            raise InvalidInput(f"{self.spec.name} takes its mask as an input, without levels.", field="mask_mode")
        state.tiling = self._smaller_tiling
        state.warnings += remarks_of(loras)
        return state

    def step(self, states: Sequence[PipelineState[C]]) -> None:
        """One pass over the rows of all states, then guidance and a scheduler step for each state.

        Rows may have different LoRAs; a family whose network mixes the rows runs a pass for each set of LoRAs.
        """
        with translate_torch_errors():
            sets = dict.fromkeys(state.loras for state in states)
            groups = [states] if self._mixes_loras else [[s for s in states if s.loras == own] for own in sets]
            # All passes come first: one that fails leaves every state as it was.
            with wrapping(states[0].request.tiling):
                predicted = [self._predicted(group) for group in groups]
            for group, predictions in zip(groups, predicted, strict=True):
                for state, prediction in zip(group, predictions, strict=True):
                    state.advance(prediction)
            await_device(states[0].latents.device)

    @abstractmethod
    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[C]:
        """The state of a request before its first step, without the first `skipped` steps.

        Uses the generator in the order of the stock pipelines.
        """

    @abstractmethod
    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`; draws its noise from `generator`."""

    @abstractmethod
    def _predicted(self, states: Sequence[PipelineState[C]]) -> Sequence[torch.Tensor]:
        """The guided prediction for each state, shaped like its latents, with the LoRAs of its rows."""

    def _state(
        self,
        request: DiffusionRequest,
        loras: ActiveLoras,
        conditioning: C,
        first: DenoisingSegment,
        *,
        latents: torch.Tensor | None = None,
        lengths: tuple[object, ...] = (),
        inpaint: InpaintConstraint | None = None,
        controls: Sequence[ControlNetInput] = (),
    ) -> PipelineState[C]:
        """The state that starts with the segment `first`, from its noise or from `latents`.

        Requests share a pass if `lengths` are equal, beside their sizes.
        """
        segments = (first,) if not request.refine else self._refined(request, first, loras)
        return PipelineState(
            request=request,
            shape=(*request.shape, *lengths),
            latents=first.noise if latents is None else latents,
            segments=segments,
            conditioning=conditioning,
            inpaint=inpaint,
            controls=tuple(controls),
            loras=loras,
        )

    def _refined(
        self, request: DiffusionRequest, first: DenoisingSegment, loras: ActiveLoras
    ) -> tuple[DenoisingSegment, ...]:
        """The segments of a refined request: its own, and a second pass over the finished picture."""
        skipped = refine_steps_skipped(self.spec, request.num_inference_steps)
        # A seed of its own: adding the first pass's noise a second time is visible.
        return first, self._segment(request, skipped, seeded(request.seed + 1), first.noise.dtype)

    def _original(self, request: DiffusionRequest, generator: torch.Generator | None) -> torch.Tensor:
        """The VAE's unscaled latents of what the request changes: of its image, or its own latents enlarged.

        Only those of an image are drawn from `generator`.
        """
        if request.latents is not None:
            scale = self.pipeline.vae_scale_factor
            return enlarged(request.latents, request.height // scale, request.width // scale, self.device)
        if request.image is None:
            raise ValueError("the request changes nothing")
        return self._encoded(to_tensor(request.image, self.device), generator)

    def _encoded(self, image: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A sample of the VAE's unscaled latents (1 × channels × h × w) of floats in 0..1; see `encode`."""
        latents, smaller = encode(self.pipeline.vae, image, generator, self._smaller_tiling or self.tiling)
        self._smaller_tiling = smaller or self._smaller_tiling
        return latents

    def _flow_segment(
        self,
        request: DiffusionRequest,
        skipped: int,
        noise: torch.Tensor,
        generator: torch.Generator,
        sigmas: Sequence[float] | None,
        shift: float,
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`, by a flow-matching scheduler.

        `sigmas` are the noise levels before the scheduler shifts them, from 1 downwards, by default its own; `shift` is
        its `mu`, which counts only if the shift depends on the size. Raises `InvalidInput` for a scheduler that the
        model lacks.
        """
        spec = scheduler_of(self.spec, request.scheduler, request.num_inference_steps)
        scheduler = make_scheduler(spec, self.pipeline.scheduler, request.sampling)
        steps = request.num_inference_steps
        levels = {"num_inference_steps": steps} if sigmas is None else {"sigmas": [*sigmas]}
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # it takes no noise levels of its own
            euler = make_scheduler(SCHEDULERS["flow_euler"], self.pipeline.scheduler, request.sampling)
            euler.set_timesteps(**levels, device=noise.device, mu=shift)
            scheduler.set_timesteps(steps, device=noise.device)
            follow(scheduler, euler)
        else:
            scheduler.set_timesteps(**levels, device=noise.device, mu=shift)
        first = skipped * scheduler.order
        scheduler.set_begin_index(first)
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise, steps=steps - skipped)
