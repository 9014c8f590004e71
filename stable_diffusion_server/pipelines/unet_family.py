"""Shared code of the families with a UNet: how a request becomes a state, and how a batch takes one step."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.adapters.image_attention import attending
from stable_diffusion_server.pipelines.adapters.image_rows import ReadImage, attended_by_row
from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    by_row,
    latent_mask,
    seeded,
    to_tensor,
)
from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.conditioning.clip_prompts import ClipEncoder
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput, row_controls
from stable_diffusion_server.pipelines.conditioning.controlnet import check_grid, unet_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras
from stable_diffusion_server.pipelines.conditioning.prompt_reader import StepPrompts, read_prompts
from stable_diffusion_server.pipelines.controlnet_cache import named_controls
from stable_diffusion_server.pipelines.image_prompts import ImagePromptReader
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import (
    make_scheduler,
    set_timesteps,
    token_counter,
)
from stable_diffusion_server.pipelines.loading.schedules import aligned_timesteps, has_table, use_own_noise
from stable_diffusion_server.pipelines.native_family import NativeFamily
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.pipelines.unet_inputs import (
    UnetConditioning,
    guided_prediction,
    model_sample,
    scaled_latents,
    vae_statistics,
)
from stable_diffusion_server.types import DiffusionRequest, ImageArray


class UnetFamily(NativeFamily[UnetConditioning]):
    """Generates images with a UNet, a VAE and one or two CLIPs; tests compare it with the stock pipelines.

    Raises `ModelLoadError` when the ControlNet does not fit the VAE.
    """

    images: ImagePromptReader | None = None

    def offer_image_prompts(self, folder: ImagePromptFolder) -> None:
        """Let requests name what reads image prompts. Call it before the first request."""
        self.images = ImagePromptReader(self.pipeline.unet, self.spec, folder, self.prompt_cache, self.device)

    def _read_images(self, request: DiffusionRequest, conditioning: UnetConditioning) -> tuple[ReadImage, ...]:
        if not request.image_prompts:
            return ()
        if self.images is None:
            raise InvalidInput(f"{self.spec.name} has nothing here that reads image prompts.", field="image_prompts")
        return self.images.use(request, conditioning.embeds.dtype, guided=conditioning.guided)

    def _adapt_controlnet(self) -> None:
        if self.controlnet is not None:
            check_grid(self.controlnet, self.pipeline.vae_scale_factor)

    @functools.cached_property
    def _counters(self) -> list[Callable[[str], int]]:
        tokenizers = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [token_counter(tokenizer) for tokenizer in tokenizers if tokenizer is not None]

    def token_counter(self) -> Callable[[str], int]:
        """The larger count of the tokenizers."""
        counters = self._counters
        return lambda prompt: max(count(prompt) for count in counters)

    def _read_prompts(
        self, request: DiffusionRequest, encoders: Sequence[ClipEncoder], loras: ActiveLoras
    ) -> list[StepPrompts]:
        """A request's prompts with weights and embeddings, read by these CLIPs."""
        embeddings = self.embeddings.use(request.embeddings)
        return read_prompts(request, self.spec, encoders, self.prompt_cache, loras, self.device, embeddings)

    @abstractmethod
    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> UnetConditioning:
        """The conditioning of a request's prompts, without `masked`."""

    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[UnetConditioning]:
        pipe = self.pipeline
        controls = self._controls(request)
        conditioning = self._encode(request, loras)
        dtype = conditioning.embeds.dtype
        generator = seeded(request.seed)
        original = None
        if request.starts_from_image and not (self._takes_mask and request.strength == 1):
            original = scaled_latents(pipe.vae, self._original(request, generator)).to(dtype)
        first = self._segment(request, skipped, generator, dtype)
        latents, inpaint = self._start(request, first, original)
        if self._takes_mask:
            conditioning, inpaint = replace(conditioning, masked=self._masked(request, generator, dtype)), None
        elif inpaint is not None:
            # The stock pipeline samples masked-image latents even for a UNet that does not take them; ancestral
            # schedulers draw from the same generator afterwards.
            torch.randn(latents.shape, generator=generator, dtype=pipe.vae.dtype)
        lengths = (conditioning.embeds.shape[1],)
        state = self._state(
            request, loras, conditioning, first, latents=latents, lengths=lengths, inpaint=inpaint, controls=controls
        )
        state.warnings, state.images = conditioning.warnings, self._read_images(request, conditioning)
        return state

    def _predicted(self, states: Sequence[PipelineState[UnetConditioning]]) -> Sequence[torch.Tensor]:
        """By one pass for each UNet."""
        found: dict[int, torch.Tensor] = {}
        for part in dict.fromkeys(state.conditioning.part for state in states):
            own = [index for index, state in enumerate(states) if state.conditioning.part == part]
            predicted = self._rows_of(getattr(self.pipeline, part), [states[index] for index in own])
            found |= zip(own, predicted, strict=True)
        return [guided_prediction(found[index], state, self._rescale(state)) for index, state in enumerate(states)]

    def _rows_of(self, unet: Any, states: Sequence[PipelineState[UnetConditioning]]) -> Sequence[torch.Tensor]:
        """The prediction of each state's rows, by one pass."""
        conditionings = [state.conditioning.at(state.index) for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        inputs = {
            "sample": by_row([model_sample(state) for state in states], rows),
            "timestep": by_row([state.timestep.reshape(1) for state in states], rows).to(self.device),
            "encoder_hidden_states": torch.cat([c.embeds for c in conditionings]),
            "added_cond_kwargs": {
                name: torch.cat([c.added[name] for c in conditionings]) for name in conditionings[0].added
            },
        }
        controls = [
            units for state, n in zip(states, rows, strict=True) for units in row_controls(state, n, positive=n - 1)
        ]
        residuals = unet_residuals(inputs, controls)
        images = attended_by_row(map(_images_now, states), rows) if unet is self.pipeline.unet else []
        with self.loras.applied_by_row([state.loras for state in states], rows), attending(images):
            predicted: torch.Tensor = unet(**inputs, **residuals, return_dict=False)[0]
        return list(predicted.split(rows))

    def _rescale(self, state: PipelineState[UnetConditioning]) -> float:
        """The rescaling of guidance that the request asks for, by default the model's."""
        return float(dict(state.request.sampling).get("guidance_rescale", self.spec.guidance_rescale))

    def _vae_latents(self, state: PipelineState[UnetConditioning], latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        if (statistics := vae_statistics(self.pipeline.vae, latents)) is None:
            return latents / config.scaling_factor
        mean, deviation = statistics
        return latents * deviation / config.scaling_factor + mean

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        pipe = self.pipeline
        scheduler = self._scheduler(request)
        first = skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        size = (request.height // pipe.vae_scale_factor, request.width // pipe.vae_scale_factor)
        noise = starting_noise(request, (1, pipe.unet.config.out_channels, *size), generator, dtype)
        noise = noise.to(self.device)
        use_own_noise(scheduler, noise, generator.initial_seed())
        steps = request.num_inference_steps - skipped
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise, steps=steps)

    def _scheduler(self, request: DiffusionRequest) -> Any:
        """A new scheduler with the request's timesteps.

        On the CPU: schedulers read timesteps in Python, and on a device every read would wait for its queue.
        """
        steps, like = request.num_inference_steps, self.pipeline.scheduler
        scheduler = make_scheduler(scheduler_of(self.spec, request.scheduler, steps), like, request.sampling)
        table: list[int] = []
        if has_table(dict(request.sampling)):
            table = aligned_timesteps(scheduler, steps, sdxl=hasattr(self.pipeline, "text_encoder_2"))
        set_timesteps(scheduler, steps, torch.device("cpu"), table)
        return scheduler

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
            mask = latent_mask(request.mask, original, soft=request.soft)
            inpaint = InpaintConstraint(mask, original, request.soft)
        if original is None or (inpaint is not None and request.strength == 1):
            return segment.noise * segment.scheduler.init_noise_sigma, inpaint
        return segment.add_noise(original, 0), inpaint

    def _controls(self, request: DiffusionRequest) -> list[ControlNetInput]:
        """The request's edges for the model's own ControlNet, then its control units."""
        inputs = []
        if request.control is not None:
            hint = self._hint(self.controlnet, request.control, None).to(self.controlnet.dtype)
            inputs.append(ControlNetInput(self.controlnet, hint, request.control_scale))
        scale = self.pipeline.vae_scale_factor
        return [*inputs, *named_controls(request.controls, self.controlnets, self._hint, self.device, scale)]

    def _hint(self, network: Any, image: ImageArray, mask: ImageArray | None) -> torch.Tensor:
        """Pixels in 0..1; what is repainted is marked as the networks were trained: -1, and black for unions."""
        hint = to_tensor(image, self.device)
        if mask is None:
            return hint
        hidden = to_tensor(mask, self.device)[:, :1] >= 0.5
        return torch.where(hidden, 0.0 if "num_control_type" in network.config else -1.0, hint)


def _images_now(state: PipelineState[UnetConditioning]) -> list[ReadImage]:
    """The image prompts that count at the next step."""
    return [image for image in state.images if image.counts_at(state.index, state.steps)]
