"""What AUTOMATIC1111 reads in a prompt beside its words: adapters, other networks, weights in brackets. Pure.

The expressions here look only within one pair of brackets at a time, so that reading takes time in proportion to the
prompt.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"<([^<>]*)>")
_NAME_AND_WEIGHT = re.compile(r"(?P<name>[^:]+)(:(?P<weight>[+-]?\d{0,3}(\.\d{1,6})?))?(:.*)?", re.DOTALL)
_IN_PARENTHESES = re.compile(r"\(([^()]*)\)")
_IN_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_WEIGHT = re.compile(r"\d+(\.\d+)?")
_BLANKS = re.compile(r"\s{2,}")
_DIGITS = frozenset("0123456789.")
_OTHER_NETWORKS = ("lyco:", "hypernet:")

Adapter = tuple[str, float]


def adapters_in(prompt: str) -> tuple[str, tuple[Adapter, ...]]:
    """A prompt without its `<lora:name:weight>` and other networks, and the adapters."""
    found: list[Adapter] = []

    def taken(tag: re.Match[str]) -> str:
        if tag[1].startswith(_OTHER_NETWORKS):
            return ""
        adapter = _adapter_in(tag[1])
        if adapter is None:
            return tag[0]
        found.append(adapter)
        return ""

    words = _TAG.sub(taken, prompt)
    return _BLANKS.sub(" ", words).strip(" ,"), tuple(found)


def unread_in(prompt: str) -> list[str]:
    """Sentences about what AUTOMATIC1111 would read in a prompt and this server does not."""
    told = []
    if any(tag[1].startswith(_OTHER_NETWORKS) for tag in _TAG.finditer(prompt)):
        told.append("prompt: only <lora:…> is known here; other networks are left out.")
    weighted = any(_is_weighted(group[1]) for group in _IN_PARENTHESES.finditer(prompt))
    if weighted or any(_is_scheduled(group[1]) for group in _IN_BRACKETS.finditer(prompt)):
        told.append("prompt: weights in brackets are read as plain words.")
    return told


def _adapter_in(tag: str) -> Adapter | None:
    """The adapter a tag names, as in `lora:name:0.8`."""
    if not tag.startswith("lora:"):
        return None
    match = _NAME_AND_WEIGHT.fullmatch(tag.removeprefix("lora:"))
    return (match["name"].strip(), _number(match["weight"])) if match else None


def _is_weighted(inside: str) -> bool:
    """Whether it is words with a weight, as in `(red:1.3)`."""
    _, colon, weight = inside.rpartition(":")
    return bool(colon) and _WEIGHT.fullmatch(weight.strip()) is not None


def _is_scheduled(inside: str) -> bool:
    """Whether it is words that change on the way, as in `[cat:dog:0.5]`."""
    words, _, when = inside.rpartition(":")
    return bool(when) and set(when) <= _DIGITS and ":" in words[1:-1]


def _number(weight: str | None) -> float:
    try:
        return float(weight or 1)
    except ValueError:
        return 1.0
