"""Parses AUTOMATIC1111's prompt syntax: LoRA tags, other networks, weights in brackets.

Each regular expression matches within one pair of brackets, so parsing takes time linear in the prompt.
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

Lora = tuple[str, float]


def extract_loras(prompt: str) -> tuple[str, tuple[Lora, ...]]:
    """Return the prompt without `<lora:name:weight>` and other networks, and the LoRAs."""
    found: list[Lora] = []

    def extract(tag: re.Match[str]) -> str:
        if tag[1].startswith(_OTHER_NETWORKS):
            return ""
        lora = _lora_in(tag[1])
        if lora is None:
            return tag[0]
        found.append(lora)
        return ""

    words = _TAG.sub(extract, prompt)
    return _BLANKS.sub(" ", words).strip(" ,"), tuple(found)


def ignored_syntax(prompt: str) -> list[str]:
    """Return sentences about syntax that AUTOMATIC1111 supports and this server ignores."""
    ignored = []
    if any(tag[1].startswith(_OTHER_NETWORKS) for tag in _TAG.finditer(prompt)):
        ignored.append("prompt: only <lora:…> is known here; other networks are left out.")
    weighted = any(_is_weighted(group[1]) for group in _IN_PARENTHESES.finditer(prompt))
    if weighted or any(_is_scheduled(group[1]) for group in _IN_BRACKETS.finditer(prompt)):
        ignored.append("prompt: weights in brackets are read as plain words.")
    return ignored


def _lora_in(tag: str) -> Lora | None:
    """Return the LoRA of a tag such as `lora:name:0.8`."""
    if not tag.startswith("lora:"):
        return None
    match = _NAME_AND_WEIGHT.fullmatch(tag.removeprefix("lora:"))
    return (match["name"].strip(), _number(match["weight"])) if match else None


def _is_weighted(inside: str) -> bool:
    """Return whether the text has a weight, as in `(red:1.3)`."""
    _, colon, weight = inside.rpartition(":")
    return bool(colon) and _WEIGHT.fullmatch(weight.strip()) is not None


def _is_scheduled(inside: str) -> bool:
    """Return whether the text is prompt editing, as in `[cat:dog:0.5]`."""
    words, _, when = inside.rpartition(":")
    return bool(when) and set(when) <= _DIGITS and ":" in words[1:-1]


def _number(weight: str | None) -> float:
    try:
        return float(weight or 1)
    except ValueError:
        return 1.0
