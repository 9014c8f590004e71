"""Prompt text: cleaned of what cannot be seen, shortened to what an encoder reads. Knows no encoder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from stable_diffusion_server.parsing import nfc

CountTokens = Callable[[str], int]

# Dropped first when a prompt is too long: English function words, which move a picture least.
# A short list of our own, so that no corpus is needed at run time.
STOP_WORDS = frozenset(
    "a an the and or but if then so as at by for from in into of on onto to with without is are was were be been "
    "being am do does did has have had having it its this that these those there here he she they them his her "
    "their you your i me my we our us who whom which what when where why how all any both each few more most other "
    "some such no nor not only own same than too very can will just should would could may might must".split()
)

# Joiners that emoji and several scripts are written with; every other format character is invisible mischief.
_KEPT_FORMAT_CHARACTERS = frozenset("\u200c\u200d")
_SPACES = re.compile(r"\s+")


def clean_prompt(prompt: str) -> str:
    """The prompt in NFC, with control, bidirectional and other invisible characters gone and blanks collapsed.

    Raises `ValueError` when it holds a lone surrogate, which is no text, or more combining marks in a row than `nfc`
    takes.
    """
    kept = []
    for character in nfc(prompt):
        category = unicodedata.category(character)
        if category == "Cs":
            raise ValueError("holds a lone surrogate, which is not text")
        if category == "Cc":
            kept.append(" ")
        elif category != "Cf" or character in _KEPT_FORMAT_CHARACTERS:
            kept.append(character)
    return _SPACES.sub(" ", "".join(kept)).strip()


def remove_stopwords(prompt: str) -> str:
    """The prompt without its English function words; unchanged where nothing else would be left."""
    words = [word for word in prompt.split() if word.lower().strip(".,;:!?") not in STOP_WORDS]
    return " ".join(words) or prompt


def shorten_too_long_text(prompt: str, limit: int, count_tokens: CountTokens) -> str:
    """The prompt within `limit` tokens: as it is, else without stop words, else as many whole words as fit.

    `count_tokens` counts with the encoder's own tokenizer, special tokens included. A single first word that
    alone is over the limit is cut inside, since an empty prompt would be worse.
    """
    if count_tokens(prompt) <= limit:
        return prompt
    shorter = remove_stopwords(prompt)
    if count_tokens(shorter) <= limit:
        return shorter
    words = shorter.split(" ")
    if fitting := _longest_prefix(len(words), lambda n: count_tokens(" ".join(words[:n])) <= limit):
        return " ".join(words[:fitting])
    word = words[0]
    return word[: _longest_prefix(len(word), lambda n: count_tokens(word[:n]) <= limit)]


def _longest_prefix(length: int, fits: Callable[[int], bool]) -> int:
    """Largest n in 0..length for which `fits(n)` holds, by bisection; `fits` is taken to be monotone."""
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
