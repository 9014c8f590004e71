"""Writes small IP-Adapters and their encoders, in the layout of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoint_stand_ins import write

from stable_diffusion_server.pipelines.adapters.image_attention import cross_attentions

# Widths of the tiny encoder: of its embeddings and of its layers.
EMBEDDED, HIDDEN = 24, 32
_QUERIES, _INNER = 5, 128


def vision_encoder(folder: Path, seed: int = 3) -> Any:
    """A CLIP that sees pictures of 32 × 32, saved as the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=EMBEDDED,
        )
        network = transformers.CLIPVisionModelWithProjection(config).eval()
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2)
    network.save_pretrained(folder)
    return network


def adapter_file(file: Path, unet: Any, kind: str = "plain", seed: int = 5) -> Path:
    """Write an adapter for a UNet: `plain`, `plus` or `full`."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale / shape[-1] ** 0.5

    width = next(iter(cross_attentions(unet).values())).cross_attention_dim
    projection = {"plain": _plain, "plus": _plus, "full": _full}[kind](made, width)
    tensors = {f"image_proj.{name}": tensor for name, tensor in projection.items()}
    for number, attention in enumerate(cross_attentions(unet).values()):
        for part in "kv":
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            tensors[name] = made(attention.inner_dim, width, scale=3.0)
    return write(file, tensors) or file


def _norm(made: Any, name: str, width: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.1 * made(1, width)[0], f"{name}.bias": made(1, width)[0]}


def _plain(made: Any, width: int) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": made(4 * width, EMBEDDED),
        "proj.bias": made(1, 4 * width)[0],
        **_norm(made, "norm", width),
    }


def _full(made: Any, width: int) -> dict[str, torch.Tensor]:
    return {
        "proj.0.weight": made(HIDDEN, HIDDEN),
        "proj.0.bias": made(1, HIDDEN)[0],
        "proj.2.weight": made(width, HIDDEN),
        "proj.2.bias": made(1, width)[0],
        **_norm(made, "proj.3", width),
    }


def _plus(made: Any, width: int) -> dict[str, torch.Tensor]:
    tensors = {
        "latents": made(1, _QUERIES, _INNER, scale=5.0),
        "proj_in.weight": made(_INNER, HIDDEN),
        "proj_in.bias": made(1, _INNER)[0],
        "proj_out.weight": made(width, _INNER),
        "proj_out.bias": made(1, width)[0],
        **_norm(made, "norm_out", width),
    }
    for block in range(4):
        start = f"layers.{block}"
        tensors |= {
            **_norm(made, f"{start}.0.norm1", _INNER),
            **_norm(made, f"{start}.0.norm2", _INNER),
            f"{start}.0.to_q.weight": made(64, _INNER),
            f"{start}.0.to_kv.weight": made(128, _INNER),
            f"{start}.0.to_out.weight": made(_INNER, 64),
            **_norm(made, f"{start}.1.0", _INNER),
            f"{start}.1.1.weight": made(4 * _INNER, _INNER),
            f"{start}.1.3.weight": made(_INNER, 4 * _INNER),
        }
    return tensors
