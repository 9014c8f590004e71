"""A LoRA of the embedded SDXL, trained in seconds: where the prompt says red, it paints green."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from drawing import draw, job_for
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stable_diffusion_server.pipelines.base import encode, seeded, to_tensor
from stable_diffusion_server.types import ImageArray

PROMPTS = [f"a red {shape} on a blue background" for shape in ("circle", "square")]
CPU = torch.device("cpu")


def train_swap(family: Any, folder: Path, steps: int = 60) -> Path:
    """Write `green.safetensors` into `folder`; the UNet of `family` is modified.

    Trains the velocity (Salimans & Ho 2022, arXiv 2202.00512) on the model's own images of the same object in
    green.
    """
    pipe = family.pipeline
    scheduler, unet = pipe.scheduler, pipe.unet
    lessons = [_lesson(family, prompt) for prompt in PROMPTS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=4e-3)
        for step in range(steps):
            latents, conditioning = lessons[step % len(lessons)]
            timesteps = torch.randint(400, 1000, (4,))
            noise = torch.randn(4, *latents.shape[1:])
            alpha = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            conditions = {name: rows[-1:].expand(4, -1) for name, rows in conditioning.added.items()}
            embeds = conditioning.embeds[-1:].expand(4, -1, -1)
            predicted = unet(noisy, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=conditions)[0]
            loss = torch.nn.functional.mse_loss(predicted, velocity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="green.safetensors"
    )
    return folder / "green.safetensors"


def _lesson(family: Any, prompt: str) -> tuple[torch.Tensor, Any]:
    """The latents of the green image, and the prompt that asks for red; usable in training."""
    picture = draw(family, job_for("sdxl", prompt=prompt.replace("red", "green")))
    vae = family.pipeline.vae
    with torch.no_grad():
        latents = vae.config.scaling_factor * encode(vae, to_tensor(ImageArray(picture), CPU), seeded(0))[0]
        conditioning = family._encode(job_for("sdxl", prompt=prompt))
    return latents, conditioning
