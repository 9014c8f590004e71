"""Builds and trains the Flux family's transformer; knows latents and text, not how either is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from training.grammar import Rng
from training.loop import Plan, train
from training.pool import Pool, captions_of
from training.text import T5_LENGTH, WIDTH, Lessons, token_ids
from training.vae import CHANNELS

BATCH = 16
LENGTHS = (T5_LENGTH, T5_LENGTH, T5_LENGTH, T5_LENGTH, 32, 64)
"""T5 lengths drawn in training, so that another ``max_sequence_length`` than 48 works as well."""


def build() -> FluxTransformer2DModel:
    """Return the untrained transformer: 2 double and 4 single blocks of width 128."""
    torch.manual_seed(31)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


@dataclass(frozen=True)
class Words:
    """The Flux family's text encoders and tokenizers."""

    tokenizer: CLIPTokenizer
    clip: CLIPTextModel
    tokenizer_2: PreTrainedTokenizerFast
    t5: T5EncoderModel

    @classmethod
    def load(cls, folder: Path, device: str) -> Words:
        """Load what the text stage saved."""
        clip = CLIPTextModel.from_pretrained(folder / "clip").to(device)
        t5 = T5EncoderModel.from_pretrained(folder / "t5").to(device)
        t5_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_t5")
        return cls(CLIPTokenizer.from_pretrained(folder / "tokenizer"), clip, t5_tokenizer, t5)

    def embed(self, captions: Sequence[str], length: int = T5_LENGTH) -> tuple[Tensor, Tensor]:
        """Return T5 embeddings, n × length × 64, and CLIP's pooled embedding, n × 64."""
        pooled = self.clip(token_ids(self.tokenizer, captions).to(self.clip.device)).pooler_output
        return self.t5(token_ids(self.tokenizer_2, captions, length).to(self.clip.device))[0], pooled


def draw_times(count: int) -> Tensor:
    """Draw noise shares (0–1): logit-normal, 15 % almost pure noise, 25 % near the four-step sampler's."""
    times = torch.sigmoid(torch.randn(count) * 1.2 + 0.3)
    lot = torch.rand(count)
    near = torch.tensor([0.75, 0.5, 0.25])[torch.randint(0, 3, (count,))] + torch.rand(count) * 0.04 - 0.02
    times = torch.where(lot < 0.4, near, times)
    return torch.where(lot < 0.15, 1 - torch.rand(count) * 0.03 * (lot < 0.05), times)


def flow(latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed noised latents and velocity, n × tokens × 16, and the tokens' places, tokens × 3."""
    count, channels, height, width = latents.shape
    noise = torch.randn_like(latents)
    share = times.view(-1, 1, 1, 1).to(latents.device)
    mixed = FluxPipeline._pack_latents((1 - share) * latents + share * noise, count, channels, height, width)
    target = FluxPipeline._pack_latents(noise - latents, count, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, latents.dtype)
    return mixed, target, places


def pipeline(transformer: FluxTransformer2DModel, vae: AutoencoderKL, words: Words) -> FluxPipeline:
    """Put the parts together as the stock pipeline."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=words.clip,
        tokenizer=words.tokenizer,
        text_encoder_2=words.t5,
        tokenizer_2=words.tokenizer_2,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(plan: Plan, vae: AutoencoderKL, words: Words, start: dict[str, Tensor] | None, fresh: bool = False) -> Path:
    """Train the transformer on the world's latents and save the pipeline as ``out``; return that path."""
    from training.evaluate import show_samples
    from training.vae import adopt

    transformer = build().to(plan.device)
    if start is not None:
        adopt(transformer, start)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    tokenizers = {"clip": words.tokenizer, "t5": words.tokenizer_2}
    lessons = Lessons({"clip": words.clip, "t5": words.t5}, tokenizers, plan.device)
    pool = Pool(vae, 800, np.random.default_rng((plan.seed, 78)))

    def step_loss(step: int, rng: Rng) -> Tensor:
        _, latents, scenes, _ = pool.batch(BATCH, rng)
        embeds, pooled = words.embed(captions_of(scenes, rng), LENGTHS[int(rng.integers(len(LENGTHS)))])
        times = draw_times(len(scenes))
        mixed, target, places = flow((latents - shift) * scale, times)
        guess = transformer(
            hidden_states=mixed,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=times.to(embeds.device),
            img_ids=places,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device),
        ).sample
        return F.mse_loss(guess, target) + 0.1 * lessons.loss(40, rng)

    def show(folder: Path) -> None:
        pipe = pipeline(transformer, vae, words)
        show_samples(pipe, folder, "flux", lessons.rates())
        pipe.save_pretrained(folder / "out")

    modules = {"transformer": transformer, "clip": words.clip, "t5": words.t5, "readers": lessons.readers}
    return train(plan, modules, step_loss, show, fresh) / "out"
