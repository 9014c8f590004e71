"""SDXL's stock pipeline with the UNet of its refiner as a component."""

from __future__ import annotations

from typing import Any

import diffusers


class RefinedXLPipeline(diffusers.StableDiffusionXLPipeline):  # type: ignore[misc]  # diffusers has no types
    """A stock pipeline with one component more, so that it is moved and counted as the others."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->refiner->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        refiner: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool = False,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(refiner=refiner)
