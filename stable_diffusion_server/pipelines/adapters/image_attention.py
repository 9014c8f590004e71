"""Lets rows of a pass attend to image prompts: cross attention adds what the pass of this thread has for its rows.

No weight changes, and a pass without image prompts computes what it did before: see `ImageAttention`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

_pass = threading.local()
_lock = threading.Lock()
_ENDING = ".attn2.processor"

# Weights that make keys and values of image tokens, by the path of a layer of attention: width × channels each.
ImageLayers = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class AttendedImages:
    """What some rows of a pass attend to by one adapter.

    `rows` are their places in the pass, none twice; `tokens` are rows × tokens × channels, `weights` rows × 1 × 1.
    """

    layers: ImageLayers
    rows: torch.Tensor
    tokens: torch.Tensor
    weights: torch.Tensor

    def added_to(self, made: torch.Tensor, query: torch.Tensor, layer: str) -> torch.Tensor:
        """The attention `made` (rows × queries × width) with that of these rows, whose query is given by head."""
        key, value = (self._by_head(weight, query) for weight in self.layers[layer])
        seen = functional.scaled_dot_product_attention(query[self.rows], key, value)
        return made.index_add(0, self.rows, self.weights * _joined(seen).to(made.dtype))

    def _by_head(self, weight: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        made = functional.linear(self.tokens, weight)
        return made.view(*made.shape[:2], query.shape[1], query.shape[3]).transpose(1, 2)


class ImageAttention:
    """The attention processor of one layer: `usual` unless the pass of this thread has image prompts.

    Its arithmetic is that of diffusers' `IPAdapterAttnProcessor2_0`; rows without image prompts get what
    `AttnProcessor2_0` gives.
    """

    def __init__(self, usual: Any, layer: str) -> None:
        self.usual, self.layer = usual, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What `attn` gives for this pass: rows × queries × width."""
        images = None if torch.compiler.is_compiling() else attended_images()
        if images is None or encoder_hidden_states is None:
            made: torch.Tensor = self.usual(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
            return made
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        if attention_mask is not None:
            rows, tokens, _ = encoder_hidden_states.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, rows)
            attention_mask = attention_mask.view(rows, attn.heads, -1, attention_mask.shape[-1])
        query = _by_head(attn.to_q(hidden_states), attn, attn.norm_q)
        key = _by_head(attn.to_k(encoder_hidden_states), attn, attn.norm_k)
        value = _by_head(attn.to_v(encoder_hidden_states), attn, None)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        made = _joined(seen).to(query.dtype)
        for part in images:
            made = part.added_to(made, query, self.layer)
        made = attn.to_out[1](attn.to_out[0](made))
        if attn.residual_connection:
            made = made + hidden_states
        return made / attn.rescale_output_factor


@contextmanager
def attending(images: Sequence[AttendedImages]) -> Iterator[None]:
    """Run the passes of this thread with these image prompts; as usual if there are none."""
    before = attended_images()
    _pass.images = tuple(images) or None
    try:
        yield
    finally:
        _pass.images = before


def attended_images() -> tuple[AttendedImages, ...] | None:
    """What the pass that this thread runs has; `None` without image prompts.

    What was recorded or compiled knows nothing of it: a recorder runs the module itself while there is some.
    """
    return getattr(_pass, "images", None)


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The layers of a UNet that attend to a prompt, by path, in the order in which IP-Adapters number them."""
    paths = (name.removesuffix(".processor") for name in unet.attn_processors if name.endswith(_ENDING))
    return {path: unet.get_submodule(path) for path in paths}


def let_attend(unet: Any) -> None:
    """Give a UNet's layers their processors, once; passes of other threads may run meanwhile."""
    with _lock:
        for path, attention in cross_attentions(unet).items():
            if not isinstance(attention.processor, ImageAttention):
                attention.processor = ImageAttention(attention.processor, path)


def _by_head(made: torch.Tensor, attn: Any, norm: Any) -> torch.Tensor:
    """Rows × tokens × width as rows × heads × tokens × part of the width."""
    split = made.view(len(made), -1, attn.heads, made.shape[-1] // attn.heads).transpose(1, 2)
    return split if norm is None else norm(split)


def _joined(seen: torch.Tensor) -> torch.Tensor:
    """What `_by_head` split, joined."""
    return seen.transpose(1, 2).flatten(2)
