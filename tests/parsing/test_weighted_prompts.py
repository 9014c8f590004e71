"""Weights in prompts mean what AUTOMATIC1111's own parser makes of them, in linear time."""

from __future__ import annotations

import random
import re

import pytest

from stable_diffusion_server.parsing.weighted_prompts import WeightedText, has_weights, parse_weights, without_weights

# AUTOMATIC1111's documented examples, and what owners paste.
EXAMPLES: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "(a [b) c]": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)],
    "a) b] c:1.3)": [("a) b] c:1.3)", 1.0)],
    "(12:30) o'clock": [("12", 10.0), (" o'clock", 1.0)],
    "ratio 16:9": [("ratio 16:9", 1.0)],
    "a BREAK (b:1.2)": [("a", 1.0), ("BREAK", 1.0), ("b", 1.2)],
    "BREAKFAST at BREAK": [("BREAKFAST at", 1.0), ("BREAK", 1.0)],
    "(red:1.2.3)": [("red", 1.0)],
    "(weg:-1)": [("weg", 0.0)],
    "": [],
    "(": [],
    "🙂 (é:1.5)": [("🙂 ", 1.0), ("é", 1.5)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_examples(prompt: str) -> None:
    """Texts and weights, the latter to nine digits."""
    found = parse_weights(prompt)
    assert [part.text for part in found] == [text for text, _ in EXAMPLES[prompt]]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in EXAMPLES[prompt]], rel=1e-9)


def slow(prompt: str) -> list[tuple[str, float]]:
    """The definition in quadratic time: each bracket multiplies all pieces since it was opened."""
    pieces: list[list[object]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors = {"(": 1.1, "[": 1 / 1.1}

    def multiply(start: int, factor: float) -> None:
        for one in pieces[start:]:
            one[1] = float(str(one[1])) * factor

    for match in re.finditer(r"\\[()\[\]\\:]|[()\[\]]|:([.\d]+)\)|[^\\()\[\]:]+|.", prompt, re.DOTALL):
        piece = match[0]
        if piece in opened:
            opened[piece].append(len(pieces))
        elif match[1] and opened["("]:
            multiply(opened["("].pop(), float(match[1]))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            pieces.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for kind, starts in opened.items():
        for start in starts:
            multiply(start, factors[kind])
    return [(str(text), min(max(float(str(weight)), 0.0), 10.0)) for text, weight in pieces]


def test_random_prompts_mean_what_the_definition_says() -> None:
    """A thousand prompts of brackets, words, numbers and escapes: the weight of each character agrees."""
    chance = random.Random(7)  # noqa: S311  # no secret
    alphabet = ["(", ")", "[", "]", ":1.3)", ":0.7)", " a", "b,", "\\(", "\\", ":", "1"]
    for _ in range(1000):
        prompt = "".join(chance.choices(alphabet, k=chance.randint(0, 24)))
        ours = [(letter, part.weight) for part in parse_weights(prompt) for letter in part.text]
        wanted = [(letter, weight) for text, weight in slow(prompt) for letter in text]
        assert [letter for letter, _ in ours] == [letter for letter, _ in wanted], prompt
        assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in wanted], rel=1e-6), prompt


@pytest.mark.parametrize(
    "unit", ["(", "[", ")", ":", "\\", "(a:1.1)", "((a", ": ", ":1", "BREAK ", "(a[b", "\\(", ":1.", " "]
)
def test_hostile_prompts_take_linear_time(unit: str) -> None:
    """32,000 characters of any unit: the number of parts is bounded by them, and nothing is lost or endless."""
    prompt = (unit * 32_000)[:32_000]
    parts = parse_weights(prompt)
    assert sum(len(part.text) for part in parts) <= len(prompt)
    assert all(0 <= part.weight <= 10 for part in parts)


def test_plain_encoders_read_the_words() -> None:
    """Weights are left out, escapes are undone; whether there were any is known."""
    assert without_weights("a (red:1.4) star BREAK [blue] sky") == "a red star blue sky"
    assert has_weights("(a)")
    assert has_weights(r"\(a\)")
    assert not has_weights("a: b, c")
    assert not has_weights("")
    assert parse_weights("a, b") == [WeightedText("a, b")]
