"""The largest picture whose patches all have a position in the table of a transformer."""

from __future__ import annotations

import math
from typing import Any

from stable_diffusion_server.errors import InvalidInput

# Transformers with one table for each side, by the key of their configuration that says its length; others compute
# positions of any number. AuraFlow's is one for the square.
_SIDE, _SQUARE, _AXES = "pos_embed_max_size", "AuraFlowTransformer2DModel", "axes_lens"
_KEYS = {
    "SD3Transformer2DModel": _SIDE,
    "CogView3PlusTransformer2DModel": _SIDE,
    "OmniGenTransformer2DModel": _SIDE,
    _SQUARE: _SIDE,
    "ZImageTransformer2DModel": _AXES,
    "Lumina2Transformer2DModel": _AXES,
    "CosmosTransformer3DModel": "max_size",
}
# HiDream pads pictures that are not square to this number of patches. Kandinsky 5 has 128 positions to each side.
_PADS, _KANDINSKY, _KANDINSKY_SIDE = "HiDreamImageTransformer2DModel", "Kandinsky5Transformer3DModel", 128
# Their two stages have 42.67 and 4 pixels to a latent, and patches of 2: other sizes come out rounded, or fail.
_ROUNDS, _ROUNDED = ("StableCascadeCombinedPipeline", "WuerstchenCombinedPipeline"), 128


def check_size(pipeline: Any, width: int, height: int) -> None:
    """Raise `InvalidInput` for a size in pixels that the pipeline's transformer has no positions for."""
    if type(pipeline).__name__ in _ROUNDS:
        faults = [
            (name, f"{name} must be a multiple of {_ROUNDED} for this model.")
            for name, side in (("width", width), ("height", height))
            if side % _ROUNDED
        ]
        if faults:
            raise InvalidInput.from_faults(faults)
    transformer = getattr(pipeline, "transformer", None)
    if transformer is None:
        return
    kind, patch = type(transformer).__name__, _pixels_of_a_patch(pipeline, transformer.config)
    if kind == _PADS:
        most = math.prod(transformer.config.max_resolution) // transformer.config.patch_size**2
        if width != height and (width // patch) * (height // patch) > most:
            raise InvalidInput(
                f"This model draws at most {most * patch**2} pixels unless the picture is a square.", field="width"
            )
        return
    largest = _positions(kind, transformer.config) * patch
    sides = (("width", width), ("height", height))
    if faults := [
        (name, f"{name} must be at most {largest}: this model has no positions beyond.")
        for name, side in sides
        if side > largest > 0
    ]:
        raise InvalidInput.from_faults(faults)


def _positions(kind: str, config: Any) -> int:
    """Positions to a side; 0 where there is no limit."""
    if kind == _KANDINSKY:
        return _KANDINSKY_SIDE
    listed = config.get(_KEYS.get(kind, ""))
    if listed is None:
        return 0
    if isinstance(listed, int):
        return math.isqrt(listed) if kind == _SQUARE else listed
    # Of three axes, text or time is the first; Cosmos' are latents, and one length serves all.
    return int(min(listed[1:]) if _KEYS[kind] == _AXES else max(listed) // _last(config.patch_size))


def _pixels_of_a_patch(pipeline: Any, config: Any) -> int:
    scale: Any = getattr(pipeline, "vae_scale_factor", None) or getattr(pipeline, "vae_scale_factor_spatial", 1)
    return int(scale) * _last(config.get("patch_size") or (config.get("all_patch_size") or [1])[0])


def _last(sizes: Any) -> int:
    return int(sizes if isinstance(sizes, int) else sizes[-1])
