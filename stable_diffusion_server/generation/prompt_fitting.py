"""Shortens a prompt with weights to the chunks of tokens that a model reads; its weights stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from stable_diffusion_server.generation.prompts import CountTokens, StopWords, fits_in, is_stop_word, longest_prefix
from stable_diffusion_server.parsing import (
    BREAK,
    WeightedText,
    longest_text,
    parse_weights,
    render_weights,
)
from stable_diffusion_server.pipelines import CHUNK_TOKENS, MOST_CHUNKS

_SPECIAL_TOKENS = 2
_WORD = re.compile(r"\s?\S+\s?")


def shorten_weighted_text(prompt: str, steps: int, count_tokens: CountTokens, stop_words: StopWords) -> str:
    """Return a prompt of at most `MOST_CHUNKS` chunks: unchanged, or without stop words and cut after a whole word.

    A prompt that changes with the step then keeps the text that is drawn in the most of `steps` steps. `count_tokens`
    counts the words of a text, special tokens included.
    """
    if _chunks(parse_weights(prompt), count_tokens) <= MOST_CHUNKS:
        return prompt
    parts = parse_weights(longest_text(prompt, steps))
    words = [word for word in _words(parts) if not is_stop_word(word.text, stop_words)] or list(_words(parts))
    fitting = longest_prefix(len(words), lambda n: _chunks(_joined(words[:n]), count_tokens) <= MOST_CHUNKS)
    return render_weights(_joined(words[:fitting])).strip()


def _words(parts: Sequence[WeightedText]) -> Iterator[WeightedText]:
    for part in parts:
        for word in [part.text] if part.text == BREAK else _WORD.findall(part.text):
            yield WeightedText(word, part.weight)


def _joined(words: Sequence[WeightedText]) -> list[WeightedText]:
    parts: list[WeightedText] = []
    for (is_break, weight), group in groupby(words, lambda word: (word.text == BREAK, word.weight)):
        same = list(group)
        parts += same if is_break else [WeightedText("".join(word.text for word in same), weight)]
    return parts


def _chunks(parts: Sequence[WeightedText], count_tokens: CountTokens) -> int:
    """The chunks of CLIP's tokens that the parts fill, or a number above `MOST_CHUNKS`."""
    total = 0
    for is_break, group in groupby(parts, lambda part: part.text == BREAK):
        if is_break:
            total += sum(1 for _ in group) - 1
        else:
            text = "".join(part.text for part in group)
            most = MOST_CHUNKS * CHUNK_TOKENS
            if not fits_in(text, most + _SPECIAL_TOKENS, count_tokens):
                return MOST_CHUNKS + 1
            total += -(-(count_tokens(text) - _SPECIAL_TOKENS) // CHUNK_TOKENS)
        if total > MOST_CHUNKS:
            break
    return total
