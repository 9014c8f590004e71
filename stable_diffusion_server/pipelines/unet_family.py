"""Shared code of the families with a UNet: how a request becomes a state, and how a batch takes one step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    await_device,
    by_row,
    latent_mask,
    seeded,
    to_tensor,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.catalog import refine_steps_skipped, scheduler_of, steps_skipped
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput, check_grid, unet_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import (
    make_scheduler,
    set_timesteps,
    token_counter,
)
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.unet_inputs import (
    UnetConditioning,
    guided_prediction,
    model_sample,
    scaled_latents,
    vae_statistics,
)
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest


class UnetFamily(DiffusersFamily):
    """Generates images with a UNet, a VAE and one or two CLIPs; tests compare it with the stock pipelines.

    Raises `ModelLoadError` when the ControlNet does not fit the VAE.
    """

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        controlnet: Any = None,
        loras: LoraManager | None = None,
        prompt_cache: PromptCache | None = None,
        tiling: VaeTiling = WHOLE,
    ) -> None:
        if controlnet is not None:
            check_grid(controlnet, pipeline.vae_scale_factor)
        super().__init__(pipeline, spec, controlnet, loras, prompt_cache, tiling)
        tokenizers = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        self._counters = [token_counter(tokenizer) for tokenizer in tokenizers if tokenizer is not None]

    def token_counter(self) -> Callable[[str], int]:
        """The larger count of the tokenizers."""
        counters = self._counters
        return lambda prompt: max(count(prompt) for count in counters)

    @abstractmethod
    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> UnetConditioning:
        """The conditioning of a request's prompts, without `masked`."""

    def _prepared(self, request: DiffusionRequest) -> PipelineState[UnetConditioning]:
        """Encode the prompt and the input images, draw the noise, set the timesteps.

        Uses the generator in the order of the stock pipelines: latents of the input image, then noise. Raises
        `InvalidInput` for a strength that leaves no step, an unknown LoRA, or edges without a ControlNet.
        """
        with translate_torch_errors():
            pipe = self.pipeline
            skipped = steps_skipped(self.spec, request.num_inference_steps, request.strength) if request.image else 0
            control = self._control(request)
            loras = self.loras.use(request.loras, request.lora_digests)
            conditioning = self._encode(request, loras)
            dtype = conditioning.embeds.dtype
            generator = seeded(request.seed)
            original = None
            if request.image is not None and not (self._takes_mask and request.strength == 1):
                pixels = to_tensor(request.image, self.device)
                original = scaled_latents(pipe.vae, self._encoded(pixels, generator)).to(dtype)
            segments = [self._segment(request, skipped, generator, dtype)]
            latents, inpaint = self._start(request, segments[0], original)
            if self._takes_mask:
                conditioning, inpaint = replace(conditioning, masked=self._masked(request, generator, dtype)), None
            elif inpaint is not None:
                # The stock pipeline samples masked-image latents even for a UNet that does not take them; ancestral
                # schedulers draw from the same generator afterwards.
                torch.randn(latents.shape, generator=generator, dtype=pipe.vae.dtype)
            if request.refine:
                segments = self._refined(request, segments[0], loras)
            return PipelineState(
                request=request,
                shape=(*request.shape, conditioning.embeds.shape[1], *(lora.digest for lora, _ in loras)),
                latents=latents,
                segments=tuple(segments),
                conditioning=conditioning,
                inpaint=inpaint,
                control=control,
                loras=loras,
            )

    def step(self, states: Sequence[PipelineState[UnetConditioning]]) -> None:
        """One pass over the rows of all states of one UNet, then guidance and a scheduler step for each state."""
        with translate_torch_errors():
            self.loras.switch(states[0].loras)
            parts = dict.fromkeys(state.conditioning.part for state in states)
            groups = [[state for state in states if state.conditioning.part == part] for part in parts]
            predicted = [
                self._predicted(getattr(self.pipeline, part), group) for part, group in zip(parts, groups, strict=True)
            ]
            # After all passes: one that fails leaves every state as it was.
            for group, predictions in zip(groups, predicted, strict=True):
                for state, prediction in zip(group, predictions, strict=True):
                    state.advance(guided_prediction(prediction, state, self.spec.guidance_rescale))
            await_device(predicted[0][0].device)

    def _predicted(self, unet: Any, states: Sequence[PipelineState[UnetConditioning]]) -> Sequence[torch.Tensor]:
        """The prediction of each state's rows, by one pass."""
        conditionings = [state.conditioning for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        inputs = {
            "sample": by_row([model_sample(state) for state in states], rows),
            "timestep": by_row([state.timestep.reshape(1) for state in states], rows).to(self.device),
            "encoder_hidden_states": torch.cat([c.embeds for c in conditionings]),
            "added_cond_kwargs": {
                name: torch.cat([c.added[name] for c in conditionings]) for name in conditionings[0].added
            },
        }
        controls = [state.control for state, n in zip(states, rows, strict=True) for _ in range(n)]
        residuals = unet_residuals(self.controlnet, inputs, controls)
        predicted: torch.Tensor = unet(**inputs, **residuals, return_dict=False)[0]
        return list(predicted.split(rows))

    def _vae_latents(self, state: PipelineState[UnetConditioning], latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        if (statistics := vae_statistics(self.pipeline.vae, latents)) is None:
            return latents / config.scaling_factor
        mean, deviation = statistics
        return latents * deviation / config.scaling_factor + mean

    def _refined(
        self, request: DiffusionRequest, first: DenoisingSegment, loras: ActiveLoras
    ) -> list[DenoisingSegment]:
        """The segments of a refined request: its own, and a second pass over the finished picture."""
        skipped = refine_steps_skipped(self.spec, request.num_inference_steps)
        # A seed of its own: adding the first pass's noise a second time is visible.
        return [first, self._segment(request, skipped, seeded(request.seed + 1), first.noise.dtype)]

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`; draws its noise from `generator`."""
        pipe = self.pipeline
        scheduler_spec = scheduler_of(self.spec, request.scheduler, request.num_inference_steps)
        scheduler = make_scheduler(scheduler_spec, like=pipe.scheduler)
        # On the CPU: schedulers read timesteps in Python, and on a device every read would wait for its queue.
        set_timesteps(scheduler, request.num_inference_steps, torch.device("cpu"))
        first = skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        size = (request.height // pipe.vae_scale_factor, request.width // pipe.vae_scale_factor)
        noise = torch.randn((1, pipe.unet.config.out_channels, *size), generator=generator, dtype=dtype)
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise.to(self.device))

    @property
    def _takes_mask(self) -> bool:
        """Whether the UNet was made for inpainting: mask and masked image are inputs of it, 5 channels more."""
        config = self.pipeline.unet.config
        return bool(config.in_channels != config.out_channels)

    def _masked(self, request: DiffusionRequest, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        """The further inputs of an inpainting UNet; without a mask, the whole image is repainted.

        Samples from `generator` as the stock inpaint pipeline does.
        """
        vae, scale = self.pipeline.vae, self.pipeline.vae_scale_factor
        if request.mask is None:
            hidden = torch.ones(1, 1, request.height, request.width, device=self.device)
        else:
            hidden = (to_tensor(request.mask, self.device)[:, :1] >= 0.5).float()
        if request.image is None:  # in the memory layout of an image; convolutions round differently in others
            pixels = torch.full((1, 3, request.height, request.width), 0.5, device=self.device)
            pixels = pixels.to(memory_format=torch.channels_last)
        else:
            pixels = to_tensor(request.image, self.device)
        # In 0..1 the stock pipeline's zero in -1..1 is one half.
        visible = (pixels - 0.5) * (hidden < 0.5) + 0.5
        latents = scaled_latents(vae, self._encoded(visible, generator)).to(dtype)
        mask = torch.nn.functional.interpolate(hidden, size=(request.height // scale, request.width // scale))
        return torch.cat([mask.to(dtype), latents], dim=1)

    def _start(
        self, request: DiffusionRequest, segment: DenoisingSegment, original: torch.Tensor | None
    ) -> tuple[torch.Tensor, InpaintConstraint | None]:
        """The latents before the first step, and the inpaint constraint if there is a mask."""
        inpaint = None
        if request.mask is not None and original is not None:
            inpaint = InpaintConstraint(latent_mask(request.mask, original), original)
        if original is None or (inpaint is not None and request.strength == 1):
            return segment.noise * segment.scheduler.init_noise_sigma, inpaint
        return segment.add_noise(original, 0), inpaint

    def _control(self, request: DiffusionRequest) -> ControlNetInput | None:
        if request.control is None:
            return None
        if self.controlnet is None:
            raise InvalidInput(f"{self.spec.name} has no ControlNet here to follow edges with.", field="canny")
        hint = to_tensor(request.control, self.device).to(self.controlnet.dtype)
        return ControlNetInput(hint, request.control_scale)
