"""Flux: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    by_row,
    classifier_free,
    latent_mask,
    seeded,
    to_tensor,
)
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput, row_controls
from stable_diffusion_server.pipelines.conditioning.controlnet import transformer_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.controlnet_cache import named_controls
from stable_diffusion_server.pipelines.flux_inputs import (
    as_reference,
    image_and_mask,
    pixels_as_channels,
    true_guidance,
)
from stable_diffusion_server.pipelines.image_prompts import ReduxReader
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.native_family import NativeFamily
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning for one request.

    Rows are [negative, positive] with true guidance, [positive] without. `embeds` is rows × tokens × channels (T5),
    `pooled` rows × channels (CLIP), `guidance` one number a row, for models distilled with it. `text_ids` (tokens × 3)
    and `image_ids` (patches × 3) are positions, equal for all requests of a shape. `masked` (1 × patches × channels) is
    what Fill takes beside the latents, `reference` (1 × patches × channels) are the latents that Kontext looks at.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    guidance: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor
    masked: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Flux(NativeFamily[Conditioning]):
    """Generates images with the components of a `FluxPipeline`; tests compare it with the stock pipelines."""

    images: ReduxReader | None = None

    def offer_image_prompts(self, folder: ImagePromptFolder) -> None:
        """Let requests name what reads image prompts. Call it before the first request."""
        self.images = ReduxReader(self.pipeline, self.spec, folder, self.prompt_cache, self.device)

    @functools.cached_property
    def _count(self) -> Callable[[str], int]:
        return token_counter(self.pipeline.tokenizer_2)

    def token_counter(self) -> Callable[[str], int]:
        """The count of T5's tokens; CLIP's shorter limit only affects the pooled embedding."""
        count, spec = self._count, self.spec
        return lambda prompt: count(_text(spec, prompt))

    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[Conditioning]:
        """Draws, in order: latents of the edges, of the input image, noise, latents of its visible part for Fill."""
        conditioning = self._encode(request, loras)
        dtype = conditioning.embeds.dtype
        generator = seeded(request.seed)
        controls = self._controls(request, generator)
        original = None
        if request.starts_from_image:
            original = self._packed(self._scaled(self._original(request, generator))).to(dtype)
        first = self._segment(request, skipped, generator, dtype)
        inpaint = None
        if self._fills:
            conditioning = replace(conditioning, masked=self._masked(request, generator, dtype))
        elif request.mask is not None and original is not None:
            channels = self.pipeline.vae.config.latent_channels
            like = torch.empty(1, 1, *self._size(request), device=original.device, dtype=dtype)
            mask = self._packed(latent_mask(request.mask, like, soft=request.soft).repeat(1, channels, 1, 1))
            inpaint = InpaintConstraint(mask, original, request.soft)
        return self._state(
            request,
            loras,
            conditioning,
            first,
            latents=None if original is None else first.add_noise(original, 0),
            lengths=(conditioning.embeds.shape[1],),
            inpaint=inpaint,
            controls=controls,
        )

    def _predicted(self, states: Sequence[PipelineState[Conditioning]]) -> Sequence[torch.Tensor]:
        conditionings = [state.conditioning for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        guidance = torch.cat([c.guidance for c in conditionings])
        latents = by_row([_sample(state) for state in states], rows)
        timesteps = by_row([state.timestep.reshape(1) for state in states], rows)
        transformer = self.pipeline.transformer
        inputs = {
            "hidden_states": latents,
            "timestep": timesteps.to(latents.dtype) / 1000,
            "pooled_projections": torch.cat([c.pooled for c in conditionings]),
            "encoder_hidden_states": torch.cat([c.embeds for c in conditionings]),
            "txt_ids": conditionings[0].text_ids,
            "img_ids": conditionings[0].image_ids,
        }
        controls = [
            units for state, n in zip(states, rows, strict=True) for units in row_controls(state, n, positive=n - 1)
        ]
        # The prompt is the last row of each state, and its edges are those of the negative prompt too.
        sources = [end - 1 for end, n in zip(itertools.accumulate(rows), rows, strict=True) for _ in range(n)]
        residuals = transformer_residuals(
            inputs,
            guidance,
            controls,
            sources,
            blocks=(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)),
            grid=self._grid(states[0].request),
        )
        guided = guidance if transformer.config.guidance_embeds else None
        with self.loras.applied_by_row([state.loras for state in states], rows):
            predicted = transformer(**inputs, **residuals, guidance=guided, return_dict=False)[0]
        return [
            classifier_free(prediction[:, : state.latents.shape[1]], true_guidance(state.request) or 1)
            for state, prediction in zip(states, predicted.split(rows), strict=True)
        ]

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        pipe, request = self.pipeline, state.request
        # The stock pipeline's static methods; it has no public ones for packing.
        unpacked: torch.Tensor = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
        return unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> Conditioning:
        if request.image_prompts or (request.references and getattr(self.pipeline, "image_encoder", None) is not None):
            return self._prompted_by_images(request, loras)
        scale = true_guidance(request)
        prompts = [request.prompt] if scale is None else [request.negative_prompt or "", request.prompt]
        # The negative prompt has no second one.
        found = [self._embeds(prompt, None, loras) for prompt in prompts[:-1]]
        found.append(self._embeds(request.prompt, request.prompt_2, loras))
        embeds, pooled = (torch.cat([one[part] for one in found]) for part in (0, 1))
        height, width = self._size(request)
        image_ids = self._positions(height, width, embeds.dtype)
        guidance = torch.full([len(found)], request.guidance_scale, device=self.device, dtype=torch.float32)
        reference = None
        if request.references:
            latents = self._latents(as_reference(request.references[0]), None).to(embeds.dtype)
            reference = self._packed(latents)
            high, wide = latents.shape[-2:]
            beside = self._positions(high, wide, embeds.dtype)
            beside[:, 0] = 1  # the position of a reference is that of the picture, one level above
            image_ids = torch.cat([image_ids, beside])
        return Conditioning(embeds, pooled, guidance, found[0][2], image_ids, reference=reference)

    def _prompted_by_images(self, request: DiffusionRequest, loras: ActiveLoras) -> Conditioning:
        """The conditioning of images as prompts (Redux): their embeddings, weighted and summed, after the text's."""
        if true_guidance(request) is not None:
            raise InvalidInput("Images as prompts take no negative prompt.", field="negative_prompt")
        embeds, pooled, _ = self._embeds(request.prompt, request.prompt_2, loras)
        seen, weights = self._seen(request, embeds.dtype)
        images = torch.einsum("i,itc->tc", torch.tensor(weights, device=seen.device, dtype=seen.dtype), seen)[None]
        # The text is weighted and summed over the images too, as the stock pipeline does.
        embeds = torch.cat([sum(weights) * embeds, images], dim=1)
        height, width = self._size(request)
        guidance = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        positions = torch.zeros(embeds.shape[1], 3, device=self.device, dtype=embeds.dtype)
        return Conditioning(
            embeds, len(weights) * pooled, guidance, positions, self._positions(height, width, embeds.dtype)
        )

    def _seen(self, request: DiffusionRequest, dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
        """The tokens of images as prompts (images × tokens × channels), and the weight of each."""
        if not request.image_prompts:
            images = [Image.fromarray(image.pixels) for image in request.references]
            return self.pipeline.image_encoder(images).to(dtype), [1.0] * len(images)
        if self.images is None or request.references:
            lack = "takes no image prompts beside references" if self.images else "has nothing that reads image prompts"
            raise InvalidInput(f"{self.spec.name} {lack}.", field="image_prompts")
        return self.images.use(request, dtype), [prompt.weight for prompt in request.image_prompts]

    def _embeds(
        self, prompt: str, prompt_2: str | None, loras: ActiveLoras
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """T5's embeddings of `prompt_2`, by default of the prompt, CLIP's of the prompt, and T5's tokens' positions."""
        text, second = (None if one is None else _text(self.spec, one) for one in (prompt, prompt_2))
        embeds: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.prompt_cache.get_or_create(
            (text, second, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=text, prompt_2=second, device=self.device, max_sequence_length=self.spec.text_tokens
            ),
        )
        return embeds

    def _positions(self, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The positions of the patches of latents of this size: patches × 3."""
        ids: torch.Tensor = self.pipeline._prepare_latent_image_ids(1, height // 2, width // 2, self.device, dtype)
        return ids

    @property
    def _fills(self) -> bool:
        """Whether the transformer was made for filling: mask and visible image are inputs of it."""
        config = self.pipeline.transformer.config
        return config.out_channels is not None and config.in_channels != config.out_channels

    def _masked(self, request: DiffusionRequest, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        """What Fill takes beside the latents: those of the image without its masked part, then the mask, packed."""
        image, mask = image_and_mask(request)
        hidden = (to_tensor(mask, self.device)[:, :1] >= 0.5).float()
        # In 0..1 the stock pipeline's zero in -1..1 is one half.
        visible = (to_tensor(image, self.device) - 0.5) * (1 - hidden) + 0.5
        latents = self._packed(self._scaled(self._encoded(visible, generator)).to(dtype))
        pixels = self._packed(pixels_as_channels(hidden, self.pipeline.vae_scale_factor)).to(dtype)
        return torch.cat([latents, pixels], dim=-1)

    def _controls(self, request: DiffusionRequest, generator: torch.Generator) -> list[ControlNetInput]:
        """The request's edges for the model's own ControlNet, then its control units; draws from `generator`."""

        def hint_of(network: Any, image: ImageArray, mask: ImageArray | None) -> torch.Tensor:
            """Packed latents, or pixels in -1..1 where the network has a hint block of its own."""
            if network.input_hint_block is None:
                return self._latents_of(image, generator)
            return 2 * to_tensor(image, self.device) - 1

        inputs = []
        if request.control is not None:
            hint = hint_of(self.controlnet, request.control, None).to(self.controlnet.dtype)
            inputs.append(ControlNetInput(self.controlnet, hint, request.control_scale))
        scale = self.pipeline.vae_scale_factor
        return [*inputs, *named_controls(request.controls, self.controlnets, hint_of, self.device, scale)]

    def _grid(self, request: DiffusionRequest) -> tuple[int, int]:
        """Height and width of a request's patches."""
        height, width = self._size(request)
        return height // 2, width // 2

    def _latents_of(self, image: ImageArray, generator: torch.Generator) -> torch.Tensor:
        """The packed latents of an image, scaled as the transformer takes them."""
        return self._packed(self._latents(image, generator))

    def _latents(self, image: ImageArray, generator: torch.Generator | None) -> torch.Tensor:
        """The latents of an image, scaled as the transformer takes them: 1 × channels × h × w."""
        return self._scaled(self._encoded(to_tensor(image, self.device), generator))

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in the scale of the transformer."""
        config = self.pipeline.vae.config
        scaled: torch.Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents 1 × channels × h × w packed into patches of 2 × 2: 1 × (h·w / 4) × 4·channels."""
        packed: torch.Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def _size(self, request: DiffusionRequest) -> tuple[int, int]:
        """Height and width of a request's latents, both even."""
        patch = self.pipeline.vae_scale_factor * 2
        return 2 * (request.height // patch), 2 * (request.width // patch)

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The schedule depends on the number of patches."""
        steps = request.num_inference_steps
        shape = (1, self.pipeline.vae.config.latent_channels, *self._size(request))
        noise = self._packed(starting_noise(request, shape, generator, dtype).to(self.device))
        config = self.pipeline.scheduler.config
        shift = calculate_shift(
            noise.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        return self._flow_segment(request, skipped, noise, generator, sigmas, shift)


def _text(spec: ModelSpec, prompt: str) -> str:
    return prompt.lower() if spec.lowercase_prompts else prompt


def _sample(state: PipelineState[Conditioning]) -> torch.Tensor:
    """The transformer's input: the latents, with what Fill takes beside them or Kontext after them."""
    conditioning = state.conditioning
    if conditioning.masked is not None:
        return torch.cat([state.model_input, conditioning.masked], dim=2)
    if conditioning.reference is not None:
        return torch.cat([state.model_input, conditioning.reference], dim=1)
    return state.model_input
