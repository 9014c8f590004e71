"""Translates weights as the library compel writes them to AUTOMATIC1111's: `(a star)1.3`, `star++`, `(a star)--`."""

from __future__ import annotations

import re

_UP, _DOWN = 1.1, 0.9
# More signs than that change nothing: weights are bounded.
_MOST_SIGNS = 30
_TOKEN = re.compile(
    r"\\.|\(|\)(?:\++|-+|\d{1,3}(?:\.\d{0,6})?)?|[^\W\d_](?:\w*)(?:\++|-+)(?![\w+-])|[^\W\d_]\w*|[^\\()\w]|\w",
    re.DOTALL,
)
_SIGNS = re.compile(r"[+-]{1,32000}$")
_FUNCTION = re.compile(r"\.(?:and|blend|swap)\(")


def from_compel(prompt: str) -> str:
    """Return the prompt with AUTOMATIC1111's weights. Takes linear time.

    Brackets without a weight group only. Square brackets and colons mean nothing in compel: they become plain text.
    """
    parts: list[str] = []
    opened: list[int] = []
    for match in _TOKEN.finditer(prompt):
        read = match[0]
        if read == "(":
            opened.append(len(parts))
            parts.append("\\(")  # unless it is closed
        elif read[0] == ")":
            if not opened:
                parts.append("\\)" + read[1:])
                continue
            weight = _weight(read[1:])
            parts[opened.pop()] = "" if weight is None else "("
            parts.append("" if weight is None else f":{weight:.6g})")
        elif read[0] == "\\" or read in "[]:":
            parts.append(read if read[0] == "\\" else "\\" + read)
        elif read[-1] in "+-" and len(read) > 1:
            word = _SIGNS.sub("", read)
            parts.append(f"({word}:{_weight(read[len(word) :]):.6g})")
        else:
            parts.append(read)
    return "".join(parts)


def has_functions(prompt: str) -> bool:
    """Whether the prompt uses `.and(…)`, `.blend(…)` or `.swap(…)`, which are read as text."""
    return _FUNCTION.search(prompt) is not None


def _weight(text: str) -> float | None:
    """The weight that stands behind a bracket or a word; `None` without one."""
    if not text:
        return None
    if text[0] in "+-":
        return float((_UP if text[0] == "+" else _DOWN) ** min(len(text), _MOST_SIGNS))
    return float(text)
