"""What the libraries do to pictures with torchvision, without it.

Qwen2-VL's processor for prompts with pictures, which needs it for videos, and the scaling of a mask in Cosmos.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.transformers import transformer_cosmos
from transformers import BatchFeature, Qwen2TokenizerFast, Qwen2VLImageProcessorPil, Qwen2VLProcessor

_PICTURE, _PLACE = "<|image_pad|>", "<|one_patch|>"


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers is untyped
    """Tokens of prompts in which each picture's token is repeated for its patches, and the patches."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        # Not the parent's: it makes a processor for videos.
        self.image_processor, self.tokenizer = images, tokenizer
        self.image_token = _PICTURE

    @classmethod
    def from_folder(cls, folder: Path) -> PictureProcessor:
        """Read a pipeline's folder `processor`. Raises what the libraries raise for unreadable files."""
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return cls(images, Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = "",
        padding: bool = True,
        return_tensors: str = "pt",
        **_: object,
    ) -> BatchFeature:
        """What the text encoder takes: `input_ids`, `attention_mask`, `pixel_values`, `image_grid_thw`."""
        texts = [text] if isinstance(text, str) else [*text]
        seen = {} if images is None else self.image_processor(images=images, return_tensors=return_tensors)
        grids = iter(seen["image_grid_thw"] if seen else ())
        merged = self.image_processor.merge_size**2
        for number, line in enumerate(texts):
            while _PICTURE in line:
                line = line.replace(_PICTURE, _PLACE * int(next(grids).prod() // merged), 1)
            texts[number] = line.replace(_PLACE, _PICTURE)
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **seen})


def give_cosmos_a_resize() -> None:
    """Let Cosmos' transformer, which Anima draws with as well, scale its mask if there is no torchvision."""
    if not hasattr(transformer_cosmos, "transforms"):
        resize = SimpleNamespace(resize=_nearest)
        modes = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=resize, InterpolationMode=modes)


def _nearest(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    """A mask, … × height × width, in another size."""
    return torch.nn.functional.interpolate(mask, size, mode=interpolation)
