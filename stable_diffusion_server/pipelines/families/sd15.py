"""Stable Diffusion 1.5: its prompts. It has no safety checker here."""

from __future__ import annotations

import torch

from stable_diffusion_server.pipelines.conditioning.clip_prompts import ClipEncoder
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.unet_family import UnetFamily
from stable_diffusion_server.pipelines.unet_inputs import UnetConditioning, by_step
from stable_diffusion_server.types import DiffusionRequest


class Sd15(UnetFamily):
    """Generates images with the components of a `StableDiffusionPipeline`."""

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> UnetConditioning:
        guided = request.guidance_scale > 1
        if request.weighted or request.clip_skip is not None:
            return self._read(request, loras)
        positive, negative = self.prompt_cache.get_or_create(
            (request.prompt, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                prompt_embeds=self._skipped(request.prompt) if self.spec.clip_skip else None,
            ),
        )
        return UnetConditioning(torch.cat([negative, positive]) if guided else positive)

    def _read(self, request: DiffusionRequest, loras: ActiveLoras) -> UnetConditioning:
        """The conditioning of prompts with weights, in chunks."""
        encoder = ClipEncoder(self.pipeline.tokenizer, self.pipeline.text_encoder, penultimate=False)
        prompts = self._read_prompts(request, (encoder,), loras)
        return by_step(prompts, lambda each: UnetConditioning(torch.cat([text.embeds for text in each.rows])))

    def _skipped(self, prompt: str) -> torch.Tensor:
        """A prompt's embeddings without the last `clip_skip` layers, 1 × tokens × channels.

        The stock pipeline's arithmetic, which fails with CLIP of transformers 5.6 and later. It leaves layers out of
        the positive prompt only.
        """
        pipe = self.pipeline
        tokens = pipe.tokenizer(
            prompt,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        found = pipe.text_encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
        network = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        embeds: torch.Tensor = network.final_layer_norm(found.hidden_states[-(self.spec.clip_skip + 1)])
        return embeds
