"""Parses weights in prompts as AUTOMATIC1111 writes them: `(word)`, `[word]`, `(word:1.3)`, escapes, BREAK.

`(…)` multiplies the weight of what is inside by 1.1, `[…]` divides it by 1.1, and `(…:1.3)` multiplies it by the
number. A backslash takes a bracket, a colon or a backslash literally. A bracket that is never closed reaches to the
end; one that closes nothing is text. Takes time linear in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ROUND, SQUARE = 1.1, 1 / 1.1
# Bounds of a weight, also of a product of nested ones: beyond, pictures are noise.
WEIGHT_MIN, WEIGHT_MAX = 0.0, 10.0
BREAK = "BREAK"

_TOKEN = re.compile(r"\\[()\[\]\\:]|[()\[\]]|:\s*([+-]?[.\d]{1,12})\s*\)|[^\\()\[\]:]+|.", re.DOTALL)
_SPECIAL = re.compile(r"[()\[\]\\:]")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class WeightedText:
    """A part of a prompt and its weight; the text `BREAK` between two parts stands for itself, with weight 1."""

    text: str
    weight: float = 1.0


def parse_weights(prompt: str) -> list[WeightedText]:
    """Return the parts of a prompt in order, neighbours of equal weight joined. A text without syntax is one part."""
    parts: list[WeightedText] = []
    for text, weight in _weighted(prompt):
        pieces = _BREAK.split(text)
        for number, divided in enumerate(pieces):
            piece = divided.lstrip() if number else divided
            if number:
                parts.append(WeightedText(BREAK))
            if number + 1 < len(pieces):
                piece = piece.rstrip()
            if not piece:
                continue
            if parts and parts[-1].weight == weight and parts[-1].text != BREAK:
                parts[-1] = WeightedText(parts[-1].text + piece, weight)
            else:
                parts.append(WeightedText(piece, weight))
    return parts


def without_weights(prompt: str) -> str:
    """Return the words of a prompt without its weights, for encoders that read plain text."""
    return "".join(" " if part.text == BREAK else part.text for part in parse_weights(prompt))


def has_weights(prompt: str) -> bool:
    """Whether the syntax changes anything in a prompt."""
    return [part for part in parse_weights(prompt) if part.text] != ([WeightedText(prompt)] if prompt else [])


def render_weights(parts: Iterable[WeightedText]) -> str:
    """Return a prompt that `parse_weights` reads as these parts, whose weights it must be able to give."""
    return "".join(map(_rendered, parts))


def _rendered(part: WeightedText) -> str:
    if part.text == BREAK:
        return f" {BREAK} "
    text = _SPECIAL.sub(r"\\\g<0>", part.text)
    return text if part.weight == 1 else f"({text}:{part.weight:.6g})"


def _weighted(prompt: str) -> Iterator[tuple[str, float]]:
    """Each piece of text and its weight.

    The factor of a bracket may follow its content, so brackets are matched before weights are multiplied. Round and
    square ones are counted apart, since they may cross: `(a [b) c]`.
    """
    tokens = [(match[0], match[1]) for match in _TOKEN.finditer(prompt)]
    factors, ends = _matched(tokens)
    rounds, squares = [1.0], [1.0]
    for position, (piece, _) in enumerate(tokens):
        products = squares if piece in "[]" else rounds
        if position in factors:
            products.append(products[-1] * factors[position])
        elif position in ends:
            products.pop()
        else:
            text = piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece
            yield text, min(max(rounds[-1] * squares[-1], WEIGHT_MIN), WEIGHT_MAX)


def _matched(tokens: list[tuple[str, str | None]]) -> tuple[dict[int, float], set[int]]:
    """The factor of each opening bracket by its position, and the positions that close one."""
    factors: dict[int, float] = {}
    ends: set[int] = set()
    round_open: list[int] = []
    square_open: list[int] = []
    for position, (piece, number) in enumerate(tokens):
        if piece == "(":
            round_open.append(position)
            factors[position] = ROUND
        elif piece == "[":
            square_open.append(position)
            factors[position] = SQUARE
        elif piece == ")" or number is not None:
            if round_open:
                factors[round_open.pop()] = ROUND if number is None else _number(number)
                ends.add(position)
        elif piece == "]" and square_open:
            square_open.pop()
            ends.add(position)
    return factors, ends


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # two dots, or a sign alone
        return 1.0
