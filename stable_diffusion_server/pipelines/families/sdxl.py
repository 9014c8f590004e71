"""SDXL: its prompts, and the sizes that its UNet takes beside them."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from stable_diffusion_server.pipelines.base import DenoisingSegment, seeded
from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler, set_timesteps
from stable_diffusion_server.pipelines.model_spec import REFINER
from stable_diffusion_server.pipelines.unet_family import UnetFamily
from stable_diffusion_server.pipelines.unet_inputs import UnetConditioning
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
        scheduler_spec = scheduler_of(self.spec, request.scheduler, request.num_inference_steps)
        scheduler = make_scheduler(scheduler_spec, like=self.pipeline.scheduler)
        set_timesteps(scheduler, request.num_inference_steps, torch.device("cpu"))
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
        refining = DenoisingSegment(
            scheduler,
            scheduler.timesteps[start:],
            seeded(request.seed + 1),
            first.noise,
            self._encode_for_refiner(request, loras),
        )
        return replace(first, timesteps=first.timesteps[:above]), refining

    def _encode_for_refiner(self, request: DiffusionRequest, loras: ActiveLoras) -> UnetConditioning:
        """The refiner's conditioning: the second text encoder alone, and aesthetic scores in place of a size."""
        pipe, guided = self.pipeline, request.guidance_scale > 1
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
            (REFINER, request.prompt, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: texts.encode_prompt(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            ),
        )
        size = (request.height, request.width, 0, 0)
        scores = torch.tensor([[*size, _BAD], [*size, _GOOD]], dtype=positive.dtype, device=positive.device)
        if not guided:
            return UnetConditioning(positive, {"text_embeds": pooled, "time_ids": scores[1:]}, part=REFINER)
        both = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": scores}
        return UnetConditioning(torch.cat([negative, positive]), both, part=REFINER)

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> UnetConditioning:
        guided = request.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.prompt_cache.get_or_create(
            (request.prompt, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                clip_skip=self.spec.clip_skip or None,
            ),
        )
        # (original size, crop offset, target size): the stock pipeline's defaults, no crop.
        sizes = (request.height, request.width, 0, 0, request.height, request.width)
        time_ids = torch.tensor([sizes], dtype=positive.dtype, device=positive.device)
        if not guided:
            return UnetConditioning(positive, {"text_embeds": pooled, "time_ids": time_ids})
        both = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": time_ids.expand(2, -1)}
        return UnetConditioning(torch.cat([negative, positive]), both)
