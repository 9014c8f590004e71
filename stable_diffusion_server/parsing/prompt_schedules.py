"""Parses prompts that change with the step, as AUTOMATIC1111 writes them: `[from:to:when]` and `[one|other]`.

`when` is a share of the steps if it has a point, otherwise a number of steps. `[one|other]` changes at every step.
Brackets that are neither are left as they are. Takes time linear in the prompt: nesting and the number of such brackets
are bounded, and further ones are plain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

_MOST_DEPTH, _MOST_CHOICES = 16, 32
_TOKEN = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"[0-9]{1,6}(?:\.[0-9]{0,6})?|\.[0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a bracket chooses among. `when` is the text of its number; empty: it changes at every step."""

    options: list[list[str | _Choice]]
    when: str = ""

    def at(self, step: int, steps: int) -> list[str | _Choice]:
        """What is drawn at a step, counted from 0."""
        if not self.when:
            return self.options[step % len(self.options)]
        number = float(self.when)
        last = int(number * steps) if "." in self.when else int(number)
        return self.options[0 if step < last else 1]


@dataclass(slots=True)
class _Group:
    """An open bracket, what is in it, and the places of the separators directly inside it."""

    kind: str
    pieces: list[str | _Choice] = field(default_factory=list)
    colons: list[int] = field(default_factory=list)
    bars: list[int] = field(default_factory=list)


def scheduled_texts(prompt: str, steps: int) -> list[tuple[int, str]]:
    """Return the texts of a prompt, each with the step from which it is drawn (from 0), for `steps` steps."""
    pieces = _parsed(prompt)
    if not any(isinstance(piece, _Choice) for piece in pieces):
        return [(0, prompt)]
    texts = [_text_at(pieces, step, steps) for step in range(max(1, steps))]
    changes = [step for step, (before, after) in enumerate(pairwise(texts), 1) if before != after]
    return [(step, texts[step]) for step in (0, *changes)]


def longest_text(prompt: str, steps: int) -> str:
    """Return the text of a prompt that is drawn in the most of `steps` steps, the earliest of equal ones."""
    runs = scheduled_texts(prompt, steps)
    ends = [*(start for start, _ in runs[1:]), max(1, steps)]
    counts: dict[str, int] = {}
    for (start, text), end in zip(runs, ends, strict=True):
        counts[text] = counts.get(text, 0) + end - start
    return max(counts, key=lambda text: counts[text])


def _text_at(pieces: list[str | _Choice], step: int, steps: int) -> str:
    """The text at a step. Nesting is bounded, so this may call itself."""
    parts = (piece if isinstance(piece, str) else _text_at(piece.at(step, steps), step, steps) for piece in pieces)
    return "".join(parts)


def _parsed(prompt: str) -> list[str | _Choice]:
    stack = [_Group("")]
    choices = 0
    for match in _TOKEN.finditer(prompt):
        sign, top = match[0], stack[-1]
        if sign in "([" and len(stack) <= _MOST_DEPTH:
            stack.append(_Group(sign))
        elif (sign == ")" and top.kind == "(") or (sign == "]" and any(group.kind == "[" for group in stack)):
            while sign == "]" and stack[-1].kind == "(":
                _leave_open(stack)
            group = stack.pop()
            closed = _closed(group, sign) if choices < _MOST_CHOICES else None
            choices += closed is not None
            stack[-1].pieces += [closed] if closed else [group.kind, *group.pieces, sign]
        else:
            if sign in ":|" and top.kind == "[":
                (top.colons if sign == ":" else top.bars).append(len(top.pieces))
            top.pieces.append(sign)
    while len(stack) > 1:
        _leave_open(stack)
    return _joined(stack[0].pieces)


def _leave_open(stack: list[_Group]) -> None:
    """Take the last group, which is never closed, as text of the one around it."""
    group = stack.pop()
    stack[-1].pieces += [group.kind, *group.pieces]


def _closed(group: _Group, closing: str) -> _Choice | None:
    """What a closed bracket chooses among; `None` if it is neither of the two."""
    if closing != "]":
        return None
    pieces, colons = group.pieces, group.colons
    if colons:
        number = pieces[colons[-1] + 1 :]
        text = "".join(piece for piece in number if isinstance(piece, str)).strip() if len(number) <= 2 else ""
        if all(isinstance(piece, str) for piece in number) and _NUMBER.fullmatch(text):
            first = colons[0] if len(colons) > 1 else -1
            return _Choice([_joined(pieces[: max(first, 0)]), _joined(pieces[first + 1 : colons[-1]])], text)
    if group.bars:
        ends = [-1, *group.bars, len(pieces)]
        return _Choice([_joined(pieces[before + 1 : after]) for before, after in pairwise(ends)])
    return None


def _joined(pieces: list[str | _Choice]) -> list[str | _Choice]:
    """The pieces with neighbouring texts joined."""
    joined: list[str | _Choice] = []
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        joined += ["".join(texts), piece] if texts else [piece]
        texts = []
    return [*joined, "".join(texts)] if texts else joined
