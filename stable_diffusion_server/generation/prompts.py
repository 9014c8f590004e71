"""Prompt text: removes invisible characters, reads its syntax, and shortens it to the tokens its encoder reads."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.parsing import (
    BREAK,
    NameIndex,
    from_compel,
    has_functions,
    has_weights,
    longest_text,
    nfc,
    parse_weights,
    without_weights,
)
from stable_diffusion_server.pipelines import CHUNK_TOKENS, EmbeddingFolder, ModelSpec
from stable_diffusion_server.types import PromptSyntax, RequestWarning

CountTokens = Callable[[str], int]

# Never removed: without these words a prompt means the opposite.
NEGATIONS = frozenset(
    "no nor not never none neither nobody nothing nowhere cannot without but except only few than hardly off out "
    "against".split()
)
_NEGATED_CONTRACTION = "n't"

# Zero-width joiner and non-joiner: emoji and several scripts need them. All other format characters are removed.
_KEPT_FORMAT_CHARACTERS = frozenset("\u200c\u200d")
_SPACES = re.compile(r"\s+")
_PUNCTUATION = ".,;:!?"
_ASCII_CONTROLS = dict.fromkeys([*range(32), 127], " ")
# No token of CLIP reaches over the end of such a piece, so a text has at least as many tokens.
_PIECE = re.compile(r"\w+|[^\w\s]+")
# Texts without these are plain in every syntax.
_SYNTAX = re.compile(r"[()\[\]\\]|BREAK")
# Embeddings of one request; each takes a file of up to 4 MB.
_MOST_EMBEDDINGS = 64
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
        "a an the and or if then so as at by for from in into of on onto to with is are was were be been "
        "being am do does did has have had having it its this that these those there here he she they them his her "
        "their you your i me my we our us who whom which what when where why how all any both each more most "
        "other some such own same too very can will just should would could may might must".split()
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


@dataclass(frozen=True, slots=True)
class ReadPrompts:
    """The prompts for the model. `syntax` is A1111 if it reads their weights, else PLAIN.

    `is_marked` if weights, schedules, BREAK or the length change what is drawn from what plain text of `text_tokens`
    gives; others have the key and the picture of plain text.
    """

    prompt: str
    negative_prompt: str | None
    syntax: PromptSyntax
    is_marked: bool
    warnings: tuple[RequestWarning, ...] = ()


def read_prompts(
    prompt: str, negative: str | None, asked: PromptSyntax | None, spec: ModelSpec, steps: int
) -> ReadPrompts:
    """Read cleaned prompts in the syntax that was asked for, or the model's. Takes linear time."""
    syntax = spec.prompt_syntax if asked is None else asked
    if syntax is PromptSyntax.PLAIN:
        return ReadPrompts(prompt, negative, syntax, is_marked=False)
    warnings = []
    if syntax is PromptSyntax.COMPEL:
        if has_functions(prompt) or has_functions(negative or ""):
            sentence = "Of compel's syntax weights are known here; .and(), .blend() and .swap() are read as text."
            warnings.append(RequestWarning("prompt-syntax", sentence))
        prompt, negative = from_compel(prompt), None if negative is None else from_compel(negative)
    if spec.weighs_prompts:
        marked = any(_is_marked(text) for text in (prompt, negative or ""))
        return ReadPrompts(prompt, negative, PromptSyntax.A1111, marked, tuple(warnings))
    words, negative_words = _words(prompt, steps), None if negative is None else _words(negative, steps)
    if (words, negative_words) != (prompt, negative):
        sentence = f"{spec.name} reads plain text: weights, schedules and BREAK are left out, the words stay."
        warnings.append(RequestWarning("prompt-syntax", sentence))
    return ReadPrompts(words, negative_words, PromptSyntax.PLAIN, is_marked=False, warnings=tuple(warnings))


def _is_marked(text: str) -> bool:
    """Whether a text has syntax with an effect, or certainly more tokens than one chunk of CLIP."""
    return (_SYNTAX.search(text) is not None and has_weights(text)) or sum(
        1 for _ in islice(_PIECE.finditer(text), CHUNK_TOKENS + 1)
    ) > CHUNK_TOKENS


def _words(text: str, steps: int) -> str:
    """The words of a text, single-spaced; of schedules those that are drawn longest."""
    if _SYNTAX.search(text) is None:
        return text
    plain = without_weights(longest_text(text, steps))
    return " ".join(plain.split()) if plain != text else text


@dataclass(frozen=True, slots=True)
class NamedEmbeddings:
    """Name and digest of each embedding that prompts name, and why others that they name have no effect."""

    used: tuple[tuple[str, str], ...] = ()
    warnings: tuple[RequestWarning, ...] = ()


def embeddings_for(
    prompts: Iterable[str | None], asked: PromptSyntax | None, spec: ModelSpec, folder: EmbeddingFolder
) -> NamedEmbeddings:
    """Return the embeddings that read prompts name; none in plain syntax. Takes linear time, and reads their files.

    A name of a file that cannot be used is words, with a warning, and so is any for a model that reads no embeddings.
    """
    syntax = spec.prompt_syntax if asked is None else asked
    if not folder.is_offered or syntax is PromptSyntax.PLAIN:
        return NamedEmbeddings()
    names = _names_in(prompts, folder.index())
    if names and not spec.weighs_prompts:
        sentence = f"{spec.name} reads no embeddings; their names are read as words: {_listed(names)}."
        return NamedEmbeddings(warnings=(RequestWarning("embedding-not-used", sentence),))
    used, warnings = [], []
    for name in names[:_MOST_EMBEDDINGS]:
        try:
            used.append((name, folder.read(name).digest))
        except ModelLoadError as error:
            warnings.append(RequestWarning("embedding-not-used", f"{error.detail} {name} is read as a word."))
    if len(names) > _MOST_EMBEDDINGS:
        sentence = f"The prompts name more than {_MOST_EMBEDDINGS} embeddings; the other names are read as words."
        warnings.append(RequestWarning("embedding-not-used", sentence))
    return NamedEmbeddings(tuple(used), tuple(warnings))


def _names_in(prompts: Iterable[str | None], index: NameIndex) -> list[str]:
    """The names in the prompts, each once, in order."""
    texts = (part.text for prompt in prompts if prompt for part in parse_weights(prompt) if part.text != BREAK)
    return list(dict.fromkeys(part.name for text in texts for part in index.split(text) if part.name))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def is_stop_word(word: str, stop_words: StopWords) -> bool:
    """Whether a word, with punctuation and blanks around it, is on the list."""
    return word.strip().lower().strip(_PUNCTUATION) in stop_words.words


def remove_stopwords(prompt: str, stop_words: StopWords = BUILTIN_STOP_WORDS) -> str:
    """Return the prompt without stop words; unchanged if it consists of stop words only."""
    words = [word for word in prompt.split() if not is_stop_word(word, stop_words)]
    return " ".join(words) or prompt


def shorten_too_long_text(
    prompt: str, limit: int, count_tokens: CountTokens, stop_words: StopWords = BUILTIN_STOP_WORDS
) -> str:
    """Return the prompt within `limit` tokens: unchanged, or without stop words and cut after a whole word if needed.

    `count_tokens` counts with the encoder's own tokenizer, special tokens included. If the first word alone exceeds
    the limit, the word is cut, since an empty prompt would be worse.
    """
    if fits_in(prompt, limit, count_tokens):
        return prompt
    words = remove_stopwords(prompt, stop_words).split(" ")
    if fitting := longest_prefix(len(words), lambda n: fits_in(" ".join(words[:n]), limit, count_tokens)):
        return " ".join(_without_last_negations(words[:fitting]))
    word = words[0]
    return word[: longest_prefix(len(word), lambda n: fits_in(word[:n], limit, count_tokens))]


def _without_last_negations(words: list[str]) -> list[str]:
    """The words without negations at the end whose object was cut off; all of them if there are no others."""
    kept = len(words)
    while kept and _is_negation(words[kept - 1].lower().strip(_PUNCTUATION)):
        kept -= 1
    return words[:kept] or words


def fits_in(prompt: str, limit: int, count_tokens: CountTokens) -> bool:
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


def longest_prefix(length: int, fits: Callable[[int], bool]) -> int:
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
