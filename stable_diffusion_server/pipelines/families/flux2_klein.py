"""FLUX.2 klein: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    by_row,
    classifier_free,
    mask_levels,
    seeded,
    to_tensor,
)
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.loading.counted_work import REFERENCE_PIXELS
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import chat_counter
from stable_diffusion_server.pipelines.native_family import NativeFamily
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` is rows × tokens × channels, `references` 1 × patches × channels, joined in order after the picture's own.
    `text_ids` (1 × tokens × 4) and `image_ids` (1 × patches × 4, those of the picture and of the references) are
    positions, equal for all requests of a shape: the transformer takes those of the first row for the whole batch.
    """

    embeds: torch.Tensor
    references: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor


class Flux2Klein(NativeFamily[Conditioning]):
    """Draws with the components of a `Flux2KleinPipeline`; tests compare it with the stock pipelines.

    Text, edits with references, and, as `Flux2KleinInpaintPipeline`, inpaint, where the input image is the first
    reference. Image-to-image is inpaint of the whole image. A distilled model ignores guidance.
    """

    @functools.cached_property
    def _count(self) -> Callable[[str], int]:
        return chat_counter(self.pipeline.tokenizer, thinking=False)

    def token_counter(self) -> Callable[[str], int]:
        """The count of Qwen3's tokens, those of the chat template included."""
        return self._count

    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[Conditioning]:
        """Raises `InvalidInput` for a reference that is too small or too narrow."""
        embeds, text_ids = self._encode(request, loras)
        generator = seeded(request.seed)
        original, inpaint = None, None
        references = [self._prepared_reference(*numbered) for numbered in enumerate(request.references)]
        latents_of = [self._latents_of(image).to(embeds.dtype) for image in references]
        if request.image is not None:
            latents_of.insert(0, self._latents_of(request.image).to(embeds.dtype))
            original = _packed(latents_of[0])
        first = self._segment(request, skipped, generator, embeds.dtype)
        if request.mask is not None and original is not None:
            inpaint = InpaintConstraint(self._mask(request.mask, original, request.soft), original, request.soft)
        return self._state(
            request,
            loras,
            self._conditioning(embeds, text_ids, latents_of, request),
            first,
            latents=None if original is None else first.add_noise(original, 0),
            lengths=(embeds.shape[1], tuple(tuple(latents.shape[-2:]) for latents in latents_of)),
            inpaint=inpaint,
        )

    def _predicted(self, states: Sequence[PipelineState[Conditioning]]) -> Sequence[torch.Tensor]:
        conditionings = [state.conditioning for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        latents = by_row([torch.cat([state.latents, state.conditioning.references], dim=1) for state in states], rows)
        times = by_row([state.timestep.reshape(1) for state in states], rows)
        with self.loras.applied_by_row([state.loras for state in states], rows):
            predicted = self.pipeline.transformer(
                hidden_states=latents.to(self.pipeline.transformer.dtype),
                timestep=times.to(latents.dtype) / 1000,
                guidance=None,
                encoder_hidden_states=torch.cat([conditioning.embeds for conditioning in conditionings]),
                txt_ids=conditionings[0].text_ids,
                img_ids=conditionings[0].image_ids,
                return_dict=False,
            )[0][:, : states[0].latents.shape[1]]
        return [
            classifier_free(prediction, state.request.guidance_scale)
            for state, prediction in zip(states, predicted.split(rows), strict=True)
        ]

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        height, width = self._size(state.request.height, state.request.width)
        mean, deviation = self._statistics(latents)
        patches = latents.transpose(1, 2).reshape(1, -1, height, width) * deviation + mean
        unpatchified: torch.Tensor = self.pipeline._unpatchify_latents(patches)
        return unpatchified

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings of the prompts, rows × tokens × channels, and the positions of their tokens."""
        guided = request.guidance_scale > 1 and not self.pipeline.config.is_distilled
        prompts = [request.negative_prompt or "", request.prompt] if guided else [request.prompt]
        encoded = [self._encode_one(prompt, loras) for prompt in prompts]
        return torch.cat([embeds for embeds, _ in encoded]), encoded[0][1]

    def _encode_one(self, prompt: str, loras: ActiveLoras) -> tuple[torch.Tensor, torch.Tensor]:
        pipe, tokens = self.pipeline, self.spec.text_tokens
        embeds, text_ids = self.prompt_cache.get_or_create(
            (prompt, digests_and_weights(loras)),
            lambda: pipe.encode_prompt(prompt=prompt, device=self.device, max_sequence_length=tokens),
        )
        return embeds, text_ids

    def _conditioning(
        self,
        embeds: torch.Tensor,
        text_ids: torch.Tensor,
        references: Sequence[torch.Tensor],
        request: DiffusionRequest,
    ) -> Conditioning:
        """`references` are latents as `_latents_of` returns them, in order."""
        pipe = self.pipeline
        picture = torch.empty(1, 1, *self._size(request.height, request.width))
        ids = pipe._prepare_latent_ids(picture).to(self.device)
        if not references:
            nothing = embeds.new_empty(1, 0, pipe.transformer.config.in_channels)
            return Conditioning(embeds, nothing, text_ids, ids)
        ids = torch.cat([ids, pipe._prepare_image_ids([*references]).to(self.device)], dim=1)
        return Conditioning(embeds, torch.cat([_packed(latents) for latents in references], dim=1), text_ids, ids)

    def _prepared_reference(self, number: int, reference: ImageArray) -> ImageArray:
        """The reference as the stock pipeline prepares it: at most 1024² pixels, sides cut to multiples of a patch."""
        processor, picture = self.pipeline.image_processor, Image.fromarray(reference.pixels)
        try:
            processor.check_image_input(picture)
        except ValueError as error:
            raise InvalidInput(
                f"A reference image has sides of at least 64 pixels, the longer at most 8 times the shorter; one here "
                f"has {picture.width} × {picture.height}.",
                field=f"references[{number}]",
            ) from error
        if picture.width * picture.height > REFERENCE_PIXELS:
            picture = processor._resize_to_target_area(picture, REFERENCE_PIXELS)
        patch = self._patch
        size = {"height": picture.height // patch * patch, "width": picture.width // patch * patch}
        return ImageArray(np.asarray(processor.resize(picture, **size, resize_mode="crop")))

    def _latents_of(self, image: ImageArray) -> torch.Tensor:
        """The latents of an image as the transformer takes them, before packing: 1 × channels × h × w."""
        latents = self.pipeline._patchify_latents(self._encoded(to_tensor(image, self.device), None))
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latents by channel, as the VAE's batch norm knows them: 1 × channels × 1 × 1."""
        norm = self.pipeline.vae.bn
        mean, variance = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        return mean.to(like), torch.sqrt(variance + self.pipeline.vae.config.batch_norm_eps).to(like)

    def _mask(self, mask: ImageArray, like: torch.Tensor, soft: bool) -> torch.Tensor:
        """The mask over packed latents, 1 × patches × 1: 1 to repaint, 0 to keep, between where a patch has both."""
        levels = mask_levels(mask, self.device, soft=soft)
        size = self._size(*mask.pixels.shape[:2])
        return _packed(torch.nn.functional.interpolate(levels, size=size, mode="bilinear")).to(like)

    @property
    def _patch(self) -> int:
        """Pixels of a side that one patch stands for."""
        patch: int = self.pipeline.vae_scale_factor * 2
        return patch

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in patches."""
        return height // self._patch, width // self._patch

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        pipe, steps = self.pipeline, request.num_inference_steps
        shape = (1, pipe.transformer.config.in_channels, *self._size(request.height, request.width))
        noise = _packed(starting_noise(request, shape, generator, dtype).to(self.device))
        shift = compute_empirical_mu(image_seq_len=noise.shape[1], num_steps=steps)
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
        return self._flow_segment(request, skipped, noise, generator, sigmas, shift)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents 1 × channels × h × w as patches: 1 × h·w × channels."""
    return latents.flatten(2).transpose(1, 2)
