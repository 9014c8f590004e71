"""Builds and trains the Flux family's transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from training.captions import Rng
from training.flux_vae import fold
from training.latent_cache import LatentCache, captions_of
from training.loop import Plan, train
from training.text import T5_LENGTH, WIDTH, token_ids
from training.vae import CHANNELS

BATCH = 16
SHARES = (0.32, 0.32, 0.21, 0.15)
"""How often each of the four-step sampler's noise shares is trained: the noisiest decide what is drawn."""


def build() -> FluxTransformer2DModel:
    """Return the untrained transformer: 2 double and 4 single blocks of width 160."""
    torch.manual_seed(31)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16 * CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
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
    def load(cls, clip_folder: Path, t5_folder: Path, device: str) -> Words:
        """Load the encoders and tokenizers that the stages ``clip`` and ``t5`` saved."""
        clip = CLIPTextModel.from_pretrained(clip_folder / "encoder").to(device).eval().requires_grad_(False)
        t5 = T5EncoderModel.from_pretrained(t5_folder / "encoder").to(device).eval().requires_grad_(False)
        t5_tokenizer = PreTrainedTokenizerFast.from_pretrained(t5_folder / "tokenizer")
        return cls(CLIPTokenizer.from_pretrained(clip_folder / "tokenizer"), clip, t5_tokenizer, t5)

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return T5 embeddings, n × T5_LENGTH × WIDTH, and CLIP's pooled embedding, n × WIDTH."""
        ids = token_ids(self.tokenizer, captions)
        read = int((ids != self.tokenizer.pad_token_id).sum(1).max()) + 1  # causal attention never reads the padding
        pooled = self.clip(ids[:, :read].to(self.clip.device)).pooler_output
        return self.t5(token_ids(self.tokenizer_2, captions, T5_LENGTH).to(self.clip.device))[0], pooled


def draw_times(count: int) -> Tensor:
    """Sample noise shares (0–1).

    84 % are at or near the four-step sampler's, most often the noisiest one; the rest are logit-normal.
    """
    near = torch.tensor([1.0, 0.75, 0.5, 0.25])[torch.multinomial(torch.tensor(SHARES), count, replacement=True)]
    near = torch.where(near < 1, near + torch.rand(count) * 0.06 - 0.03, near)
    return torch.where(torch.rand(count) < 0.16, torch.sigmoid(torch.randn(count) * 1.2 + 0.5), near)


def folded(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Convert cached latents, n × 4 × height × width, to the family's scaled latents, n × 16 × height/2 × width/2."""
    return (fold(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def packed(latents: Tensor) -> Tensor:
    """Pack latents, n × channels × height × width, into tokens of 2 × 2 cells, n × tokens × 4 channels."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def flow(latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed noised latents and the velocity, both n × tokens × 16, and the tokens' positions, tokens × 3."""
    height, width = latents.shape[2:]
    noise = torch.randn_like(latents)
    share = times.view(-1, 1, 1, 1).to(latents.device)
    mixed = packed((1 - share) * latents + share * noise)
    target = packed(noise - latents)
    places = FluxPipeline._prepare_latent_image_ids(
        len(latents), height // 2, width // 2, latents.device, latents.dtype
    )
    return mixed, target, places


def pipeline(transformer: FluxTransformer2DModel, vae: AutoencoderKL, words: Words) -> FluxPipeline:
    """Assemble the stock pipeline from its components."""
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


def run(plan: Plan, vae: AutoencoderKL, words: Words, fresh: bool = False) -> Path:
    """Train the transformer on the cached latents, save the pipeline as ``out`` and return that path."""
    from training.evaluate import show_samples

    transformer = build().to(plan.device)
    store = LatentCache("pictures")
    quick = torch.compile(transformer, dynamic=False) if plan.compiled else transformer

    def step_loss(step: int, rng: Rng) -> Tensor:
        batch = store.batch(BATCH, rng)
        embeds, pooled = words.embed(captions_of(batch.scenes, rng))
        times = draw_times(len(batch.scenes))
        mixed, target, places = flow(folded(batch.latents.to(embeds.device), vae), times)
        guess = (quick if batch.size == (256, 256) else transformer)(
            hidden_states=mixed,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=times.to(embeds.device),
            img_ids=places,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device),
        ).sample
        return F.mse_loss(guess, target)

    def show(folder: Path) -> None:
        pipe = pipeline(transformer, vae, words)
        show_samples(pipe, folder)
        pipe.save_pretrained(folder / "out")
        store.refresh()

    return train(plan, {"transformer": transformer}, step_loss, show, fresh) / "out"
