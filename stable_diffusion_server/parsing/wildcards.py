r"""Wildcards in prompts, in the syntax of dynamic-prompts: `{a|b}` is one of its options, `__name__` a line of a list.

Also `{2$$a|b|c}` (two of them), `{1-2$$ and $$a|b|c}` (one or two, joined by "and"), `{0.7::a|0.3::b}` (weights), all
nested. A brace without its partner is text, and so are `\{`, `\|` and `\}`, without their backslash.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

# The name of a list has letters, digits, blanks, `-`, `.`, `/` and single `_`, at most 100 characters.
_TOKEN = re.compile(r"\\[{}|]|[{}|]|__((?:[^\W_]|[-/. ]|_(?!_)){1,100})__|[^\\{}|_]+|.", re.DOTALL)
_BOUNDS = re.compile(r"\s*(?:(?P<low>[0-9]{1,3})?-(?P<high>[0-9]{1,3})?|(?P<exact>[0-9]{1,3}))\$\$")
_WEIGHT = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})::")
_SEPARATOR, _SEPARATOR_LENGTH = ", ", 100
# Maximum characters of a line, and lines, in a list.
_LINE_LENGTH, _MOST_LINES = 4000, 100_000


@dataclass(frozen=True, slots=True)
class WildcardLimits:
    """Bounds of an expansion: `characters` of the result, options that are `picked`, and levels of `depth`.

    The texts that are read for it, the prompt and the lines that are picked, have at most 8 times `characters`.
    """

    characters: int = 32_000
    picked: int = 1000
    depth: int = 16


class TooManyWildcards(ValueError):
    """An expansion exceeds its limits. The message is the end of a sentence about the text."""


@dataclass(frozen=True, slots=True)
class _Odds:
    """How likely each of several options is: the sums of the weights up to it."""

    sums: tuple[float, ...]

    @classmethod
    def of(cls, weights: Sequence[float]) -> _Odds:
        """Return the odds of some weights; if all are 0, the options are equally likely."""
        return cls(tuple(accumulate(weights if any(weights) else [1.0] * len(weights))))

    def sample(self, count: int, random: Callable[[], float]) -> list[int]:
        """Return the indices of `count` different options, or of all, in the order in which they were drawn."""
        most, found = min(count, len(self.sums)), dict[int, None]()
        for _ in range(8 * most + 16):
            if len(found) >= most:
                break
            index = bisect_right(self.sums, random() * self.sums[-1])
            found[min(index, len(self.sums) - 1)] = None
        for index in range(len(self.sums)):  # those that are drawn too rarely
            if len(found) >= most:
                break
            found[index] = None
        return list(found)


@dataclass(frozen=True, slots=True)
class WildcardLines:
    """The options of a list, at least one, with their odds."""

    texts: tuple[str, ...]
    odds: _Odds


@dataclass(frozen=True, slots=True)
class ExpandedText:
    """A text without wildcards, and the names in it that no list has, each once; these stay in the text."""

    text: str
    unknown: tuple[str, ...] = ()


def parse_wildcard_lines(text: str) -> WildcardLines | None:
    """Return the options in the text of a list, one a line; `None` if there is none.

    Empty lines and lines that begin with # are skipped. Raises `ValueError`, with the end of a sentence about the list.
    """
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) > _MOST_LINES:
        raise ValueError(f"has more than {_MOST_LINES} lines")
    if any(len(line) > _LINE_LENGTH for line in lines):
        raise ValueError(f"has a line of more than {_LINE_LENGTH} characters")
    weighed = [_weighed(line) for line in lines]
    odds = _Odds.of([weight for _, weight in weighed])
    return WildcardLines(tuple(line for line, _ in weighed), odds) if lines else None


def has_wildcards(text: str) -> bool:
    """Whether a text may have wildcards; others are not changed."""
    return "{" in text or "__" in text


def expand_wildcards(
    text: str,
    random: Callable[[], float],
    list_of: Callable[[str], WildcardLines | None],
    limits: WildcardLimits,
) -> ExpandedText:
    """Expand the wildcards of a text in linear time; the same numbers and lists give the same text.

    `random` returns numbers from 0 to below 1, `list_of` the list of a name. Raises `TooManyWildcards`.
    """
    expansion = _Expansion(random, list_of, limits)
    expanded = expansion.expanded(text, 0)
    return ExpandedText(expanded, tuple(expansion.unknown))


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a list in a text."""

    name: str


@dataclass(frozen=True, slots=True)
class _Group:
    """A pair of braces. `low` to `high` of its options are picked; without `high` up to all."""

    options: tuple[tuple[_Part, ...], ...]
    odds: _Odds
    low: int = 1
    high: int | None = 1
    separator: str = _SEPARATOR


_Part = str | _Name | _Group


class _Expansion:
    """One expansion, which counts what it takes."""

    def __init__(
        self, random: Callable[[], float], list_of: Callable[[str], WildcardLines | None], limits: WildcardLimits
    ) -> None:
        self._random = random
        self._list_of = list_of
        self._limits = limits
        self._left, self._left_to_read = limits.characters, 8 * limits.characters
        self._left_to_pick = limits.picked
        self.unknown: dict[str, None] = {}

    def expanded(self, text: str, depth: int) -> str:
        """Return a text that is `depth` levels deep without wildcards."""
        self._left_to_read -= len(text)
        if self._left_to_read < 0:
            raise TooManyWildcards("has wildcards whose lines are too long together")
        return self._joined(_parts_of(text), depth)

    def _joined(self, parts: Sequence[_Part], depth: int) -> str:
        return "".join(
            self._counted(part) if isinstance(part, str) else self._picked(part, depth + 1) for part in parts
        )

    def _counted(self, text: str) -> str:
        self._left -= len(text)
        if self._left < 0:
            raise TooManyWildcards(f"has more than {self._limits.characters} characters with its wildcards expanded")
        return text

    def _picked(self, part: _Name | _Group, depth: int) -> str:
        if depth > self._limits.depth:
            raise TooManyWildcards(f"has wildcards more than {self._limits.depth} deep in each other")
        if isinstance(part, _Name):
            part = _Group(((part,),), _Odds.of([1]))
        only = part.options[0][0] if [len(option) for option in part.options[:2]] == [1] else None
        if not isinstance(only, _Name):
            return self._series(part, part.odds, lambda at: self._joined(part.options[at], depth))
        if (lines := self._list_of(only.name)) is None:
            self.unknown[only.name] = None
            return self._counted(f"__{only.name}__")
        # `{2$$__name__}` picks two lines of the list.
        return self._series(part, lines.odds, lambda at: self.expanded(lines.texts[at], depth))

    def _series(self, group: _Group, odds: _Odds, text_of: Callable[[int], str]) -> str:
        """Return as many options as a group picks, of those with these odds."""
        most = len(odds.sums)
        high = most if group.high is None else min(group.high, most)
        low = min(group.low, high)
        count = low + int(self._random() * (high - low + 1)) if low < high else high
        self._left_to_pick -= max(count, 1)
        if self._left_to_pick < 0:
            raise TooManyWildcards(f"has wildcards that pick more than {self._limits.picked} options")
        picked = odds.sample(count, self._random)
        return "".join((self._counted(group.separator) if at else "") + text_of(one) for at, one in enumerate(picked))


def _parts_of(text: str) -> Sequence[_Part]:
    """Return a text as the names of lists, pairs of braces, and what is between them."""
    tokens = list(_TOKEN.finditer(text))
    paired = _paired([token[0] for token in tokens])
    # The options of each open pair of braces; at the bottom the text itself.
    levels: list[list[list[_Part]]] = [[[]]]
    for number, token in enumerate(tokens):
        word: str = token[0]
        if word == "{" and number in paired:
            levels.append([[]])
        elif word == "}" and number in paired:
            group = _group_of(levels.pop())
            levels[-1][-1].append(group)
        elif word == "|" and len(levels) > 1:
            levels[-1].append([])
        elif token[1] is not None:
            levels[-1][-1].append(_Name(token[1]))
        else:
            levels[-1][-1].append(word[1:] if word in ("\\{", "\\|", "\\}") else word)
    return levels[0][0]


def _paired(words: Sequence[str]) -> set[int]:
    """Return the positions of the braces that have a partner."""
    left: list[int] = []
    paired: set[int] = set()
    for number, word in enumerate(words):
        if word == "{":
            left.append(number)
        elif word == "}" and left:
            paired |= {left.pop(), number}
    return paired


def _group_of(sent: Sequence[Sequence[_Part]]) -> _Group:
    """Return the group of these options, without the bounds, weights and blanks around them."""
    heads, rests = zip(*map(_split, sent), strict=True)
    low, high, separator, first = _bounds(heads[0])
    weighed = [_weighed(head) for head in (first, *heads[1:])]
    options = tuple(_without_blanks([head, *rest]) for (head, _), rest in zip(weighed, rests, strict=True))
    return _Group(options, _Odds.of([weight for _, weight in weighed]), low, high, separator)


def _split(option: Sequence[_Part]) -> tuple[str, Sequence[_Part]]:
    """Return the text that an option begins with, and its other parts."""
    texts = list(takewhile(lambda part: isinstance(part, str), option))
    return "".join(map(str, texts)), option[len(texts) :]


def _bounds(head: str) -> tuple[int, int | None, str, str]:
    """Return the bounds and the separator that the first option of a group begins with, and the text behind them."""
    bounds = _BOUNDS.match(head)
    if bounds is None:
        return 1, 1, _SEPARATOR, head
    rest = head[bounds.end() :]
    own, mark, after = rest.partition("$$")
    separator, rest = (own, after) if mark and len(own) <= _SEPARATOR_LENGTH else (_SEPARATOR, rest)
    low, high = bounds["exact"] or bounds["low"] or "1", bounds["exact"] or bounds["high"]
    return int(low), None if high is None else int(high), separator, rest


def _weighed(option: str) -> tuple[str, float]:
    """Return the text of an option without its weight, and the weight, 1 without one."""
    match = _WEIGHT.match(option)
    return (option, 1.0) if match is None else (option[match.end() :], float(match[1]))


def _without_blanks(option: list[_Part]) -> tuple[_Part, ...]:
    """Return the parts of an option without blanks around them."""
    if isinstance(option[0], str):
        option[0] = option[0].lstrip()
    if isinstance(option[-1], str):
        option[-1] = option[-1].rstrip()
    return tuple(part for part in option if part != "")
