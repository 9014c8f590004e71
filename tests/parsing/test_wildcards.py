"""Wildcards in the syntax of dynamic-prompts, their limits, and texts that attack them."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from random import Random

import pytest

from stable_diffusion_server.parsing import (
    ExpandedText,
    TooManyWildcards,
    WildcardLimits,
    WildcardLines,
    expand_wildcards,
    has_wildcards,
    parse_wildcard_lines,
)

SEEDS = range(200)
LISTS = {
    "colour": "red\ngreen\n# a comment\n\nblue\r\n",
    "animal": "__colour__ {cat|dog}\n__folder/bird__",
    "folder/bird": "swan",
    "hair_colour": "9::black\n1::white",
    "myself": "__myself__",
}


def lists(texts: Mapping[str, str] = LISTS) -> Mapping[str, WildcardLines | None]:
    return {name: parse_wildcard_lines(text) for name, text in texts.items()}


def expanded(text: str, seed: int = 1, limits: WildcardLimits | None = None) -> ExpandedText:
    random = Random(seed).random  # noqa: S311  # repeatable
    return expand_wildcards(text, random, lists().get, limits or WildcardLimits())


def results(text: str) -> set[str]:
    return {expanded(text, seed).text for seed in SEEDS}


@pytest.mark.parametrize(
    ("text", "all_of_them"),
    [
        ("a {red|blue} car", {"a red car", "a blue car"}),
        ("{ a | b }", {"a", "b"}),
        ("{a|}", {"a", ""}),
        ("{}", {""}),
        ("{a}", {"a"}),
        ("{2$$a|b}", {"a, b", "b, a"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{2-$$a|b}", {"a, b", "b, a"}),
        ("{0-1$$a|b}", {"", "a", "b"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{1::a|0::b}", {"a"}),
        ("{0::a|0::b}", {"a", "b"}),
        ("{x{1|2}|y}", {"x1", "x2", "y"}),
        ("{{a|b} c|d}", {"a c", "b c", "d"}),
        ("__colour__", {"red", "green", "blue"}),
        ("__COLOUR__", {"__COLOUR__"}),
        ("__animal__", {"red cat", "red dog", "green cat", "green dog", "blue cat", "blue dog", "swan"}),
        ("{2$$__folder/bird__}", {"swan"}),
        ("{a|__folder/bird__}", {"a", "swan"}),
        (r"\{a\|b\}", {"{a|b}"}),
        (r"{a\|b|c}", {"a|b", "c"}),
        (r"\(a\)", {r"\(a\)"}),
        ("(a:1.2) [b|c] a_b __", {"(a:1.2) [b|c] a_b __"}),
        ("{a", {"{a"}),
        ("a}|b", {"a}|b"}),
        ("{ {a} ", {"{ a "}),
        ("$$ 2$$ ::", {"$$ 2$$ ::"}),
        ("{a:b|a:b}", {"a:b"}),
    ],
)
def test_every_form_gives_the_texts_that_it_stands_for(text: str, all_of_them: set[str]) -> None:
    """All of them over enough seeds, and no others."""
    assert results(text) == all_of_them


def test_several_options_of_a_list_are_different_ones() -> None:
    """`{2$$__colour__}` picks two lines; `{2$$__colour__|__colour__}` may pick one twice, as in dynamic-prompts."""
    pairs = {frozenset(text.split(", ")) for text in results("{2$$__colour__}")}
    assert pairs == {frozenset(pair) for pair in (("red", "green"), ("red", "blue"), ("green", "blue"))}
    assert "red, red" in results("{2$$__colour__|__colour__}")
    assert {len(text.split(", ")) for text in results("{-$$__colour__}")} == {1, 2, 3}


@pytest.mark.parametrize("text", ["{9::black|1::white}", "__hair_colour__", "{9::__folder/bird__|white}"])
def test_weights_say_how_often_an_option_is_picked(text: str) -> None:
    """Nine in ten, in braces and in lists."""
    counted = Counter(expanded(text, seed).text for seed in range(2000))
    assert 1700 < 2000 - counted["white"] < 1900


def test_equal_numbers_give_equal_texts_and_an_unknown_name_stays() -> None:
    """It is reported, once."""
    text = "{a|b|c} __animal__ __nothing__ {2$$x|__nothing__|y}"
    assert expanded(text, 5) == expanded(text, 5)
    assert {expanded(text, seed).unknown for seed in SEEDS} == {("nothing",)}
    assert all("__nothing__" in expanded(text, seed).text for seed in SEEDS)


def test_a_text_without_wildcards_is_known_as_such() -> None:
    """Then nothing is read."""
    assert not any(map(has_wildcards, ("a red square", "a_b", "(a:1.2)", "[a|b]")))
    assert all(map(has_wildcards, ("{a|b}", "__a__", "a __ b")))
    assert parse_wildcard_lines("\n# only a comment\n \n") is None


NAMES_THAT_ARE_NONE = [
    *("__../../etc/passwd__", "__/etc/passwd__", "__..__", "__a\0b__", "__a\nb__", "__a\\b__", "__~__", "__a*__"),
    *("__c\u043elour__", "__colour\u200b__", "__" + "a" * 101 + "__", "__${x}__"),
]


@pytest.mark.parametrize("text", NAMES_THAT_ARE_NONE)
def test_a_name_is_looked_up_and_nothing_else(text: str) -> None:
    """Paths, control characters, confusable letters and long names are no lists; most are not even names."""
    result = expanded(text)
    assert result.text == text or text == "__${x}__"
    assert all(re.fullmatch(r"[\w\-/. ]{1,100}", name) for name in result.unknown)


def test_each_limit_is_met_exactly() -> None:
    """As many characters, picks and levels as allowed are expanded, and one more is refused with the reason."""
    limits = WildcardLimits(characters=20, picked=5, depth=3)
    assert expanded("{a}" * 5 + "x" * 15, limits=limits).text == "a" * 5 + "x" * 15
    assert expanded("{{{a}}}", limits=limits).text == "a"
    assert expanded("{3$$a|b|c}{2$$a|b}", limits=limits).text.count(",") == 3
    for text, why in (
        ("{a}" * 5 + "x" * 16, "more than 20 characters"),
        ("{a}" * 6, "pick more than 5"),
        ("{3$$a|b|c}{3$$a|b|c}", "pick more than 5"),
        ("{{{{a}}}}", "more than 3 deep"),
        ("__myself__", "more than 3 deep"),
    ):
        with pytest.raises(TooManyWildcards, match=why):
            expanded(text, limits=limits)


def test_a_list_has_at_most_as_many_lines_and_characters_as_is_said() -> None:
    """100,000 lines of 4,000 characters; one more of either is refused."""
    whole = parse_wildcard_lines("a\n" * 100_000)
    assert whole is not None
    assert len(whole.texts) == 100_000
    assert parse_wildcard_lines("a" * 4000) is not None
    for text, why in (("a\n" * 100_001, "100000 lines"), ("a" * 4001, "4000 characters")):
        with pytest.raises(ValueError, match=why):
            parse_wildcard_lines(text)


def test_long_lines_that_give_short_texts_are_counted_too() -> None:
    """The lines that are read together have at most eight times the characters of the result."""
    long = {"long": "{" + "a|" * 1900 + "a}"}

    def expand(text: str) -> ExpandedText:
        return expand_wildcards(text, lambda: 0.5, lists(long).get, WildcardLimits())

    assert len(expand("__long__" * 60).text) == 60
    with pytest.raises(TooManyWildcards, match="too long together"):
        expand("__long__" * 80)


ATTACKS = {
    "open braces": "{" * 32_000,
    "closed braces": "}" * 32_000,
    "bars": "|" * 32_000,
    "bars in braces": "{" + "|" * 31_998 + "}",
    "many bars picked": "{999$$" + "|" * 31_993 + "}",
    "underscores": "_" * 32_000,
    "nested": "{" * 16_000 + "}" * 16_000,
    "open options": "{a|" * 10_666,
    "a long name": "__" + "a" * 31_998,
    "half names": "__a" * 10_666,
    "names": "__a__ " * 5_333,
    "myself": "__myself__" * 3_200,
    "bounds": "{$$" * 10_666,
    "separators": "{2$$" + "$$" * 15_000 + "a|b}",
    "weights": "{1::" * 8_000,
    "backslashes": "\\" * 32_000,
    "control characters": "{\0|\x1b|\x7f}" * 900,
    "marks": "{\u0315|\u0323}" * 900,
}


@pytest.mark.fault(120)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_prompt_that_attacks_takes_no_longer_than_another(name: str) -> None:
    """32,000 characters of it are expanded or refused in a fraction of a second."""
    began = time.thread_time()
    try:
        assert len(expanded(ATTACKS[name]).text) <= 32_000
    except TooManyWildcards as refused:
        assert "wildcards" in str(refused)  # noqa: PT017  # either is right
    assert time.thread_time() - began < 2
