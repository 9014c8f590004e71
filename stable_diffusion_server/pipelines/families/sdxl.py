"""SDXL: its prompts, and the sizes that its UNet takes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from stable_diffusion_server.pipelines.base import DenoisingSegment, seeded
from stable_diffusion_server.pipelines.conditioning.clip_prompts import ClipEncoder, ClipText
from stable_diffusion_server.pipelines.conditioning.embedding_files import CLIP_G
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.loading.schedules import use_own_noise
from stable_diffusion_server.pipelines.model_spec import REFINER
from stable_diffusion_server.pipelines.unet_family import UnetFamily
from stable_diffusion_server.pipelines.unet_inputs import UnetConditioning, by_step
from stable_diffusion_server.types import DiffusionRequest

# Share of the noise schedule that the base draws before a refiner; its authors' "ensemble of experts".
HANDOVER = 0.8
# Aesthetic scores of the positive and the negative prompt, as the stock pipeline has them.
_GOOD, _BAD = 6.0, 2.5


class Sdxl(UnetFamily):
    """Generates images with the components of a `StableDiffusionXLPipeline`."""

    def _refined(
        self, request: DiffusionRequest, first: DenoisingSegment, loras: ActiveLoras
    ) -> tuple[DenoisingSegment, ...]:
        """With a refiner, the base draws the steps above `HANDOVER`, and the refiner the rest of the same schedule.

        As `denoising_end` and `denoising_start` of the stock pipelines. Repainted pictures get the usual second pass,
        and so do those whose strength leaves one of the two no step.
        """
        if getattr(self.pipeline, REFINER, None) is None or request.mask is not None:
            return super()._refined(request, first, loras)
        scheduler = self._scheduler(request)
        trained = scheduler.config.num_train_timesteps
        handover = round(trained - HANDOVER * trained)
        left = int((scheduler.timesteps < handover).sum())
        if scheduler.order == 2 and left % 2 == 0:
            left += 1  # not between the two evaluations of a step
        above = int((first.timesteps >= handover).sum())
        if not left or not above:
            return super()._refined(request, first, loras)
        start = len(scheduler.timesteps) - left
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        generator, done = seeded(request.seed + 1), max(1, first.steps_done(above))
        use_own_noise(scheduler, first.noise, generator.initial_seed())
        refining = DenoisingSegment(
            scheduler,
            scheduler.timesteps[start:],
            generator,
            first.noise,
            self._encode_for_refiner(request, loras),
            steps=max(1, first.steps - done),
        )
        return replace(first, timesteps=first.timesteps[:above], steps=done), refining

    def _encode_for_refiner(self, request: DiffusionRequest, loras: ActiveLoras) -> UnetConditioning:
        """The refiner's conditioning: the second text encoder alone, and aesthetic scores in place of a size."""
        pipe, guided = self.pipeline, request.guidance_scale > 1
        size = (request.height, request.width, 0, 0)
        if request.weighted or request.clip_skip is not None:
            (last,) = self._read_prompts(request, self._encoders()[1:], loras)[-1:]
            return self._conditioning_of_refiner(size, last.rows)
        prompt = request.prompt if request.prompt_2 is None else request.prompt_2
        texts = StableDiffusionXLImg2ImgPipeline(
            vae=pipe.vae,
            text_encoder=None,
            text_encoder_2=pipe.text_encoder_2,
            tokenizer=None,
            tokenizer_2=pipe.tokenizer_2,
            unet=pipe.refiner,
            scheduler=pipe.scheduler,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        positive, negative, pooled, negative_pooled = self.prompt_cache.get_or_create(
            (REFINER, prompt, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: texts.encode_prompt(
                prompt=prompt,
                negative_prompt=request.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            ),
        )
        rows = [ClipText(negative, negative_pooled)] if guided else []
        return self._conditioning_of_refiner(size, [*rows, ClipText(positive, pooled)])

    @staticmethod
    def _conditioning_of_refiner(size: tuple[int, ...], rows: Sequence[ClipText]) -> UnetConditioning:
        embeds, pooled = _stacked(rows)
        scores = torch.tensor([[*size, _BAD], [*size, _GOOD]], dtype=embeds.dtype, device=embeds.device)
        return UnetConditioning(embeds, {"text_embeds": pooled, "time_ids": scores[-len(rows) :]}, part=REFINER)

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> UnetConditioning:
        guided = request.guidance_scale > 1
        if request.weighted or request.clip_skip is not None:
            return self._read(request, loras)
        positive, negative, pooled, negative_pooled = self.prompt_cache.get_or_create(
            (request.prompt, request.prompt_2, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=request.prompt,
                prompt_2=request.prompt_2,
                negative_prompt=request.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                clip_skip=self.spec.clip_skip or None,
            ),
        )
        rows = [ClipText(negative, negative_pooled)] if guided else []
        return self._conditioning(request, [*rows, ClipText(positive, pooled)])

    def _conditioning(self, request: DiffusionRequest, rows: Sequence[ClipText]) -> UnetConditioning:
        # (original size, crop offset, target size): the stock pipeline's defaults, no crop.
        sizes = (request.height, request.width, 0, 0, request.height, request.width)
        embeds, pooled = _stacked(rows)
        time_ids = torch.tensor([sizes], dtype=embeds.dtype, device=embeds.device).expand(len(rows), -1)
        return UnetConditioning(embeds, {"text_embeds": pooled, "time_ids": time_ids})

    def _read(self, request: DiffusionRequest, loras: ActiveLoras) -> UnetConditioning:
        """The conditioning of prompts with weights, in chunks."""
        prompts = self._read_prompts(request, self._encoders(), loras)
        if request.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            prompts = [prompt.without_negative() for prompt in prompts]
        return by_step(prompts, lambda each: self._conditioning(request, each.rows))

    def _encoders(self) -> tuple[ClipEncoder, ...]:
        pipe = self.pipeline
        return (
            ClipEncoder(pipe.tokenizer, pipe.text_encoder, penultimate=True),
            ClipEncoder(pipe.tokenizer_2, pipe.text_encoder_2, penultimate=True, part=CLIP_G),
        )


def _stacked(rows: Sequence[ClipText]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings and the pooled vectors of all rows."""
    return torch.cat([row.embeds for row in rows]), torch.cat([row.pooled for row in rows if row.pooled is not None])
