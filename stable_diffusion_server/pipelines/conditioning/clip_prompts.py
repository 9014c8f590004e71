"""Encodes prompts with AUTOMATIC1111's weights by one or two CLIPs: chunks of 75 tokens, each encoded on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.parsing import parse_weights
from stable_diffusion_server.pipelines.conditioning.embedding_files import CLIP_L
from stable_diffusion_server.pipelines.conditioning.prompt_embeddings import PromptEmbeddings
from stable_diffusion_server.pipelines.conditioning.token_chunks import TokenChunk, chunks_of
from stable_diffusion_server.pipelines.model_spec import CHUNK_TOKENS

# Outside, a factor that keeps the mean changes more than the weights do: the mean may be near zero.
_FACTOR_MIN, _FACTOR_MAX = 0.5, 2.0


@dataclass(frozen=True, slots=True)
class ClipEncoder:
    """A CLIP and its tokenizer. SDXL reads the layer before the last (`penultimate`), SD 1.5 the last, normalized.

    `part` is its usual name, `clip_l` or `clip_g`, by which embeddings have vectors for it.
    """

    tokenizer: Any
    network: Any
    penultimate: bool
    part: str = CLIP_L


@dataclass(frozen=True, slots=True)
class ClipText:
    """An encoded text: 1 × 77·chunks × channels, and the pooled vector of the first chunk, if the last CLIP has one."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None
    is_cut: bool = False


def encode_text(
    texts: Sequence[str],
    encoders: Sequence[ClipEncoder],
    clip_skip: int,
    device: torch.device,
    embeddings: PromptEmbeddings,
) -> ClipText:
    """Encode a prompt, one text for each encoder. They see chunks of equal number, and their channels are joined.

    Names of `embeddings` are replaced by their vectors. Raises `InvalidInput` for a `clip_skip` that leaves no layer.
    """
    divided = [
        chunks_of(parse_weights(text), _tokens_of(encoder, embeddings), _comma(encoder.tokenizer))
        for text, encoder in zip(texts, encoders, strict=True)
    ]
    most = max(len(chunks) for chunks, _ in divided)
    encoded = []
    for encoder, (chunks, _) in zip(encoders, divided, strict=True):
        padding = [TokenChunk() for _ in range(most - len(chunks))]
        encoded.append(_encode([*chunks, *padding], encoder, clip_skip, device, embeddings))
    embeds = torch.cat([part for part, _ in encoded], dim=-1)
    return ClipText(embeds, encoded[-1][1], any(cut for _, cut in divided))


def padded(text: ClipText, empty: ClipText, tokens: int) -> ClipText:
    """The text with chunks of the empty one after it, up to this many tokens."""
    missing = (tokens - text.embeds.shape[1]) // empty.embeds.shape[1]
    return replace(text, embeds=torch.cat([text.embeds, *[empty.embeds] * missing], dim=1)) if missing else text


def _encode(
    chunks: Sequence[TokenChunk],
    encoder: ClipEncoder,
    clip_skip: int,
    device: torch.device,
    embeddings: PromptEmbeddings,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokenizer, network = encoder.tokenizer, encoder.network
    rows, weights = [], []
    for chunk in chunks:
        missing = CHUNK_TOKENS - len(chunk.tokens)
        ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * missing)
        weights.append([1.0, *chunk.weights, 1.0] + [1.0] * missing)
    tokens = torch.tensor(rows)
    # The first token stands where vectors are: the pooled vector is found by the last one.
    known = torch.where(tokens < 0, tokenizer.bos_token_id, tokens)
    with embeddings.placed(encoder.part, tokens):
        found = network(known.to(device), output_hidden_states=True)
    layer = clip_skip + (2 if encoder.penultimate else 1)
    if layer > len(found.hidden_states):
        most = len(found.hidden_states) - (2 if encoder.penultimate else 1)
        raise InvalidInput(f"clip_skip leaves out at most {most} layers of this model.", field="clip_skip")
    embeds = found.last_hidden_state if layer == 1 else found.hidden_states[-layer]
    if layer > 1 and not encoder.penultimate:
        embeds = getattr(network, "text_model", network).final_layer_norm(embeds)
    weighted = _weighted(embeds, torch.tensor(weights, device=device, dtype=torch.float32))
    pooled = getattr(found, "text_embeds", None)
    return weighted.reshape(1, -1, embeds.shape[-1]), None if pooled is None else pooled[:1]


def _weighted(embeds: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply each token by its weight, then each chunk by what keeps its mean, as AUTOMATIC1111 does.

    Chunks without weights stay as they are, bit for bit.
    """
    changed = (weights != 1).any(dim=1)
    if not changed.any():
        return embeds
    exact = embeds.float()
    multiplied = exact * weights.unsqueeze(-1)
    factor = exact.mean(dim=(1, 2), keepdim=True) / multiplied.mean(dim=(1, 2), keepdim=True)
    usable = torch.isfinite(factor) & (factor >= _FACTOR_MIN) & (factor <= _FACTOR_MAX)
    multiplied = multiplied * torch.where(usable, factor, 1.0)
    return torch.where(changed[:, None, None], multiplied.to(embeds.dtype), embeds)


def _tokens_of(encoder: ClipEncoder, embeddings: PromptEmbeddings) -> Any:
    def tokens_of(texts: list[str]) -> list[list[tuple[int, ...]]]:
        divided = [embeddings.split(text) for text in texts]
        words = [part.text for parts in divided for part in parts if not part.name]
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        left = iter(encoder.tokenizer(words, **options).input_ids if words else [])
        return [
            [group for part in parts for group in ([embeddings.tokens(part.name)] if part.name else _each(next(left)))]
            for parts in divided
        ]

    return tokens_of


def _each(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [(token,) for token in tokens]


def _comma(tokenizer: Any) -> int | None:
    """The token of a comma at the end of a word."""
    tokens = tokenizer(",", add_special_tokens=False).input_ids
    return tokens[0] if len(tokens) == 1 else None
