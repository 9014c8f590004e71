"""Builds and trains the SDXL family's UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.captions import Rng, draw_scene, pick
from training.flux_vae import fold
from training.latent_cache import LatentCache, captions_of
from training.loop import Plan, train
from training.synthetic_landscapes import Landscape
from training.synthetic_shapes import COLOURS, Scene
from training.text import WIDTH, projected, token_ids
from training.vae import CHANNELS

BETAS = (2e-5, 0.01)
"""Lower than SDXL's: its four steps' last would have to take away noise of .73, here of .32, nearly as in Flux."""
BATCH = 16
SHARES = (0.38, 0.3, 0.18, 0.14)
"""How often each of the four-step sampler's timesteps is trained: the noisiest decide what is drawn."""
TWINS = 0.2
"""How often the noised latents are those of a picture in other colours than the caption's, which is to win."""


def scheduler() -> EulerDiscreteScheduler:
    """Return the scheduler: v-prediction, zero terminal SNR, trailing steps (arXiv 2305.08891)."""
    return EulerDiscreteScheduler(
        beta_start=BETAS[0],
        beta_end=BETAS[1],
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def signal_shares() -> Tensor:
    """Return the share of signal power (0–1) at each of the 1000 timesteps."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, 1000) ** 2
    return torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).clamp(min=2**-24)


def build() -> UNet2DConditionModel:
    """Return the untrained UNet: wide at the finest resolution, with attention on 8² and 4² cells of a 256² image.

    It takes the Flux family's latents: 16 channels, downsampled by 16. It knows a cell's position only from the
    zero padding at the borders, which are never far from any of 4² cells. All channels are normalised as one group:
    with several groups, every norm would remove the colour of a flat background.
    """
    torch.manual_seed(21)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4 * CHANNELS,
        out_channels=4 * CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(112, 64, 64),
        layers_per_block=1,
        attention_head_dim=(7, 4, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
        time_embedding_dim=320,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=1,
    )


@dataclass(frozen=True)
class Words:
    """The SDXL family's frozen text encoders and their tokenizer. The second encoder is the first with a projection."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    @classmethod
    def load(cls, folder: Path, device: str) -> Words:
        """Load the encoder that the stage ``clip`` saved."""
        first = CLIPTextModel.from_pretrained(folder / "encoder").to(device).eval().requires_grad_(False)
        return cls(CLIPTokenizer.from_pretrained(folder / "tokenizer"), first, projected(first).to(device))

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings, n × 77 × 2 WIDTH, and pooled embeddings, n × WIDTH, as the pipeline computes them."""
        read = self.first(token_ids(self.tokenizer, captions).to(self.first.device), output_hidden_states=True)
        tokens = read.hidden_states[-2]
        return torch.cat([tokens, tokens], -1), read.pooler_output


def draw_twinned(rng: Rng) -> Scene:
    """Sample a scene of shapes that gets a twin."""
    scene = draw_scene(rng, pick(rng, ("one", "one", "free", "free", "placed", "two", "many")))
    if not isinstance(scene, Scene):
        raise TypeError("only landscapes are no scenes of shapes, and none was asked for")
    return scene


def recoloured(scene: Scene | Landscape, rng: Rng) -> Scene | Landscape:
    """Return a scene of shapes with other colours, half the time on another background. Landscapes are not changed."""
    if not isinstance(scene, Scene):
        return scene
    background = scene.background if rng.random() < 0.5 else pick(rng, tuple(COLOURS))
    colours = tuple(colour for colour in COLOURS if colour != background)
    return replace(
        scene,
        background=background,
        things=tuple(replace(thing, colour=pick(rng, colours)) for thing in scene.things),
    )


def draw_steps(count: int) -> Tensor:
    """Sample timesteps (0–999): 88 % at or near the four-step sampler's, most often the noisiest; the rest uniform."""
    near = torch.tensor([999, 749, 499, 249])[torch.multinomial(torch.tensor(SHARES), count, replacement=True)]
    near = torch.where(near < 999, near + torch.randint(-25, 26, (count,)), near)
    return torch.where(torch.rand(count) < 0.12, torch.randint(0, 1000, (count,)), near)


def size_ids(size: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """Return SDXL's six size conditions, n × 6: original height and width, crop offset, target height and width."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device).expand(count, -1)


def folded(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Convert cached latents, n × 4 × height × width, to the family's scaled latents, n × 16 × height/2 × width/2.

    Unlike Flux's, their mean is not subtracted: it is near zero, and the stock pipeline has no option for it.
    """
    return fold(latents) * vae.config.scaling_factor


def noised(latents: Tensor, steps: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noised latents and the velocity to be predicted (arXiv 2202.00512), both of the latents' shape."""
    share = shares[steps].view(-1, 1, 1, 1).to(latents.device)
    noise = torch.randn_like(latents)
    mixed = share.sqrt() * latents + (1 - share).sqrt() * noise
    return mixed, share.sqrt() * noise - (1 - share).sqrt() * latents


def turned(latents: Tensor, twins: Tensor, steps: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noised latents of the twins, and the velocity that leads from them to ``latents``."""
    mixed, _ = noised(twins, steps, shares)
    share = shares[steps].view(-1, 1, 1, 1).to(latents.device)
    return mixed, (share.sqrt() * mixed - latents) / (1 - share).sqrt()


def pipeline(unet: UNet2DConditionModel, vae: AutoencoderKL, words: Words) -> StableDiffusionXLPipeline:
    """Assemble the stock pipeline from its components."""
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=words.first,
        text_encoder_2=words.second,
        tokenizer=words.tokenizer,
        tokenizer_2=words.tokenizer,
        unet=unet,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(plan: Plan, vae: AutoencoderKL, words: Words, fresh: bool = False) -> Path:
    """Train the UNet on the cached latents, save the whole pipeline as ``out`` and return that path."""
    from training.evaluate import show_samples

    unet = build().to(plan.device, memory_format=torch.channels_last)
    shares = signal_shares()
    store, twins = LatentCache("pictures"), LatentCache("twins")

    def step_loss(step: int, rng: Rng) -> Tensor:
        turns = rng.random() < TWINS
        batch = (twins if turns else store).batch(BATCH, rng)
        count = len(batch.scenes)
        embeds, pooled = words.embed(captions_of(batch.scenes, rng, outside=0.0 if turns else 0.03))
        latents = folded(batch.latents.to(embeds.device), vae)
        if turns and batch.twins is not None:
            kept, steps = torch.ones(count, device=embeds.device), torch.randint(300, 850, (count,))
            mixed, target = turned(latents, folded(batch.twins.to(embeds.device), vae), steps, shares)
        else:
            kept, steps = (torch.rand(count, device=embeds.device) > 0.1).float(), draw_steps(count)
            mixed, target = noised(latents, steps, shares)
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": size_ids(batch.size, count, embeds.device)}
        guess = unet(
            mixed.contiguous(memory_format=torch.channels_last),
            steps.to(embeds.device),
            embeds * kept[:, None, None],
            added_cond_kwargs=conditions,
        ).sample
        return F.mse_loss(guess, target)

    def show(folder: Path) -> None:
        pipe = pipeline(unet, vae, words)
        show_samples(pipe, folder)
        pipe.save_pretrained(folder / "out")
        store.refresh()

    return train(plan, {"unet": unet}, step_loss, show, fresh) / "out"
