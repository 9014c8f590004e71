"""Prompt cleaning, and truncation to the model's token limit."""

import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_server.generation.prompts import (
    clean_prompt,
    load_stop_words,
    remove_stopwords,
    shorten_too_long_text,
)


def count_words(text: str) -> int:
    return len(text.split()) + 2


def test_a_short_prompt_is_left_as_it_is() -> None:
    """Within the limit nothing changes, stop words included."""
    assert shorten_too_long_text("the cat on the mat", 7, count_words) == "the cat on the mat"


def test_stop_words_go_first() -> None:
    """One token over the limit removes stop words only."""
    assert shorten_too_long_text("the cat on the mat", 6, count_words) == "cat mat"


def test_whole_words_are_cut_after_the_stop_words() -> None:
    """When stop words are not enough, whole words are removed from the end."""
    assert shorten_too_long_text("the big red cat on the mat", 5, count_words) == "big red cat"


def test_a_single_word_that_is_too_long_is_cut_inside() -> None:
    """An empty prompt would be worse than a cut word."""
    assert shorten_too_long_text("a" * 50, 12, lambda text: len(text) + 2) == "a" * 10


def test_a_prompt_of_stop_words_alone_keeps_them() -> None:
    """Truncation never yields an empty prompt."""
    assert remove_stopwords("to be or to do") == "to be or to do"


def test_negations_are_never_removed() -> None:
    """A prompt without its "not" or "without" means the opposite."""
    prompt = "a cat not on the mat without a hat, and it isn't red, no"
    assert remove_stopwords(prompt) == "cat not mat without hat, isn't red, no"


def nltk_with(words: list[str] | None) -> dict[str, ModuleType]:
    """Fake NLTK modules whose corpus has these words or is missing."""

    class Corpus:
        """Like NLTK's corpus reader, it opens its file on first use."""

        def words(self, language: str) -> list[str]:
            if words is None:
                raise LookupError("Resource stopwords not found.")
            return words

    package, corpus = ModuleType("nltk"), ModuleType("nltk.corpus")
    corpus.stopwords = Corpus()  # type: ignore[attr-defined]  # made here
    return {"nltk": package, "nltk.corpus": corpus}


def test_the_list_of_nltk_has_an_identity_of_its_own_and_keeps_negations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity is part of a digest, so it changes with the list; the built-in list has none."""
    identities = set()
    for words in (["the", "on", "not", "nor", "isn't", "Mat"], ["the", "on"]):
        for name, module in nltk_with(words).items():
            monkeypatch.setitem(sys.modules, name, module)
        stop_words = load_stop_words("nltk")
        identities.add(stop_words.identity)
        assert "not" not in stop_words.words
    assert shorten_too_long_text("a cat not on the mat", 6, count_words, stop_words) == "a cat not mat"
    assert len(identities) == 2
    assert load_stop_words("builtin").identity == ""


def test_a_missing_nltk_or_corpus_is_a_sentence_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: the error gives the operator the command."""
    for name, module in nltk_with(None).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(LookupError, match=r"python -m nltk\.downloader stopwords"):
        load_stop_words("nltk")
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    with pytest.raises(LookupError, match="pip install nltk"):
        load_stop_words("nltk")


@given(st.text(alphabet="abc de", max_size=60), st.integers(3, 20))
def test_the_result_always_fits_and_only_loses_words(prompt: str, limit: int) -> None:
    """For any prompt and limit: within the limit, and the remaining words keep their order."""
    prompt = clean_prompt(prompt)
    shorter = shorten_too_long_text(prompt, limit, count_words)
    assert count_words(shorter) <= limit
    words = iter(prompt.split())
    assert all(word in words for word in shorter.split())


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    ("given_prompt", "cleaned"),
    [
        ("  a   red\tcircle\n", "a red circle"),
        ("a\0red", "a red"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u202egnp.exe", "gnp.exe"),
        ("zero\u200bwidth", "zerowidth"),
        ("a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
        ("\u200b \u0007", ""),
    ],
)
def test_what_cannot_be_seen_is_removed(given_prompt: str, cleaned: str) -> None:
    """Control, bidirectional and zero-width characters are removed; joined emoji stay; the result is NFC."""
    assert clean_prompt(given_prompt) == cleaned


@pytest.mark.fault(5)
def test_a_lone_surrogate_is_refused() -> None:
    """Half a surrogate pair is not text."""
    with pytest.raises(ValueError, match="surrogate"):
        clean_prompt("a \ud800 circle")


@given(st.text(max_size=40))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    """Cleaning is idempotent, so equal prompts have equal digests."""
    try:
        once = clean_prompt(text)
    except ValueError:
        return
    assert clean_prompt(once) == once
