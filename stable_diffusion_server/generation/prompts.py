"""Prompt text: removes invisible characters, and shortens a prompt to the tokens its encoder reads."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stable_diffusion_server.parsing import nfc

CountTokens = Callable[[str], int]

# Never removed: without these words a prompt means the opposite.
NEGATIONS = frozenset("no nor not never none neither nobody nothing nowhere cannot without".split())
_NEGATED_CONTRACTION = "n't"

# Zero-width joiner and non-joiner: emoji and several scripts need them. All other format characters are removed.
_KEPT_FORMAT_CHARACTERS = frozenset("\u200c\u200d")
_SPACES = re.compile(r"\s+")
_PUNCTUATION = ".,;:!?"
_ASCII_CONTROLS = dict.fromkeys([*range(32), 127], " ")
# Characters of a prompt whose tokens are counted at once.
_SHORT = 2000


@dataclass(frozen=True, slots=True)
class StopWords:
    """English function words, removed first from a prompt that is too long. `words` contains no negations.

    `identity` is part of a request's digest, because another list changes images; empty for the built-in list.
    """

    words: frozenset[str]
    identity: str = ""

    @classmethod
    def of(cls, source: str, words: Iterable[str]) -> StopWords:
        """Return the stop words of another list; its name and content form the identity."""
        kept = frozenset(word for word in map(str.lower, words) if not _is_negation(word))
        content = hashlib.sha256("\n".join(sorted(kept)).encode()).hexdigest()
        return cls(kept, f"{source}-{content[:16]}")


def _is_negation(word: str) -> bool:
    return word in NEGATIONS or word.replace("\u2019", "'").endswith(_NEGATED_CONTRACTION)


# A short list, so that the server needs no corpus at run time.
BUILTIN_STOP_WORDS = StopWords(
    frozenset(
        "a an the and or but if then so as at by for from in into of on onto to with is are was were be been "
        "being am do does did has have had having it its this that these those there here he she they them his her "
        "their you your i me my we our us who whom which what when where why how all any both each few more most "
        "other some such only own same than too very can will just should would could may might must".split()
    )
)


def load_stop_words(source: str) -> StopWords:
    """Return the stop words of a source, `builtin` or `nltk`. Reads NLTK's English list from disk, never the network.

    Raises `LookupError`, whose sentence says how to fix it, if the package or its corpus is missing.
    """
    if source == "builtin":
        return BUILTIN_STOP_WORDS
    try:
        from nltk.corpus import stopwords
    except ImportError as error:
        raise LookupError("STOP_WORDS=nltk needs the package nltk: run `pip install nltk`.") from error
    try:
        return StopWords.of(source, stopwords.words("english"))
    except LookupError as error:
        raise LookupError(
            "STOP_WORDS=nltk needs NLTK's stop words on this machine: run `python -m nltk.downloader stopwords`."
        ) from error


def clean_prompt(prompt: str) -> str:
    """Return the prompt in NFC, without control, bidirectional and other invisible characters, and with single spaces.

    Raises `ValueError` for a lone surrogate, and for more combining marks in a row than `nfc` takes.
    """
    if prompt.isascii():
        return _SPACES.sub(" ", prompt.translate(_ASCII_CONTROLS)).strip()
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


def remove_stopwords(prompt: str, stop_words: StopWords = BUILTIN_STOP_WORDS) -> str:
    """Return the prompt without stop words; unchanged if it consists of stop words only."""
    words = [word for word in prompt.split() if word.lower().strip(_PUNCTUATION) not in stop_words.words]
    return " ".join(words) or prompt


def shorten_too_long_text(
    prompt: str, limit: int, count_tokens: CountTokens, stop_words: StopWords = BUILTIN_STOP_WORDS
) -> str:
    """Return the prompt within `limit` tokens: unchanged, or without stop words and cut after a whole word if needed.

    `count_tokens` counts with the encoder's own tokenizer, special tokens included. If the first word alone exceeds
    the limit, the word is cut, since an empty prompt would be worse.
    """
    if _fits(prompt, limit, count_tokens):
        return prompt
    words = remove_stopwords(prompt, stop_words).split(" ")
    if fitting := _longest_prefix(len(words), lambda n: _fits(" ".join(words[:n]), limit, count_tokens)):
        return " ".join(words[:fitting])
    word = words[0]
    return word[: _longest_prefix(len(word), lambda n: _fits(word[:n], limit, count_tokens))]


def _fits(prompt: str, limit: int, count_tokens: CountTokens) -> bool:
    """Return whether a prompt has at most `limit` tokens.

    Counts growing beginnings of a long prompt, because 32,000 emoji take a second to tokenize.
    """
    size = _SHORT
    while size < len(prompt):
        beginning = prompt[:size]
        if count_tokens(beginning.rpartition(" ")[0] or beginning) > limit:
            return False
        size *= 4
    return count_tokens(prompt) <= limit


def _longest_prefix(length: int, fits: Callable[[int], bool]) -> int:
    """Return the largest n in 0..length with `fits(n)`, which must be monotone; asks for no n above twice the answer.

    It doubles n until it does not fit, and then bisects.
    """
    low, high = 0, 1
    while high <= length and fits(high):
        low, high = high, high * 2
    high = min(high - 1, length)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
