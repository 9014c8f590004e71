"""Shared code of the families with a UNet: how a request becomes a state, and how a batch takes one step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

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
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest


@dataclass(frozen=True, slots=True)
class UnetConditioning:
    """The UNet's conditioning: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` is rows × tokens × channels; `added` are further inputs by name, each with the rows first (SDXL's pooled
    prompt and sizes). `masked` is for a UNet made for inpainting: 1 × 5 × h × w, the mask and the latents of the image
    without its masked part. `part` is the component that denoises.
    """

    embeds: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masked: torch.Tensor | None = None
    part: str = "unet"

    @property
    def guided(self) -> bool:
        """Whether there is a negative row."""
        return len(self.embeds) == 2


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
                original = _scaled(pipe.vae, self._encoded(pixels, generator)).to(dtype)
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
                    state.advance(_guide(prediction, state, self.spec.guidance_rescale))
            await_device(predicted[0][0].device)

    def _predicted(self, unet: Any, states: Sequence[PipelineState[UnetConditioning]]) -> Sequence[torch.Tensor]:
        """The prediction of each state's rows, by one pass."""
        conditionings = [state.conditioning for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        inputs = {
            "sample": by_row([_sample(state) for state in states], rows),
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
        if (statistics := _statistics(self.pipeline.vae, latents)) is None:
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
        latents = _scaled(vae, self._encoded(visible, generator)).to(dtype)
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


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and deviation of the VAE's latents by channel, if it has them (Playground v2.5): 1 × channels × 1 × 1."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return None
    mean, deviation = (torch.tensor(numbers).view(1, -1, 1, 1).to(like) for numbers in (mean, deviation))
    return mean, deviation


def _scaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """A VAE's latents in the scale of the UNet."""
    if (statistics := _statistics(vae, latents)) is None:
        scaled: torch.Tensor = vae.config.scaling_factor * latents
        return scaled
    mean, deviation = statistics
    return (latents - mean) * vae.config.scaling_factor / deviation


def _sample(state: PipelineState[UnetConditioning]) -> torch.Tensor:
    """The UNet's input: the latents, and for an inpainting UNet the mask and the masked image."""
    masked = state.conditioning.masked
    return state.model_input if masked is None else torch.cat([state.model_input, masked], dim=1)


def _guide(prediction: torch.Tensor, state: PipelineState[UnetConditioning], rescale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): negative + scale · (positive − negative).

    `rescale` (0..1) brings the spread towards that of `positive` (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    """
    if not state.conditioning.guided:
        return prediction
    negative, positive = prediction.chunk(2)
    guided = negative + state.request.guidance_scale * (positive - negative)
    return rescale_noise_cfg(guided, positive, guidance_rescale=rescale) if rescale else guided
