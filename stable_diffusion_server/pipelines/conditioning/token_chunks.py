"""Divides a prompt's tokens into CLIP's chunks of 75 as AUTOMATIC1111 does, each token with its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stable_diffusion_server.parsing import BREAK, WeightedText
from stable_diffusion_server.pipelines.model_spec import CHUNK_TOKENS, MOST_CHUNKS

# A comma among the last of a chunk's tokens ends it, so that fewer phrases are divided.
_COMMA_WITHIN = 20


@dataclass(slots=True)
class TokenChunk:
    """Up to 75 tokens, without the special ones, and the weight of each."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    last_comma: int = -1


def chunks_of(
    parts: Sequence[WeightedText], tokens_of: Callable[[list[str]], list[list[tuple[int, ...]]]], comma: int | None
) -> tuple[list[TokenChunk], bool]:
    """Return the chunks, 1 to `MOST_CHUNKS`, and whether more were left out.

    `tokens_of` tokenizes texts, each on its own, into groups of up to 75 tokens that stay in one chunk. `comma` is the
    token of a comma, if there is one.
    """
    words = [part.text for part in parts if part.text != BREAK]
    tokens = iter(tokens_of(words) if words else [])
    chunks: list[TokenChunk] = []
    chunk = TokenChunk()
    for part in parts:
        if part.text == BREAK:
            chunks.append(chunk)
            chunk = TokenChunk()
        else:
            for group in next(tokens):
                chunk = _added(chunk, group, part.weight, chunks, is_comma=group == (comma,))
        if len(chunks) > MOST_CHUNKS:
            break
    if chunk.tokens or not chunks:
        chunks.append(chunk)
    return chunks[:MOST_CHUNKS], len(chunks) > MOST_CHUNKS


def _added(
    chunk: TokenChunk, group: tuple[int, ...], weight: float, ended: list[TokenChunk], *, is_comma: bool
) -> TokenChunk:
    """Add a group of tokens; a chunk without room is appended to `ended` first. Returns the chunk to continue."""
    length = len(chunk.tokens)
    if is_comma:
        chunk.last_comma = length
    elif length == CHUNK_TOKENS and chunk.last_comma != -1 and length - chunk.last_comma <= _COMMA_WITHIN:
        cut = chunk.last_comma + 1
        rest = TokenChunk(chunk.tokens[cut:], chunk.weights[cut:])
        ended.append(TokenChunk(chunk.tokens[:cut], chunk.weights[:cut]))
        chunk = rest
    if len(chunk.tokens) + len(group) > CHUNK_TOKENS:
        ended.append(chunk)
        chunk = TokenChunk()
    chunk.tokens += group
    chunk.weights += [weight] * len(group)
    return chunk
