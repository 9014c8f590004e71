"""The size that a folder's denoiser was made for, by its configuration and that of its VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stable_diffusion_server.pipelines.library.file_headers import is_there, read_json_object
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_CONFIG = "config.json"
# Parts that turn latents into pixels, and the keys of their configurations that say how often they double the sides.
_DECODERS = ("vae", "movq", "vqvae")
_BLOCKS = ("block_out_channels", "encoder_block_out_channels")
_GRID, _LARGEST, _MOST_BLOCKS = 64, 4096, 10


def with_folder_size(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec with the size of the folder's denoiser as its native size, where the configurations say one."""
    side = _number(folder / spec.denoiser_part, "sample_size") * _pixels_of_a_latent(folder)
    if not _GRID <= side <= _LARGEST:
        return spec
    return replace(spec, native_pixels=side * side, min_side=min(spec.min_side, side // _GRID * _GRID))


def _pixels_of_a_latent(folder: Path) -> int:
    """The side in pixels; 0 if it is not known, and 1 without latents."""
    decoder = next((folder / name for name in _DECODERS if is_there(folder / name / _CONFIG)), None)
    if decoder is None:
        return 1
    try:
        config = read_json_object(decoder / _CONFIG)
    except UnreadableModel:  # reported when it is loaded
        return 0
    blocks: list[object] = next((config[key] for key in _BLOCKS if isinstance(config.get(key), list)), [])
    return 2 ** (len(blocks) - 1) if 0 < len(blocks) <= _MOST_BLOCKS else 0


def _number(part: Path, key: str) -> int:
    if not is_there(part / _CONFIG):
        return 0
    try:
        value = read_json_object(part / _CONFIG).get(key)
    except UnreadableModel:  # reported when it is loaded
        return 0
    return value if type(value) is int and 0 < value <= _LARGEST else 0
